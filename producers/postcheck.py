"""Is a deployed model fit for use? What we can tell ourselves, and what a command of the site's own says."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from federation.errors import BadSettings, FedqueueError, Rejected
from federation.jobs import JobSpec
from producers.deployed import MANIFEST, MODEL
from storage.tensors import decode

PLACES = ("model", "manifest", "dir")
OUTPUT_SHOWN = 500
GRACE_S = 5.0
"""Between SIGTERM and SIGKILL for a command whose time is over."""


class CheckFailed(FedqueueError):
    """The model did not pass; the words say why."""


class CheckStopped(FedqueueError):
    """This process was told to stop before the check had ended: nothing is known."""


def check_model(folder: Path, spec: JobSpec) -> str:
    """Load `folder`'s model as a program would, and run it on one image of noise. Returns what was found.

    An architecture that this machine does not know cannot be run: then only its numbers are judged. Raises
    CheckFailed; BadSettings if this machine lacks the memory.
    """
    from detection.registry import known
    from detection.smoke import smoke_test

    try:
        weights = decode((folder / MODEL).read_bytes()).arrays()
        if not known(spec.arch):
            return f"all numbers are finite; {spec.arch} is not known here, so it was not run"
        return f"one image of noise: {smoke_test(spec, weights)} detections, all finite"
    except (OSError, Rejected) as exc:
        raise CheckFailed(str(exc)) from exc


@dataclass(frozen=True)
class Command:
    """A program that judges a deployed model by its exit status: 0 is good. Run without a shell.

    `{model}`, `{manifest}` and `{dir}` in its words are replaced by paths below `current`.
    """

    words: tuple[str, ...]
    limit_s: float

    @classmethod
    def parse(cls, text: str, limit_s: float) -> Command:
        """Raises BadSettings for what no shell could split into words."""
        try:
            words = tuple(shlex.split(text))
        except ValueError as exc:
            raise BadSettings(f"--check {text!r}: {exc}") from exc
        if not words:
            raise BadSettings("--check needs a command")
        return cls(words, limit_s)

    def run(self, folder: Path, stop: threading.Event) -> None:
        """Judge `folder`. Raises CheckFailed, also if it takes longer than `limit_s`; CheckStopped."""
        values = {"model": folder / MODEL, "manifest": folder / MANIFEST, "dir": folder}
        words = [_filled(word, values) for word in self.words]
        with TemporaryFile() as output:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as exc:
                raise CheckFailed(f"{words[0]} cannot be run: {exc}") from exc
            try:
                status = self._wait(process, stop)
            finally:
                _end(process)
            if status is None:
                raise CheckFailed(f"{words[0]} had not ended after {self.limit_s:g} s{_said(output)}")
            if status:
                raise CheckFailed(f"{words[0]} ended with {_status(status)}{_said(output)}")

    def _wait(self, process: subprocess.Popen[bytes], stop: threading.Event) -> int | None:
        """The exit status; None if the time is over."""
        deadline = time.monotonic() + self.limit_s
        while time.monotonic() < deadline:
            try:
                return process.wait(min(0.1, self.limit_s))
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    raise CheckStopped from None
        return None


def _filled(word: str, values: dict[str, Path]) -> str:
    for name in PLACES:
        word = word.replace(f"{{{name}}}", str(values[name]))
    return word


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, children of the command among them."""
    for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            continue


def _status(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"


def _said(output: IO[bytes]) -> str:
    """The end of what the command has printed."""
    length = output.seek(0, os.SEEK_END)
    output.seek(max(0, length - OUTPUT_SHOWN))
    text = " ".join(output.read().decode(errors="replace").split())
    return f": {text}" if text else ""
