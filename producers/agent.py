"""The site agent: it learns of jobs, answers them, and works for those that it has joined. docs/architecture.md.

Each turn of its loop takes in what the server said, looks for jobs, delivers and reads the log for each job that is
due, and then lets one job train: the one whose turn it is (fairness.py) among those that may. Control messages bring
looks forward and nothing depends on them: without one, jobs and logs are looked at every RESYNC_EVERY polls.

The agent holds no connection while it trains: each publish opens one and closes it, because a connection that
is silent for the length of a training run is dead at its end without saying so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from broker import topology
from broker.port import Broker
from detection.gpu import gpu_figures
from federation.errors import (
    BadJob,
    BadMessage,
    FedqueueError,
    NotFound,
    Rejected,
    Transient,
)
from federation.jobs import Job
from federation.requests import DeclineJob, JoinJob
from federation.settings import Settings
from federation.wire import Answered, Control, JobAnnounced, ReleaseProposed, decode_control
from producers.backoff import Backoff
from producers.fairness import FairShare
from producers.heartbeat import Heartbeat
from producers.machine import MachineGauge, load_per_core
from producers.membership import Membership
from producers.outbox import Outbox
from producers.policy import Declined, Policy
from producers.problems import public_refusal
from producers.site_key import site_key
from producers.trainer import Trainer, TrainerFactory
from producers.work import RESYNC_EVERY, Dropped, JobWork, Obsolete, Site, Stopped
from storage.blob import BlobStore
from storage.control import announced
from storage.jobs import load_job
from storage.log import VersionLog

log = logging.getLogger("fedqueue.site")

MAX_DETAIL = 200


@dataclass
class _Entry:
    """A job that this site knows of. Times are of the monotonic clock.

    `access`, `training`: failures in a row to reach it, and to train for it; `trouble`: the last of them, in words.
    `refusal`: why this site takes no part. `over`: there is nothing to do for it any more.
    """

    job_id: str
    access: Backoff
    training: Backoff
    not_before: float = 0.0
    look_at: float = 0.0
    membership: Membership | None = None
    work: JobWork | None = None
    refusal: Rejected | None = None
    trouble: str = ""
    over: bool = False

    @property
    def due_at(self) -> float:
        return max(self.not_before, self.look_at)


@dataclass
class _Jobs:
    """By id, in the order in which the site learnt of them."""

    limit_s: float
    entries: dict[str, _Entry] = field(default_factory=dict)

    def add(self, job_id: str) -> None:
        if job_id not in self.entries:
            self.entries[job_id] = _Entry(job_id, Backoff(self.limit_s), Backoff(self.limit_s))

    def open(self) -> Iterator[_Entry]:
        return (entry for entry in list(self.entries.values()) if not entry.over)

    def works(self) -> list[JobWork]:
        return [entry.work for entry in self.open() if entry.work is not None]


class SiteAgent:
    """One site, until `stop` is set; with named jobs, until they are over."""

    def __init__(
        self,
        settings: Settings,
        jobs: Sequence[str],
        store: BlobStore,
        connect: Callable[[], Broker],
        trainer_for: TrainerFactory,
        stop: threading.Event,
        agent_version: str = "",
        classes: Collection[str] | None = None,
    ) -> None:
        """`jobs`: these and no others; none: all that fit the site's policy. `classes`: those that its data hold;
        None: not known."""
        assert settings.site is not None
        self.site = settings.site
        self._settings, self._store, self._stop, self._trainer_for = settings, store, stop, trainer_for
        self._named = tuple(jobs)
        self._policy = Policy.from_settings(settings, classes)
        self._broker = connect()
        gauge = MachineGauge(partial(gpu_figures, settings.device))
        self._heartbeat = Heartbeat(
            self.site, connect, settings.heartbeat_s, settings.heartbeat_ttl_s, gauge.read
        )
        self._heartbeat.update(
            job=self._named[0] if len(self._named) == 1 else None, agent_version=agent_version
        )
        self._shared = Site(self.site, settings, store, self._broker, self._heartbeat, stop, self._listen)
        self._jobs = _Jobs(settings.backoff_limit_s)
        for job_id in self._named:
            self._jobs.add(job_id)
        self._fair = FairShare()
        self._confirmed = 0
        self._announced_at = 0.0
        self._listening, self._looking = Backoff(settings.backoff_limit_s), Backoff(settings.backoff_limit_s)
        self._deaf_until = 0.0

    def run(self) -> None:
        """Raises Fatal if this site cannot take part (credentials, settings); if it takes part in none of the jobs
        that were named, the reason of the first, such as BadDataset for its data."""
        with self._heartbeat:
            try:
                while not self._stop.is_set() and not self._is_over():
                    self._turn()
            except Stopped:
                log.info("told to stop in the middle of something, which is dropped")
            finally:
                self._broker.close()
        refusals = [entry.refusal for entry in self._jobs.entries.values() if entry.refusal is not None]
        if self._named and len(refusals) == len(self._named):
            raise refusals[0]

    def _is_over(self) -> bool:
        return bool(self._named) and not any(True for _ in self._jobs.open())

    def _turn(self) -> None:
        self._listen()
        self._look_for_jobs()
        not_now = self._policy.not_now(datetime.now().time(), load_per_core())
        for entry in self._jobs.open():
            if entry.due_at <= time.monotonic():
                self._persist(entry, entry.access, partial(self._tend, entry, not_now is None))
        chosen = self._choose() if not_now is None else None
        if chosen is not None:
            self._train(chosen)
        else:
            self._wait(not_now)

    # --- jobs ----------------------------------------------------------------------------------------------

    def _look_for_jobs(self) -> None:
        if self._named or time.monotonic() < self._announced_at:
            return
        try:
            for job_id in announced(self._store):
                self._jobs.add(job_id)
        except Transient as exc:
            seconds = self._looking.next_s()
            log.warning("looking for jobs: waiting %.1f s: %s", seconds, exc)
            self._announced_at = time.monotonic() + seconds
        else:
            self._looking.reset()
            self._announced_at = self._later()

    def _tend(self, entry: _Entry, compute: bool) -> None:
        """Everything for one job but training."""
        if entry.work is None and entry.refusal is None:
            self._begin(entry)
        if entry.membership is not None:
            entry.membership.tend()
            if entry.membership.refused and entry.work is not None:
                entry.work.barred = f"the server refused this site: {entry.membership.refused}"
        if entry.work is not None:
            self._count_outbox()
            entry.work.tend(compute)
            self._count_outbox()
        entry.look_at = self._later()
        self._conclude(entry)

    def _conclude(self, entry: _Entry) -> None:
        if entry.work is not None and not entry.work.is_over:
            return
        if entry.refusal is not None and entry.membership is not None and not self._named:
            entry.over = entry.membership.settled
        else:
            entry.over = True
        if entry.over and entry.work is not None:
            if entry.work.closed is not None:
                log.info("%s: the job is closed: %s", entry.job_id, entry.work.closed)
            self._confirmed += entry.work.confirmed
            entry.work = None
            self._fair.forget(entry.job_id)

    def _begin(self, entry: _Entry) -> None:
        """Find out whether the job is ours, join or decline, and prepare to work."""
        try:
            job = load_job(self._store, entry.job_id)
            head = VersionLog(self._store, entry.job_id).head().head
        except NotFound as exc:
            raise Transient(f"job {entry.job_id!r} does not exist yet") from exc
        if job.spec.participants is not None and self.site not in job.spec.participants:
            entry.refusal = BadJob(f"job {job.id} names its participants, and {self.site} is none of them")
            return
        if head.closed is not None and not self._named:
            entry.work = self._leftovers(job)
            return
        try:
            trainer = self._prepare(job)
        except Rejected as exc:
            log.warning("%s: declined: %s", job.id, exc)
            entry.refusal, entry.work = exc, None if self._named else self._leftovers(job)
            if head.closed is None:
                entry.membership = self._answer(DeclineJob(job=job.id, reason=public_refusal(exc)))
            return
        entry.work = JobWork(self._shared, job, trainer)
        if head.closed is None:
            entry.membership = self._answer(self._joining(job, trainer))

    def _prepare(self, job: Job) -> Trainer:
        """Raises Rejected: this site takes no part in the job."""
        objection = self._policy.objection(job)
        if objection is not None:
            raise Declined(objection)
        trainer = self._trainer_for(job.spec)
        trainer.prepare(job.spec)
        return trainer

    def _joining(self, job: Job, trainer: Trainer) -> JoinJob:
        """What this site says when it joins."""
        key = site_key(self._settings.site_state).public_key
        return JoinJob(job=job.id, num_images=trainer.num_images, public_key=key)

    def _answer(self, what: JoinJob | DeclineJob) -> Membership:
        return Membership(self.site, what, self._store, self._broker)

    def _leftovers(self, job: Job) -> JobWork | None:
        """Work without training, if an earlier run has left something to deliver or to hear of."""
        folder = self._shared.folder(job.id)
        if not folder.exists():
            return None
        outbox = Outbox(folder)
        left = bool(outbox.sent()) or any(True for _ in outbox.waiting())
        return JobWork(self._shared, job, None) if left else None

    # --- training ------------------------------------------------------------------------------------------

    def _choose(self) -> _Entry | None:
        now = time.monotonic()
        may = {
            entry.job_id: entry
            for entry in self._jobs.open()
            if entry.not_before <= now and entry.work is not None and entry.work.idle_because() is None
        }
        chosen = self._fair.pick(may)
        return None if chosen is None else may[chosen]

    def _train(self, entry: _Entry) -> None:
        work = entry.work
        assert work is not None
        began = time.monotonic()
        try:
            self._persist(entry, entry.training, work.train)
        finally:
            self._fair.charge(entry.job_id, time.monotonic() - began)
        for other in self._jobs.open():
            other.look_at = 0.0

    def _count_outbox(self) -> None:
        works = self._jobs.works()
        self._heartbeat.update(
            outbox=sum(work.waiting for work in works),
            updates=self._confirmed + sum(work.confirmed for work in works),
        )

    def _persist(self, entry: _Entry, backoff: Backoff, action: Callable[[], None]) -> None:
        """Take a step for a job. An outage is waited out, saying in one line what for; other jobs go on meanwhile."""
        try:
            action()
        except Obsolete as exc:
            log.info("%s: %s: this attempt is dropped", entry.job_id, exc)
            return
        except Stopped:
            raise
        except Transient as exc:
            seconds = backoff.next_s()
            log.warning("%s: waiting %.1f s: %s", entry.job_id, seconds, exc)
            entry.trouble = "before another attempt" if isinstance(exc, Dropped) else str(exc)
        except FedqueueError as exc:
            if len(self._named) == 1:
                raise
            seconds = backoff.next_s()
            log.error("%s: waiting %.1f s: %s: %s", entry.job_id, seconds, type(exc).__name__, exc)
            entry.trouble = f"{type(exc).__name__}; the site's log says more"
            self._heartbeat.update(problem=f"{entry.job_id}: {entry.trouble}", problem_at=datetime.now(UTC))
        else:
            backoff.reset()
            entry.trouble = ""
            return
        entry.not_before = time.monotonic() + seconds

    # --- waiting -------------------------------------------------------------------------------------------

    def _wait(self, not_now: str | None) -> None:
        """Until the next poll, or before if a job is due."""
        reasons = {
            entry.job_id: entry.trouble or (entry.work and entry.work.idle_because()) or not_now or ""
            for entry in self._jobs.open()
            if entry.work is not None or entry.trouble
        }
        self._heartbeat.update(step=0, steps=0)
        if len(reasons) == 1:
            ((job, detail),) = reasons.items()
            self._heartbeat.update(state="waiting", job=job, detail=detail[:MAX_DETAIL])
        elif reasons:
            detail = "; ".join(f"{job}: {why}" for job, why in reasons.items())
            self._heartbeat.update(state="waiting", job=None, base_version=None, detail=detail[:MAX_DETAIL])
        else:
            self._heartbeat.update(state="idle", job=None, base_version=None, detail="for a job")
        due_at = [entry.due_at for entry in self._jobs.open()]
        if not self._named:
            due_at.append(self._announced_at)
        until_due = min(due_at, default=0.0) - time.monotonic()
        self._stop.wait(max(0.0, min(self._settings.poll_s, until_due)))

    def _listen(self) -> None:
        """Take in what the server said. That it cannot be heard just now delays looks, and nothing else."""
        if time.monotonic() < self._deaf_until:
            return
        try:
            deliveries = self._broker.drain(topology.control_queue(self.site))
        except Transient as exc:
            seconds = self._listening.next_s()
            log.warning("waiting %.1f s to hear the server: %s", seconds, exc)
            self._deaf_until = time.monotonic() + seconds
            return
        self._listening.reset()
        for delivery in deliveries:
            try:
                self._hear(decode_control(delivery))
            except BadMessage as exc:
                log.warning("control message dropped: %s", exc)

    def _hear(self, control: Control) -> None:
        """A hint: bring the look forward that it is about."""
        if isinstance(control, Answered):
            for entry in self._jobs.open():
                if entry.membership is not None and entry.membership.request_id == control.request_id:
                    entry.look_at = 0.0
            return
        if isinstance(control, ReleaseProposed):
            log.info(
                "%s: version %d is proposed for release; whoever decides here: `fedqueue release show %s %d`",
                *(control.job, control.version) * 2,
            )
            return
        if isinstance(control, JobAnnounced):
            self._announced_at = 0.0
        known = self._jobs.entries.get(control.job)
        if known is not None:
            known.look_at = 0.0
            if known.work is not None:
                known.work.hinted = True

    def _later(self) -> float:
        return time.monotonic() + RESYNC_EVERY * self._settings.poll_s
