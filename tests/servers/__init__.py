"""Real servers for tests: each module starts one as plain processes on free ports and stops it by pid.

A missing server skips locally with a loud reason and fails where CI is set, so a green CI has seen them all.
"""

from __future__ import annotations

import os
import random
import socket
from typing import NoReturn

import pytest


def missing(what: str, how: str) -> NoReturn:
    """Skip (locally) or fail (CI): `what` is not installed; `how` installs it."""
    reason = f"{what} is not installed: {how}"
    if os.environ.get("CI"):
        pytest.fail(f"CI must run against real servers, but {reason}", pytrace=False)
    pytest.skip(reason)


PORTS = range(22_000, 32_000)
"""Below those that Linux gives to connections, or an outgoing one may take the port of a server that is down."""

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A free TCP port of the loopback interface, which no other test run takes until this process ends.

    A server that starts later, or again, finds it free. The reservation is a socket with a name in Linux's abstract
    namespace, which is of the same network namespace as the ports, leaves no file, and ends with the process.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0fedqueue-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reserved.append(reservation)
        return port
    raise RuntimeError(f"every port of {PORTS} is taken")
