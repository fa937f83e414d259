"""The demo's processes: the server's and one per site, each a real `fedqueue` process with a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from federation.errors import Fatal


@dataclass
class Processes:
    """Started processes by name. A context manager: none outlives it."""

    logs: Path
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _files: list[IO[bytes]] = field(default_factory=list)

    def start(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        """Run `fedqueue <arguments>` with FEDQUEUE_… from `environment` alone."""
        self.logs.mkdir(parents=True, exist_ok=True)
        file = (self.logs / f"{name}.log").open("ab")
        self._files.append(file)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FEDQUEUE_")}
        self._running[name] = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments],
            env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
            cwd=Path(__file__).resolve().parents[2],  # where `tasks` and `celeryconfig` are found by Celery
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def running(self, name: str) -> bool:
        return self._running[name].poll() is None

    def check(self) -> None:
        """Raises Fatal with the end of its log if a process failed."""
        for name, process in self._running.items():
            if process.poll() not in (None, 0):
                tail = "\n".join((self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-15:])
                raise Fatal(f"process {name} ended with status {process.returncode}; its last words:\n{tail}")

    def end(self, name: str) -> None:
        """Stop one of them; it may be started again."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        _await_end(process)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to the whole group of what does not end."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            _await_end(process)
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        # SIGTERM would end this process at once and leave the others behind; as an exception it passes __exit__
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _await_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=25)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
