"""A site's machine has other work: its agent gives way."""

from __future__ import annotations

import os


def be_nice(niceness: int) -> None:
    """Run at niceness 0..19 or above (nice(1)): other programs get the processor first. Never less nice than before.

    Threads that are already there may keep their own, so call it first. Without nice(2) nothing happens.
    """
    if hasattr(os, "nice"):
        os.nice(max(0, niceness - os.nice(0)))
