"""What a site writes down so that it survives kill -9: one line per event, in one write, appended.

    journal    <Unix time> <update id>     written when the real broker has confirmed the update, before anything else
    faults     <Unix time> <where> <fault> written before the fault is played

A line that the broker's confirm preceded may be missing, if the site was killed in between; none is there without it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Journal:
    """One append-only file."""

    path: Path

    def write(self, *words: str) -> None:
        line = " ".join((f"{time.time():.6f}", *words)) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self) -> list[tuple[float, tuple[str, ...]]]:
        """(Unix time, words) of each line; [] if nothing was written yet."""
        if not self.path.exists():
            return []
        lines = (line.split() for line in self.path.read_text().splitlines())
        return [(float(at), tuple(words)) for at, *words in lines]

    def since(self, at: float) -> bool:
        """True if something was written after `at` (Unix time)."""
        lines = self.read()
        return bool(lines) and lines[-1][0] > at
