"""Ports of the test servers: several test runs on one machine do not take each other's."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests import servers
from tests.servers import free_port

ANOTHER_RUN = "from tests import servers; servers.PORTS = range({0}, {0} + {1}); print(servers.free_port())"


def another_run(first: int, count: int) -> subprocess.CompletedProcess[str]:
    """What another process chooses of `count` ports."""
    code = ANOTHER_RUN.format(first, count)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_port_stays_this_runs_before_and_after_its_server() -> None:
    port = free_port()
    assert "is taken" in another_run(port, 1).stderr
    assert int(another_run(port, 50).stdout) in range(port + 1, port + 50)


def test_no_port_is_given_twice_or_where_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        monkeypatch.setattr(servers, "PORTS", range(port, port + 1))
        with pytest.raises(RuntimeError, match="is taken"):
            free_port()
    assert free_port() == port
    with pytest.raises(RuntimeError, match="is taken"):
        free_port()
