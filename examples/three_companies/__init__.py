"""Three companies train one detector together, and one of them gives it away: every capability, by real commands.

stage.py       processes, commands with what is expected of them, and the telling
companies.py   who they are: images, settings, policies
story.py       what happens, act by act

    python -m examples.three_companies
"""
