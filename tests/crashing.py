"""Run a module in a process that dies, as by kill -9, at a named point of its work: at once, when it is told to.

    python -m tests.crashing ORDER MODULE [ARGUMENT …]

ORDER is the path of an Order. While there is none the module runs as it does without this. So a process need not
be started anew to be killed, and one that takes the place of the dead runs on. A process that is forked obeys
the same order, which whoever carries it out takes away.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from federation.points import Point, watch


@dataclass(frozen=True)
class Order:
    """The file that says where to die: `<point's name> <at which time> <process | group>`.

    group: with the dying process all of its process group, a worker's parent among them.
    """

    path: Path

    def give(self, point: Point, time: int = 1, *, group: bool = False) -> None:
        """To die when `point` is reached for the `time`-th time from now on."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(f"{point.name} {time} {'group' if group else 'process'}")
        draft.rename(self.path)

    def waits(self) -> bool:
        """True until it is carried out."""
        return self.path.exists()

    def withdraw(self) -> None:
        self.path.unlink(missing_ok=True)


class Obedience:
    """The hook: counts how often the ordered point is reached, and dies."""

    def __init__(self, order: Order) -> None:
        self._path = order.path
        self._times = 0

    def __call__(self, point: Point) -> None:
        try:
            name, time, whom = self._path.read_text().split()
        except FileNotFoundError:
            return
        if name != point.name:
            return
        self._times += 1
        if self._times < int(time):
            return
        self._path.unlink(missing_ok=True)
        if whom == "group":
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    watch(Obedience(Order(Path(sys.argv[1]))))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
