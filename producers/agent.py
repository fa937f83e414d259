"""The site agent: pull, train, name, keep, upload, publish, and again. docs/architecture.md follows one update.

The agent holds no connection while it trains: each publish opens one and closes it, because a connection that
is silent for the length of a training run is dead at its end without saying so.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from broker import topology
from broker.port import Broker
from detection.gpu import gpu_figures
from federation.errors import (
    AccessDenied,
    BadMessage,
    CorruptLog,
    FedqueueError,
    NotFound,
    Rejected,
    Transient,
)
from federation.ids import new_update_id
from federation.jobs import Job, JobSpec
from federation.keys import update_key
from federation.points import Point, reach
from federation.settings import Settings
from federation.types import ClientUpdate, Head
from federation.wire import Delivery, JobClosed, decode_control
from producers.backoff import Backoff
from producers.delivery import Courier
from producers.evaluation import LocalEvaluation
from producers.follow import Follower
from producers.heartbeat import Heartbeat
from producers.local import LocalModel
from producers.machine import MachineGauge
from producers.outbox import Outbox
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.log import VersionLog
from storage.models import ModelCache
from storage.tensors import TensorFile, decode

log = logging.getLogger("fedqueue.site")

CACHED_MODELS = 3
RESYNC_EVERY = 5
"""Looks at the store happen at every control message, and without one at every so-many-th poll."""

PUBLIC = {"bad-job", "diverged", "negative-variance", "not-finite", "out-of-memory"}
"""Failures whose words are about settings and tensors. Those of all others may name files or quote data: they go no
further than the site's own log."""
INSTEAD = {
    "bad-dataset": "images cannot be read; the site's log names them",
    "trainer-failed": "the site's own trainer raised an error; the site's log says which",
}


