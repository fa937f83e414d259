"""One process under a supervisor that starts it again a second after it died, as systemd does.

Nobody but the supervisor starts anything. What dies is written down: whether the killer did it, or it ended by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.servers import ROOT

Command = Callable[[int], Sequence[str]]
"""Arguments of `python -m`, from the number of the start, counted from 0."""

RESTART_AFTER_S = 1.0
HIT_S = 5.0
"""An end so soon after a hit comes from it."""
WATCH_EVERY_S = 0.1
STOP_LIMIT_S = 60.0


@dataclass(frozen=True)
class End:
    """A process ended at `at` (Unix time). `killed`: the killer had just hit it, or its child: a worker whose child
    dies at the start gives up. Else it ended by itself, with exit status `code`."""

    at: float
    code: int
    killed: bool


@dataclass
class Supervised:
    """A process that is started again when it ends."""

    name: str
    command: Command
    environment: Mapping[str, str]
    log: Path
    ends: list[End] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _starts: int = 0
    _start_at: float = 0.0
    _hit_at: float = -HIT_S
    _orphans: int | None = None
    """Process group of the one that ended: its children may live on."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def watch(self) -> None:
        """Start it when it is time; notice its end."""
        with self._lock:
            if self._process is None:
                if time.monotonic() >= self._start_at:
                    self._start()
            elif (code := self._process.poll()) is not None:
                killed = time.monotonic() < self._hit_at + HIT_S
                self.ends.append(End(time.time(), code, killed))
                self._start_at = time.monotonic() + RESTART_AFTER_S
                self._orphans, self._process = self._process.pid, None

    def signal(self, number: int) -> int | None:
        """To the process and its children. Returns its pid, or None if it is not running."""
        with self._lock:
            if not self.running():
                return None
            assert self._process is not None
            os.killpg(self._process.pid, number)
            return self._process.pid

    def kill(self) -> bool:
        """kill -9 of the process alone. True if it was running."""
        with self._lock:
            if not self.running():
                return False
            assert self._process is not None
            self._hit_at = time.monotonic()
            self._process.kill()
            return True

    def kill_child(self) -> bool:
        """kill -9 of one of its children. True if it had one."""
        with self._lock:
            if not self.running():
                return False
            assert self._process is not None
            pid = self._process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children:
                self._hit_at = time.monotonic()
                os.kill(int(children[0]), signal.SIGKILL)
            return bool(children)

    def resume(self, pid: int) -> None:
        """SIGCONT, if the process that was stopped as `pid` is still there."""
        with self._lock:
            if self._process is not None and self._process.pid == pid and self.running():
                os.killpg(pid, signal.SIGCONT)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """SIGTERM; the supervisor must have stopped watching."""
        if self._process is not None:
            self._process.terminate()

    def join(self) -> int | None:
        """Wait for the end, with kill -9 if it takes too long. Returns the exit status, None if it was not running."""
        if self._process is None:
            return None
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        _kill_group(self._process.pid)
        return code

    def _start(self) -> None:
        if self._orphans is not None:
            _kill_group(self._orphans)  # as systemd does, here after a second in which they go on
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FEDQUEUE_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command(self._starts)],
                cwd=ROOT,
                env={**inherited, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._starts += 1
        self._hit_at = -HIT_S


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class Supervisor:
    """Watches processes in a thread of its own, until `stop`."""

    def __init__(self) -> None:
        self._processes: list[Supervised] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor")

    def start(self) -> None:
        self._thread.start()

    def add(self, process: Supervised) -> None:
        """Start it soon, and keep it running."""
        self._processes.append(process)

    def stop(self) -> dict[str, int | None]:
        """End all processes; returns their exit statuses. A second call does nothing more."""
        self._over.set()
        self._thread.join()
        for process in self._processes:
            process.terminate()
        return {process.name: process.join() for process in self._processes}

    def _watch(self) -> None:
        while not self._over.wait(WATCH_EVERY_S):
            for process in list(self._processes):
                process.watch()
