"""Where the story is played: commands are run as somebody, shown as they are typed, and held to what is expected."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from cli.demo.processes import Processes
from federation.errors import Fatal
from federation.settings import CONFIG_ENV

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
COMMAND_LIMIT_S = 120.0


class Unexpected(Fatal):
    """The story did not go as it is told."""


@dataclass(frozen=True)
class Actor:
    """Somebody with settings of its own: a company, or whoever operates the server."""

    name: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            CONFIG_ENV: str(self.folder / "fedqueue.toml"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "110",
        }


@dataclass
class Stage:
    """`processes` are what runs for long; everything else is a command that ends."""

    processes: Processes
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    began: float = field(default_factory=time.monotonic)

    def act(self, number: int, title: str) -> None:
        self.console.print(f"\n[bold]{number}. {title}[/]  [dim]{time.monotonic() - self.began:.0f} s[/]")

    def tell(self, line: str) -> None:
        self.console.print(line, style="italic", markup=False)

    def run(
        self, actor: Actor, command: str, *, status: int = 0, says: str = "", last: int | None = None
    ) -> str:
        """`fedqueue <command>` in the actor's folder. Returns what it printed; only the last lines are shown if asked.

        Raises Unexpected if it ends with another exit status, or does not say `says`.
        """
        self.console.print(f"{actor.name}$ fedqueue {command}", style="cyan", markup=False)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FEDQUEUE_")}
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *shlex.split(command)],
            env={**inherited, **actor.environment},
            cwd=actor.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=COMMAND_LIMIT_S,
        )
        self._show(done.stdout, last if done.returncode == status else None)
        if done.returncode != status:
            raise Unexpected(f"it ended with exit status {done.returncode}, not {status}")
        if says not in " ".join(done.stdout.split()):
            raise Unexpected(f"it does not say {says!r}:\n{done.stdout}")
        return done.stdout

    def start(self, actor: Actor, command: str, name: str = "") -> None:
        """The same, as a service with a log file."""
        self.console.print(f"{actor.name}$ fedqueue {command} &", style="cyan", markup=False)
        self.processes.start(name or actor.name, shlex.split(command), actor.environment)

    def until(self, what: str, condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        """Wait for what the story waits for. Raises Unexpected if it does not come, Fatal if a process ended."""
        deadline = time.monotonic() + patience_s
        while not condition():
            self.processes.check()
            if time.monotonic() > deadline:
                raise Unexpected(f"waited {patience_s:.0f} s for {what}; logs: {self.processes.logs}")
            time.sleep(0.1)

    def fail(self, why: str) -> NoReturn:
        raise Unexpected(why)

    def _show(self, output: str, last: int | None) -> None:
        lines = [line.rstrip() for line in output.splitlines() if line.strip()]
        shown = lines if last is None else lines[-last:]
        if len(shown) < len(lines):
            self.console.print(f"    … {len(lines) - len(shown)} lines", style="dim")
        for line in shown:
            self.console.print(f"    {line}", markup=False)
