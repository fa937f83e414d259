"""The embedded server on a disk that is full or read-only for a while, and two servers on one disk.

The disk is a small tmpfs, mounted for the test, so that the errors are the kernel's own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from federation.errors import StoreUnavailable
from federation.settings import env_name
from tests.integration.backlog import Backlog
from tests.integration.servers import Server, embedded, running, until
from tests.servers import missing

BLOCK = 4096
MIB = 1 << 20


class Disk:
    """A file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is free."""
        ballast = self.folder / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(BLOCK))
            assert os.statvfs(self.folder).f_bavail == 0
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self.remount("ro")
        try:
            yield
        finally:
            self.remount("rw")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={16 * MIB}", "tmpfs", str(folder)]
    result = subprocess.run(mount, capture_output=True, text=True, check=False)
    if result.returncode:
        missing("a small disk", f"run the tests as root, who may mount a tmpfs ({result.stderr.strip()})")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def server_on(disk: Disk, folder: Path) -> Server:
    """The object store is on `disk`, everything else is not."""
    made = embedded(folder)
    made.environment[env_name("store_url")] = f"file:{disk.folder / 'store'}"
    return made


def log_of(server: Server) -> str:
    return (server.folder / "aggregator.log").read_text()


@pytest.mark.parametrize(("trouble", "words"), [("full", "No space left"), ("read_only", "Read-only")])
def test_the_server_waits_while_the_store_cannot_be_written(
    disk: Disk, tmp_path: Path, trouble: str, words: str
) -> None:
    with running(server_on(disk, tmp_path)) as server:
        backlog = Backlog(server)
        server.kill("aggregator")
        backlog.send(5)
        server.start("aggregator")
        until("some work", lambda: backlog.accepted())
        with getattr(disk, trouble)():
            with pytest.raises(StoreUnavailable, match=words):
                backlog.send(1)
            until("the server to wait", lambda: words in log_of(server) and ": waiting " in log_of(server))
            assert server.alive()
        backlog.send(3)
        backlog.wait_and_check()
        assert server.alive()


def test_a_server_that_starts_on_a_full_disk_waits(disk: Disk, tmp_path: Path) -> None:
    with running(server_on(disk, tmp_path)) as server:
        backlog = Backlog(server)
        server.kill("aggregator")
        backlog.send(5)
        with disk.full():
            server.start("aggregator")
            until("the server to wait", lambda: "No space left" in log_of(server))
            assert "waiting " in log_of(server)
        backlog.wait_and_check()
        assert server.alive()


def test_queue_and_store_on_one_full_disk(disk: Disk, tmp_path: Path) -> None:
    made = embedded(tmp_path)
    made.environment[env_name("store_url")] = f"file:{disk.folder / 'store'}"
    made.environment[env_name("broker_url")] = f"sqlite:{disk.folder / 'queue.db'}"
    made.environment[env_name("lease_s")] = "2"
    with running(made) as server:
        backlog = Backlog(server)
        backlog.send(3)
        until("some work", backlog.accepted)
        with disk.full(), pytest.raises(StoreUnavailable, match="No space left"):
            backlog.send(1)
        backlog.send(3)
        backlog.wait_and_check()
        assert server.alive()


def test_two_servers_that_both_believe_they_are_the_only_one(tmp_path: Path) -> None:
    """Each has its own queue file, so nothing but the log's compare-and-swap is between them; every update is
    sent to both."""
    first = embedded(tmp_path)
    (tmp_path / "second").mkdir()
    second = embedded(tmp_path / "second")
    second.environment[env_name("store_url")] = first.environment[env_name("store_url")]
    with running(first), running(second):
        backlog = Backlog(first)
        for server in (first, second):
            server.kill("aggregator")
        backlog.send(30)
        for update in backlog.sent:
            second.send(update, None)
        for server in (first, second):
            server.start("aggregator")
        servers = (first, second)
        until("each server to have seen each update", lambda: all(sum(seen(s)) == 30 for s in servers))
        backlog.wait_and_check()
        assert first.alive()
        assert second.alive()
    accepted = [seen(server)[0] for server in (first, second)]
    assert sum(accepted) == 30


def seen(server: Server) -> tuple[int, int]:
    """Updates that it accepted, and that it found to be duplicates."""
    return log_of(server).count(": accepted "), log_of(server).count(" is a duplicate")
