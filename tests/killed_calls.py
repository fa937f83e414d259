"""Kill a piece of work, as by kill -9, before each of its changes to the file system in turn."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

CHANGES = (
    "open",
    "write",
    "fsync",
    "mkdir",
    "rmdir",
    "symlink",
    "link",
    "rename",
    "replace",
    "unlink",
    "remove",
)
KILLED = -signal.SIGKILL
MOST = 1000


def kills(work: Callable[[], object], prepare: Callable[[], object]) -> Iterator[int]:
    """`prepare`, then `work` in a forked process that dies before its n-th change, for n = 1, 2 … until it survives.

    Yields n after each death, for the caller to look at what is left.
    """
    for number in range(1, MOST):
        prepare()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # a fork beside threads, of which the child has none
            child = os.fork()
        if child == 0:
            status = 1
            try:
                _die_before(number)
                work()
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        assert status == KILLED, f"the work failed before change {number}"
        yield number
    raise AssertionError(f"{MOST} changes and no end")


def _die_before(number: int) -> None:
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return change

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
