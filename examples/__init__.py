"""Stories that are run: each tells what it does, and does it with the same commands that anybody would type."""
