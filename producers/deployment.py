"""Keeping a deployed model what its channel says: pull, build, swap, check, and back if the check fails.

A channel decides, not the number: if `stable` is promoted to an older version, that one is deployed. What is needed is
a site's store account alone; control messages belong to the agent. While the store is away, what is deployed stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

from federation.errors import BadJob, NotFound, StoreUnavailable, Transient
from federation.types import Metrics, ModelVersion
from producers.backoff import Backoff
from producers.deployed import (
    CURRENT,
    MODEL,
    ONNX,
    DeployedFolder,
    InputConvention,
    Manifest,
    described,
    failed_before,
)
from producers.offline import OfflineModels, Pulled
from producers.postcheck import CheckFailed, CheckStopped, Command, check_model
from storage.blob import BlobStore
from storage.channels import resolve
from storage.jobs import list_evaluations
from storage.tensors import encode, from_arrays

log = logging.getLogger("fedqueue.deploy")

State = Literal["up-to-date", "deployed", "failed", "away"]


@dataclass(frozen=True)
class Outcome:
    """What one look came to, in words. failed: what the channel says did not pass, now or before."""

    state: State
    message: str


@dataclass
class Deployment:
    """One job's channel and the folder that follows it.

    onnx: turns a pulled model into the bytes of an ONNX file, or raises BadJob; None: none is wanted.
    """

    folder: DeployedFolder
    channel: str
    models: OfflineModels
    connect: Callable[[], BlobStore]
    stop: threading.Event
    check: Command | None = None
    onnx: Callable[[Pulled], bytes] | None = None
    _store: BlobStore | None = field(default=None, init=False)

    def begin(self, *, retry: bool = False) -> None:
        """Settle what a process that was killed has left. retry: let versions that failed be tried again.

        Call it, and `look`, while the folder is locked. Raises Transient if the folder cannot be written, BadSettings.
        """
        with self._disk():
            manifest = self.folder.recover()
            if manifest is not None:
                log.info("version %d was swapped in and not checked to its end", manifest.version)
                outcome = self._judge(manifest)
                log.info("%s", outcome.message)
            if retry:
                self.folder.forget_failures()

    def look(self) -> Outcome:
        """Ask what the channel means, and deploy it if that is something else.

        Raises NotFound if it means nothing yet; Transient (also: the store is away and nothing is deployed);
        CheckStopped; Fatal as the store does.
        """
        with self._disk():
            current = self.folder.deployed()
            try:
                resolved = resolve(self._open(), self.folder.job, self.channel)
            except StoreUnavailable as exc:
                if current is None:
                    return self._deploy(self.models.from_cache(self.channel, str(exc)))
                return _away(current, str(exc))
            meant = resolved.current
            outcome = self._follow(meant, current)
            if resolved.withdrawn is None:
                return outcome
            note = f"note that the job says of version {meant.version}: {resolved.withdrawn}"
            return replace(outcome, message=f"{outcome.message}; {note}")

    def _follow(self, meant: ModelVersion, current: Manifest | None) -> Outcome:
        """Deploy `meant`, unless it is there, or has failed. current: what is deployed."""
        refused = self._failed_before(meant.version, meant.model.sha256)
        if refused is not None:
            return refused
        name = self.folder.find(meant, self._files)
        if name is None or current is None:
            pulled = self.models.pull(self.channel, self._open)
            if pulled.away and current is not None:
                return _away(current, pulled.away)
            return self._deploy(pulled)
        manifest = self.folder.manifest(name)
        if name == self.folder.target(CURRENT):
            if manifest.channel != self.channel:
                self.folder.describe(name, manifest.model_copy(update={"channel": self.channel}))
            return Outcome("up-to-date", f"version {meant.version} ({self.channel}) is deployed: up to date")
        newer = {
            "channel": self.channel,
            "previous": current.version,
            "metrics": self._metrics(meant.version),
        }
        return self._swap(name, manifest.model_copy(update=newer))

    def run(self, poll_s: float, backoff_limit_s: float) -> None:
        """Look until `stop`; outages are waited out. Raises Fatal."""
        backoff, said = Backoff(backoff_limit_s), ""
        while not self.stop.is_set():
            try:
                outcome = self.look()
            except (Transient, NotFound) as exc:
                wait_s, message, level = backoff.next_s(), f"waiting: {exc}", logging.WARNING
            except CheckStopped:
                return
            else:
                backoff.reset()
                wait_s, message = poll_s, outcome.message
                level = logging.INFO if outcome.state in ("up-to-date", "deployed") else logging.WARNING
            if message != said:
                log.log(level, "%s", message)
            said = message
            self.stop.wait(wait_s)

    # --- one version ---------------------------------------------------------------------------------------

    @property
    def _files(self) -> frozenset[str]:
        return frozenset({MODEL} if self.onnx is None else {MODEL, ONNX})

    def _deploy(self, pulled: Pulled) -> Outcome:
        """Build the folder, try the model in it, and swap it in."""
        refused = self._failed_before(pulled.version, pulled.sha256)
        if refused is not None:
            return refused
        current = self.folder.deployed()
        files = {MODEL: bytes(encode(from_arrays(pulled.weights)))}
        reason = ""
        if self.onnx is not None:
            try:
                files[ONNX] = self.onnx(pulled)
            except BadJob as exc:
                reason = str(exc)
        spec = pulled.job.spec
        side = spec.plan.image_size
        manifest = Manifest(
            job=pulled.job.id,
            channel=self.channel,
            version=pulled.version,
            version_sha256=pulled.sha256,
            previous=None if current is None else current.version,
            files={name: described(data) for name, data in files.items()},
            arch=spec.arch,
            classes=spec.classes,
            image_size=side,
            input=InputConvention(shape=(1, 3, side, side)),
            own_norm=pulled.own_norm,
            metrics={} if pulled.away else self._metrics(pulled.version),
            deployed_at=datetime.now(UTC),
        )
        name = "" if reason else self.folder.add(manifest, files)
        if not reason:
            try:
                log.info("version %d: %s", manifest.version, check_model(self.folder.path(name), spec))
            except CheckFailed as exc:
                reason = str(exc)
        if reason:
            self.folder.reject(manifest, reason)
            return self._failed(manifest, reason, "it was not swapped in")
        return self._swap(name, manifest)

    def _swap(self, name: str, manifest: Manifest) -> Outcome:
        now = manifest.model_copy(update={"deployed_at": datetime.now(UTC)})
        self.folder.describe(name, now)
        self.folder.swap(name)
        return self._judge(now)

    def _judge(self, manifest: Manifest) -> Outcome:
        """Let the site's own command judge what `current` leads to now; back to the one before if it says no."""
        try:
            if self.check is not None:
                self.check.run(self.folder.root / CURRENT, self.stop)
        except CheckFailed as exc:
            self.folder.undo(str(exc), failed=True)
            return self._failed(manifest, str(exc), "it was rolled back")
        except CheckStopped:
            self.folder.undo("stopped before the check had ended", failed=False)
            raise
        self.folder.settle()
        was = "" if manifest.previous is None else f", before it was version {manifest.previous}"
        return Outcome(
            "deployed", f"version {manifest.version} ({self.channel}) is deployed in {self.folder.root}{was}"
        )

    def _failed_before(self, version: int, sha256: str) -> Outcome | None:
        failure = failed_before(self.folder.note(), version, sha256)
        if failure is None:
            return None
        return Outcome(
            "failed",
            f"version {version} ({self.channel}) failed its check at {failure.at:%Y-%m-%d %H:%M} UTC and waits for "
            f"--retry, or for another version; {self._stays()}: {failure.reason}",
        )

    def _failed(self, manifest: Manifest, reason: str, what: str) -> Outcome:
        return Outcome(
            "failed",
            f"version {manifest.version} ({manifest.channel}) failed its check, {what}; {self._stays()}: {reason}",
        )

    def _stays(self) -> str:
        current = self.folder.deployed()
        return "nothing is deployed" if current is None else f"version {current.version} is deployed"

    # --- around it -----------------------------------------------------------------------------------------

    def _open(self) -> BlobStore:
        if self._store is None:
            self._store = self.connect()
        return self._store

    def _metrics(self, version: int) -> dict[str, Metrics]:
        return {e.who: e.metrics for e in list_evaluations(self._open(), self.folder.job, version)}

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise Transient(
                f"{self.folder.root} cannot be used: {exc}; free some space or fix the folder"
            ) from exc


def _away(current: Manifest, why: str) -> Outcome:
    return Outcome("away", f"version {current.version} stays as it is, the store is away: {why}")
