"""One site's work for one job, in steps that do not wait: deliver, look, measure, train. docs/architecture.md.

When to take which step is the agent's business (agent.py); what there is to do, and why nothing may be trained now, is
known here. Training tells the agent every few seconds that it goes on (`listen`), and hears from it whether the server
said something about the job: work whose update would be refused is dropped.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from broker.port import Broker
from federation.errors import AccessDenied, CorruptLog, FedqueueError, NotFound, Rejected, Transient
from federation.governance import Invitation
from federation.ids import new_update_id
from federation.jobs import Job
from federation.keys import update_key
from federation.points import Point, reach
from federation.settings import Settings
from federation.types import ClientUpdate, Head, ModelVersion, Transfer
from producers.delivery import Courier
from producers.evaluation import LocalEvaluation
from producers.follow import Follower
from producers.heartbeat import Heartbeat
from producers.local import Arrays, LocalModel
from producers.outbox import Outbox
from producers.problems import kind_of, public, words_of
from producers.trainer import KnowsImages, Progress, Trained, Trainer
from producers.turns import Turns
from storage.blob import BlobStore
from storage.control import load_invitation
from storage.log import VersionLog
from storage.metered import MeteredStore
from storage.models import ModelCache
from storage.tensors import TensorFile, decode, encode

log = logging.getLogger("fedqueue.site")

CACHED_MODELS = 4
"""The initial model, and two versions with the optimiser state of one."""
RESYNC_EVERY = 5
"""Looks at the store happen at every control message, and without one at every so-many-th poll."""


class Dropped(Transient):
    """An attempt at training came to nothing; another follows."""


class Obsolete(FedqueueError):
    """The update in the making would be refused: the attempt is dropped."""


class Stopped(FedqueueError):
    """The agent was told to stop in the middle of its work; an attempt at training is dropped."""


@dataclass(frozen=True)
class Site:
    """What all jobs of a site share. `listen` takes in what the server says, and tells the jobs."""

    name: str
    settings: Settings
    store: BlobStore
    broker: Broker
    heartbeat: Heartbeat
    stop: threading.Event
    listen: Callable[[], object]

    def folder(self, job_id: str) -> Path:
        return self.settings.site_state / job_id


class JobWork:
    """One job. Without a trainer it only delivers what was finished before, and waits for its fate."""

    def __init__(self, site: Site, job: Job, trainer: Trainer | None) -> None:
        """`trainer`: prepared for this job."""
        self.job, self.hinted, self.barred = job, False, ""
        self._site, self._trainer = site, trainer
        folder = site.folder(job.id)
        self._outbox = Outbox(folder)
        self._store = MeteredStore(site.store)
        self._courier = Courier(self._outbox, self._store, site.broker)
        self._follower = Follower(VersionLog(self._store, job.id), self._outbox)
        self._model = LocalModel(job, self._store, ModelCache(folder / "models", CACHED_MODELS), folder)
        self._turns = Turns(job.spec.participation, folder)
        self._head: Head | None = None
        self._invitation: Invitation | None = None
        self._attempts: dict[int, int] = {}
        self._epochs = 0.0
        self._next_hint = 0.0
        self._base = 0
        self._evaluation: LocalEvaluation | None = None
        if trainer is not None:
            self._evaluation = LocalEvaluation.of(
                site.name, self._model, site.broker, trainer, self._measuring
            )
        if self._evaluation is not None:
            self._follower.on_record = self._evaluation.saw

    @property
    def waiting(self) -> int:
        """Updates that are finished and not confirmed by the broker."""
        return sum(1 for _ in self._outbox.waiting())

    @property
    def confirmed(self) -> int:
        """Updates that the broker has confirmed in this process."""
        return self._courier.confirmed

    @property
    def closed(self) -> str | None:
        """Why the job is over, as far as the last `tend` knows."""
        return None if self._head is None else self._head.closed

    @property
    def is_over(self) -> bool:
        """Nothing is left to do, now or later. After `tend`."""
        if self._head is None or self._outbox.sent() or self.waiting:
            return False
        if self._trainer is None:
            return True
        return self._head.closed is not None and not (self._evaluation and self._evaluation.is_due)

    # --- between two trainings -----------------------------------------------------------------------------

    def tend(self, measure: bool) -> None:
        """Deliver what waits, read the log, and if it may, `measure` what is due. Raises Transient, Fatal, Stopped."""
        self.hinted = False
        self._courier.deliver()
        head = self._follower.look()
        while measure and self._evaluation is not None and self._evaluation.turn():
            head = self._follower.look()  # that took a while
            if head.closed is None:
                break  # the last version is measured, too; before that, no evaluation follows another
        self._head = head
        if self._outbox.sent():
            self._courier.republish()
        if self._turns.by_invitation and head.idle_because is None:
            self._invitation = load_invitation(self._store, self.job.id, self._site.name)

    def idle_because(self) -> str | None:
        """Why no training may begin now, as far as the last `tend` knows; None: one may."""
        if self._trainer is None or self._head is None:
            return "only for what was finished before"
        head, owed = self._head, len(self._outbox.sent())
        if head.closed is not None and not owed:
            return head.closed
        if head.closed is None and self.barred:
            return self.barred
        if head.closed is None and head.idle_because is not None:
            return head.idle_because
        if head.closed is not None or owed >= self.job.spec.inflight_limit:
            return f"for {owed} sent updates to be merged"
        return self._turns.waits_for(self._invitation, datetime.now(UTC))

    # --- training ------------------------------------------------------------------------------------------

    def train(self) -> None:
        """One local training and its entry in the outbox; the next `tend` delivers it.

        Raises Transient, among them Dropped; Obsolete; Fatal; Stopped.
        """
        assert self._trainer is not None
        assert self._head is not None
        heartbeat = self._site.heartbeat
        offered, began_at = self._head.offered, datetime.now(UTC)
        self._base = base = offered.version
        heartbeat.update(state="pulling", job=self.job.id, base_version=base, detail="")
        version, moments = self._pull(offered)
        weights = self._model.assemble(version) | moments
        heartbeat.update(state="training", step=0, steps=0, epoch=self._epochs)
        log.info("%s: training from version %d", self.job.id, base)
        attempt = self._attempts.get(base, 0)
        self._attempts = {base: attempt + 1}
        self._next_hint = 0.0
        dropped: Dropped | None = None
        try:
            trained = self._trainer.train(
                self.job.spec,
                weights,
                base_version=base,
                seed=training_seed(self.job.spec.plan.seed, self._site.name, base, attempt),
                on_progress=self._progress,
            )
            reach(Point.TRAINED)
            arrays = dict(trained.weights)
            sent = self._model.payload(version, arrays)
            payload = bytes(encode(sent))
            decode(payload, sent.layout)  # as the server will: it would refuse what is broken
        except (Rejected, MemoryError) as exc:
            dropped = self._dropped(exc)
        if dropped is not None:
            raise dropped  # out here, because the failure's traceback may hold every tensor of a step
        self._epochs = heartbeat.status.epoch
        update = self._describe(base, trained, payload)
        self._model.keep_norm(version, arrays)
        heartbeat.update(state="uploading")
        self._turns.use(self._invitation, began_at)
        self._outbox.put(update, payload)
        log.info("%s: update %s: finished, %s", self.job.id, update.update_id, _metrics(trained))

    def _pull(self, offered: ModelVersion) -> tuple[TensorFile, Arrays]:
        """The version that is offered, and the moments that its job shares.

        Raises Transient if it is gone because this site slept since it looked.
        """
        try:
            version = self._model.pull(offered.model)
            return version, self._model.moments(offered, version)
        except (NotFound, AccessDenied) as exc:  # a site's account is not told which of the two it is
            if self._follower.look().offered != offered:
                raise Transient(
                    f"version {offered.version} is not kept any more: taking a newer one"
                ) from exc
            if isinstance(exc, NotFound):
                raise CorruptLog(
                    f"version {offered.version} is the newest, but its model is missing"
                ) from exc
            raise

    def _dropped(self, exc: Rejected | MemoryError) -> Dropped:
        """Report an attempt that came to nothing; nothing of it is sent."""
        self._report(public(exc))
        self._site.heartbeat.update(dropped=self._site.heartbeat.status.dropped + 1)
        return Dropped(f"attempt dropped ({kind_of(exc)}), another follows: {words_of(exc)}")

    def _report(self, problem: str) -> None:
        self._site.heartbeat.update(problem=problem, problem_at=datetime.now(UTC))

    def _describe(self, base: int, trained: Trained, payload: bytes) -> ClientUpdate:
        update_id = new_update_id()
        return ClientUpdate(
            update_id=update_id,
            job=self.job.id,
            site=self._site.name,
            base_version=base,
            num_examples=trained.num_examples,
            payload_kind=self.job.spec.aggregation.payload_kind,
            payload_key=update_key(self.job.id, self._site.name, update_id),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            payload_bytes=len(payload),
            metrics=dict(trained.metrics),
            transfer=Transfer(
                downloaded_bytes=self._store.take(),
                image_bytes=self._trainer.image_bytes if isinstance(self._trainer, KnowsImages) else 0,
            ),
            created_at=datetime.now(UTC),
        )

    def _progress(self, progress: Progress) -> None:
        self._site.heartbeat.update(
            step=progress.step, steps=progress.steps, epoch=self._epochs + progress.epoch
        )
        if progress.step == 0 and progress.left_out:
            self._report(
                f"bad-dataset: images that cannot be read and are left out: {progress.left_out}; "
                "the site's log names them"
            )
        if self._site.stop.is_set():
            raise Stopped
        if time.monotonic() > self._next_hint:
            self._next_hint = time.monotonic() + RESYNC_EVERY * self._site.settings.poll_s
            self._site.listen()
            if self.hinted:
                self._require_use()

    def _require_use(self) -> None:
        """Asked in the middle of training. Raises Obsolete if the update would be refused."""
        self.hinted = False
        try:
            head = self._follower.look()
        except Transient:
            return
        if head.closed is not None:
            raise Obsolete("the job closed while training for it")
        if any(line.first <= self._base <= line.last for line in head.abandoned):
            raise Obsolete(f"version {self._base} was rolled back while training from it")

    def _measuring(self, images: int, of: int) -> None:
        self._site.heartbeat.update(state="evaluating", job=self.job.id, step=images, steps=of, detail="")
        if self._site.stop.is_set():
            raise Stopped


def training_seed(plan_seed: int, site: str, base_version: int, attempt: int) -> int:
    """The same training twice gives the same update; another attempt from the same version, another order."""
    return zlib.crc32(f"{plan_seed}/{site}/{base_version}/{attempt}".encode())


def _metrics(trained: Trained) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in trained.metrics.items())
