"""fedqueue.tend_jobs: what has to be looked at now and then. The ingress asks for it every `gc_every_s`.

    a publish that is due is asked for again      the request for it may have gone with a broker's disk
    what still waits in a closed job is refused   so that it has an end, too
    a refusal that only the log knows is told     whoever recorded it may have died before it told anybody
    an evaluation that is due is asked for again  likewise
    a release whose rule is met, too              likewise
    what is needed no more is removed             storage/retention.py and leftovers.py say what and how

A run takes a small share of the time limit, because merging waits for it: what is left then is for the next run.
The jobs come in another order each time, so that one with much to do delays no other for ever.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from aggregator import decide, transitions
from federation.errors import FedqueueError, NotFound, Transient
from federation.governance import Announcement
from federation.jobs import Job
from federation.keys import rejected_prefix
from federation.settings import Settings
from federation.types import SERVER
from storage.control import announce
from storage.jobs import list_jobs, load_evaluation, save_refusal
from storage.leftovers import leftovers
from storage.log import refusals
from storage.retention import History, Policy, Retention
from tasks import celery
from tasks.closing import refuse_leftovers
from tasks.context import Context, current
from tasks.judge import judge
from tasks.publish import evaluation_due
from tasks.release import ask_for_bundles
from tasks.tell import tell_refused

log = logging.getLogger("fedqueue.retention")

RUN_SHARE = 0.02
"""Of the soft time limit: with the default settings 11 s."""

REST = 9
"""Times the length of a run, for which a worker runs it no more: asked by many ingresses, or more often than it can
be done, it would do nothing else."""


@dataclass
class _Memory:
    """Of this thread, while it works with `context`."""

    context: Context
    retentions: dict[str, Retention] = field(default_factory=dict)
    """What was read of the logs, so that a run reads only what is new."""
    rest_until: float = 0.0
    """Monotonic time."""


_here = threading.local()


@celery.task(celery.TEND_JOBS)
def tend_jobs(self: Any) -> None:
    """Tend every job. Asking twice is harmless."""
    context = current()
    memory: _Memory | None = getattr(_here, "memory", None)
    if memory is None or memory.context is not context:
        memory = _here.memory = _Memory(context)
    start = time.monotonic()
    if start < memory.rest_until:
        return
    deadline = start + RUN_SHARE * float(celery.app.conf.task_soft_time_limit)
    tend(context, memory.retentions, lambda: time.monotonic() > deadline)
    end = time.monotonic()
    memory.rest_until = end + REST * (end - start)


def policy(settings: Settings, job: Job) -> Policy:
    """How long the objects of `job` stay."""
    return Policy(
        grace=timedelta(seconds=settings.gc_grace_s),
        keep_versions=settings.keep_versions,
        too_stale=partial(transitions.is_forgettable, job.spec),
        due=partial(evaluation_due, job),
    )


def tend(context: Context, retentions: dict[str, Retention], stop: Callable[[], bool]) -> None:
    """Tend each job until `stop()`. A job that cannot be tended is logged, and the others are.

    Raises the last Transient at the end, if there was one: doing all of it again is harmless.
    """
    transient: Transient | None = None
    jobs = list_jobs(context.store)
    random.shuffle(jobs)
    for job_id in jobs:
        try:
            job = context.job(job_id)
            _mend(context, job)
            if not stop():
                _collect(context, job, retentions, stop)
        except NotFound as exc:
            log.info("%s: not tended, it is not wholly created: %s", job_id, exc)
        except Transient as exc:
            log.warning("%s: not tended: %s", job_id, exc)
            transient = exc
        except FedqueueError as exc:
            log.error("%s: not tended: %s: %s", job_id, type(exc).__name__, exc)
    try:
        _remove_leftovers(context, stop)
    except Transient as exc:
        log.warning("leftovers not removed: %s", exc)
        transient = exc
    if transient is not None:
        raise transient


def _remove_leftovers(context: Context, stop: Callable[[], bool]) -> None:
    gone = 0
    for item in leftovers(context.store, timedelta(seconds=context.settings.gc_grace_s), stop):
        context.store.delete(item.key)
        gone += 1
    if gone:
        log.info("removed %d answers and uploads of long ago", gone)


def _mend(context: Context, job: Job) -> None:
    """Nothing may wait for something that never comes."""
    announce(
        context.store, Announcement(job=job.id, submitted_by=job.submitted_by, at=job.created_at)
    )  # a worker may have died before it did, and releases before this one did not
    if decide.wants_publish(job.spec, context.log(job.id).head().head):
        context.send(celery.PUBLISH, {"job": job.id})
    refuse_leftovers(context, job)
    judge(context, job)  # of a closed job, too: its last version may fail the gate
    ask_for_bundles(context, job)


def _collect(context: Context, job: Job, retentions: dict[str, Retention], stop: Callable[[], bool]) -> None:
    if job.id not in retentions:
        retentions[job.id] = Retention(context.store, context.log(job.id), job, policy(context.settings, job))
    retention = retentions[job.id]
    gone = retention.collect(stop)
    if gone:
        log.info(
            "%s: removed %d objects, %.1f MB", job.id, len(gone), sum(item.nbytes for item in gone) / 1e6
        )
    _keep_refusals(context, job, retention.history.refused, stop)
    _ask_for_evaluation(context, job, retention.history)


def _ask_for_evaluation(context: Context, job: Job, history: History) -> None:
    """Of the newest version that is due for one: an older one is overtaken."""
    due = next((stored.version for stored in reversed(history.versions) if stored.due), None)
    if due is not None and load_evaluation(context.store, job.id, due, SERVER) is None:
        context.send(celery.EVALUATE, {"job": job.id, "version": str(due)})


def _keep_refusals(
    context: Context, job: Job, refused: Mapping[bytes, int], stop: Callable[[], bool]
) -> None:
    """Write and tell what the log refuses and a worker died before it had written and told.

    refused: update id -> the record that refuses it.
    """
    written = {key.rpartition("/")[2] for key in context.store.list(rejected_prefix(job.id))}
    untold = {
        seq for update_id, seq in refused.items() if f"{uuid.UUID(bytes=update_id)}.json" not in written
    }
    for seq in sorted(untold):
        if stop():
            return
        record = next(context.log(job.id).history(seq))
        for refusal in refusals(record.event):
            save_refusal(context.store, refusal)
            tell_refused(context, refusal)
