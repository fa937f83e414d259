"""A real Redis for tests: `apt-get install redis-server`. One process on a free port, nothing on disk."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

from tests.servers import free_port, missing

START_LIMIT_S = 20.0


class RedisServer:
    """One throw-away server; `stop` and `start` again to play an outage (its data is gone then)."""

    def __init__(self) -> None:
        if shutil.which("redis-server") is None:
            missing("Redis", "apt-get install --no-install-recommends redis-server")
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._dir = tempfile.mkdtemp(prefix="fedqueue-redis-")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._dir),
                *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        limit = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError as exc:
                if self._process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError("redis-server did not start") from exc
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self._dir, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real Redis with nothing in it. Tests that stop it start their own."""
    with RedisServer() as server:
        yield server