class Trained(Protocol):
    """What training returns."""

    @property
    def weights(self) -> Mapping[str, NDArray[np.generic]]: ...
    @property
    def num_examples(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Progress:
    """Where training is: gradient steps done of how many, and passes over the local images.

    `left_out`: images that training does without because they cannot be read.
    """

    step: int
    steps: int
    epoch: float
    left_out: int = 0


class Trainer(Protocol):
    """Local training: everything that the agent does not know. `detection` brings the one for detectors."""

    def prepare(self, spec: JobSpec) -> None:
        """Check the local data against the job. Raises BadDataset with every defect."""
        ...

    def train(
        self,
        spec: JobSpec,
        weights: Mapping[str, NDArray[np.generic]],
        *,
        base_version: int,
        seed: int,
        on_progress: Callable[[Progress], None],
    ) -> Trained:
        """Run the job's plan from `weights`, all tensors of the model. Same arguments, same result on a CPU.

        Raises Rejected or MemoryError if this attempt came to nothing; the agent makes another.
        """
        ...


class SiteAgent:
    """One site working on one job, until the job closes or `stop` is set."""

    def __init__(
        self,
        settings: Settings,
        job_id: str,
        store: BlobStore,
        connect: Callable[[], Broker],
        trainer: Trainer,
        stop: threading.Event,
        agent_version: str = "",
    ) -> None:
        assert settings.site is not None
        self.site, self.job_id = settings.site, job_id
        self._settings, self._store, self._stop, self._trainer = settings, store, stop, trainer
        self._folder = settings.site_state / job_id
        self._broker = connect()
        self._outbox = Outbox(self._folder)
        self._courier = Courier(self._outbox, store, self._broker)
        self._follower = Follower(VersionLog(store, job_id), self._outbox)
        self._backoff = Backoff(settings.backoff_limit_s)
        gauge = MachineGauge(partial(gpu_figures, settings.device))
        self._heartbeat = Heartbeat(
            self.site, connect, settings.heartbeat_s, settings.heartbeat_ttl_s, gauge.read
        )
        self._heartbeat.update(job=job_id, agent_version=agent_version)
        self._attempts: dict[int, int] = {}
        self._failed_attempts = 0
        self._epochs = 0.0
        self._next_hint = 0.0
        self._evaluation: LocalEvaluation | None = None

    def run(self) -> None:
        """Raises Fatal if this site cannot take part (credentials, settings), BadDataset for its data."""
        with self._heartbeat:
            try:
                job = self._persist(self._find_job)
                if job is None:
                    return
                self._trainer.prepare(job.spec)
                model = LocalModel(
                    job, self._store, ModelCache(self._folder / "models", CACHED_MODELS), self._folder
                )
                self._evaluation = LocalEvaluation.of(
                    self.site, model, self._broker, self._trainer, self._measuring
                )
                if self._evaluation is not None:
                    self._follower.on_record = self._evaluation.saw
                while not self._stop.is_set():
                    if self._persist(lambda: self._step(job, model)):
                        break
            finally:
                self._broker.close()

    # --- one turn ------------------------------------------------------------------------------------------

    def _step(self, job: Job, model: LocalModel) -> bool:
        """Deliver what waits, look, and train or wait. True: the job is closed and nothing is owed."""
        self._heartbeat.update(outbox=sum(1 for _ in self._outbox.waiting()))
        self._courier.deliver()
        self._heartbeat.update(outbox=0, updates=self._courier.confirmed)
        head = self._follower.look()
        while self._evaluation is not None and self._evaluation.turn():
            head = self._follower.look()  # that took a while
            if head.closed is None:
                break  # the last version is measured, too; before that, no evaluation follows another
        owed = len(self._outbox.sent())
        if head.closed and not owed:
            log.info("the job is closed: %s", head.closed)
            return True
        if head.closed or owed >= job.spec.inflight_limit:
            self._courier.republish()
            self._wait(f"for {owed} sent updates to be merged")
        else:
            self._train(job, model, head)
        return False

    def _train(self, job: Job, model: LocalModel, head: Head) -> None:
        """One local training and its entry in the outbox. The next turn delivers it."""
        base = head.version
        self._heartbeat.update(state="pulling", base_version=base, detail="")
        version = self._pull(model, head)
        weights = model.assemble(version)
        self._heartbeat.update(state="training", step=0, steps=0)
        log.info("training from version %d", base)
        attempt = self._attempts.get(base, 0)
        self._attempts = {base: attempt + 1}
        self._next_hint = 0.0
        dropped: Dropped | None = None
        try:
            trained = self._trainer.train(
                job.spec,
                weights,
                base_version=base,
                seed=training_seed(job.spec.plan.seed, self.site, base, attempt),
                on_progress=self._progress,
            )
            reach(Point.TRAINED)
            arrays = dict(trained.weights)
            payload = model.payload(version, arrays)
            decode(payload, version.layout)  # as the server will: it would refuse what is broken
        except (Rejected, MemoryError) as exc:
            dropped = self._dropped(exc)
        if dropped is not None:
            raise dropped  # out here, because the failure's traceback may hold every tensor of a step
        self._epochs = self._heartbeat.status.epoch
        update = self._describe(job, base, trained, payload)
        model.keep_norm(version, arrays)
        self._heartbeat.update(state="uploading")
        self._outbox.put(update, payload)
        log.info("update %s: finished, %s", update.update_id, _metrics(trained))

    def _dropped(self, exc: Rejected | MemoryError) -> Dropped:
        """Report an attempt that came to nothing; nothing of it is sent."""
        self._failed_attempts += 1
        reason = exc.reason if isinstance(exc, Rejected) else "out-of-memory"
        words = str(exc) or "the memory of this machine is not enough"
        self._report(reason, words if reason in PUBLIC else INSTEAD.get(reason, "the site's log says why"))
        self._heartbeat.update(dropped=self._failed_attempts)
        return Dropped(f"attempt dropped ({reason}), another follows: {words}")

    def _report(self, kind: str, words: str) -> None:
        self._heartbeat.update(problem=f"{kind}: {words}"[:200], problem_at=datetime.now(UTC))

    def _pull(self, model: LocalModel, head: Head) -> TensorFile:
        """The head's model. Raises Transient if it is gone because this site slept since it looked."""
        try:
            return model.pull(head.current.model)
        except (NotFound, AccessDenied) as exc:  # a site's account is not told which of the two it is
            if self._follower.look().current != head.current:
                raise Transient(f"version {head.version} is not kept any more: taking a newer one") from exc
            if isinstance(exc, NotFound):
                raise CorruptLog(f"version {head.version} is the newest, but its model is missing") from exc
            raise

    def _describe(self, job: Job, base: int, trained: Trained, payload: bytes) -> ClientUpdate:
        update_id = new_update_id()
        return ClientUpdate(
            update_id=update_id,
            job=job.id,
            site=self.site,
            base_version=base,
            num_examples=trained.num_examples,
            payload_kind=job.spec.aggregation.payload_kind,
            payload_key=update_key(job.id, self.site, update_id),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            payload_bytes=len(payload),
            metrics=dict(trained.metrics),
            created_at=datetime.now(UTC),
        )

    def _progress(self, progress: Progress) -> None:
        self._heartbeat.update(step=progress.step, steps=progress.steps, epoch=self._epochs + progress.epoch)
        if progress.step == 0 and progress.left_out:
            self._report(
                "bad-dataset",
                f"images that cannot be read and are left out: {progress.left_out}; the site's log names them",
            )
        if self._stop.is_set():
            raise Stopped
        if time.monotonic() > self._next_hint:
            self._next_hint = time.monotonic() + RESYNC_EVERY * self._settings.poll_s
            if self._is_closed():
                raise Closed

    def _measuring(self, images: int, of: int) -> None:
        self._heartbeat.update(state="evaluating", step=images, steps=of, detail="")
        if self._stop.is_set():
            raise Stopped

    def _is_closed(self) -> bool:
        """Asked in the middle of training: work for a closed job would be thrown away. A hint is enough."""
        try:
            hints = self._broker.drain(topology.control_queue(self.site))
        except Transient:
            return False
        return any(_closes(hint, self.job_id) for hint in hints)

    # --- waiting -------------------------------------------------------------------------------------------

    def _wait(self, why: str) -> None:
        """Until the server says something, or long enough to look anyway."""
        self._heartbeat.update(state="waiting", detail=why)
        for _ in range(RESYNC_EVERY):
            if self._stop.wait(self._settings.poll_s):
                return
            if self._broker.drain(topology.control_queue(self.site)):
                return

    def _find_job(self) -> Job:
        try:
            return load_job(self._store, self.job_id)
        except NotFound as exc:
            raise Transient(f"job {self.job_id!r} does not exist yet") from exc

    def _persist(self, action: Callable[[], Any]) -> Any:
        """Do `action` until it succeeds; an outage is waited out, saying in one line what for."""
        while not self._stop.is_set():
            try:
                result = action()
            except Stopped:
                return None
            except Closed:
                log.info("the job closed while training for it: this attempt is dropped")
                return None
            except Transient as exc:
                seconds = self._backoff.next_s()
                log.warning("waiting %.1f s: %s", seconds, exc)
                why = "before another attempt" if isinstance(exc, Dropped) else str(exc)
                self._heartbeat.update(state="waiting", detail=why[:200])
                self._stop.wait(seconds)
            else:
                self._backoff.reset()
                return result
        return None


class Dropped(Transient):
    """An attempt at training came to nothing; another follows."""


class Stopped(FedqueueError):
    """The agent was told to stop in the middle of training; the attempt is dropped."""


class Closed(FedqueueError):
    """The job closed in the middle of training; the attempt is dropped."""


def _closes(hint: Delivery, job_id: str) -> bool:
    try:
        control = decode_control(hint)
    except BadMessage as exc:
        log.warning("control message dropped: %s", exc)
        return False
    return isinstance(control, JobClosed) and control.job == job_id


def training_seed(plan_seed: int, site: str, base_version: int, attempt: int) -> int:
    """The same training twice gives the same update; another attempt from the same version, another order."""
    return zlib.crc32(f"{plan_seed}/{site}/{base_version}/{attempt}".encode())


def _metrics(trained: Trained) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in trained.metrics.items())
