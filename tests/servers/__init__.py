"""Real servers for tests: each module starts one as plain processes on free ports and stops it by pid.

A missing server skips locally with a loud reason and fails where CI is set, so a green CI has seen them all.
"""

from __future__ import annotations

import os
import socket
from typing import NoReturn

import pytest


def missing(what: str, how: str) -> NoReturn:
    """Skip (locally) or fail (CI): `what` is not installed; `how` installs it."""
    reason = f"{what} is not installed: {how}"
    if os.environ.get("CI"):
        pytest.fail(f"CI must run against real servers, but {reason}", pytrace=False)
    pytest.skip(reason)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
