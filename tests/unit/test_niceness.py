"""A site gives way to the other programs of its machine."""

from __future__ import annotations

import os
import subprocess
import sys


def niceness_after(*steps: int) -> int:
    """In a process of its own, because nobody without privileges gets less nice again."""
    code = "import os; from producers.niceness import be_nice\n"
    code += "".join(f"be_nice({step})\n" for step in steps) + "print(os.nice(0))"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def test_a_process_gets_as_nice_as_told_and_never_less() -> None:
    own = os.nice(0)
    assert niceness_after(0) == own
    assert niceness_after(19) == 19
    assert niceness_after(19, 5) == 19
    assert niceness_after(own, own) == own
