"""fedqueue.oversee_jobs: what a job needs by the clock. The ingress asks for it every `oversee_every_s`.

enough sites have joined          tasks/members.py: it starts
its deadline has passed           tasks/judge.py: it closes; likewise for a measurement whose worker died
it chooses who trains             tasks/invite.py: as many sites as it wants are invited
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from federation.errors import FedqueueError, NotFound, Transient
from federation.jobs import Job
from federation.types import LogRecord
from storage.control import announced
from tasks import celery, invite, members
from tasks.context import Context, current
from tasks.judge import goes_by_measurements, judge, judge_by_clock

log = logging.getLogger("fedqueue.oversee")

JUDGE_EVERY_S = 60.0
"""A measurement is judged when it is stored; what a worker that died did not judge may wait so long. It takes a
listing of all that was measured."""
PAUSE = 3.0
"""In `oversee_every_s`: whoever has not looked for so long may not have been the only worker."""


@dataclass
class Memory:
    """What one thread knows of the jobs, so that a look asks little of the store. Times are monotonic.

    `closed`: jobs that need no looking at any more. `judge_at`: when measurements are due to be judged again.
    """

    closed: set[str] = field(default_factory=set)
    judge_at: dict[str, float] = field(default_factory=dict)
    last: float = float("-inf")


@dataclass
class _Here(threading.local):
    """Of this thread, while it works with `context`."""

    context: Context | None = None
    memory: Memory = field(default_factory=Memory)


_here = _Here()


@celery.task(celery.OVERSEE_JOBS)
def oversee_jobs(self: Any) -> None:
    """Look at every open job. Asking twice is harmless, and soon after another time does nothing."""
    context = current()
    if _here.context is not context:
        _here.context, _here.memory = context, Memory()
    # workers that were away find many of these messages waiting
    if time.monotonic() - _here.memory.last < context.settings.oversee_every_s / 2:
        return
    oversee(context, _here.memory)


def oversee(context: Context, memory: Memory) -> None:
    """Look at each job that was not closed before. A job that fails delays no other.

    One listing tells the jobs, one each what is new in its log. Nothing else is asked for a job that is as it was, but
    who has joined, if it waits for that or invites.
    """
    if time.monotonic() - memory.last > PAUSE * context.settings.oversee_every_s:
        context.forget_members()
    for job_id in announced(context.store):
        if job_id in memory.closed:
            continue
        try:
            _look(context, context.job(job_id), memory)
        except (NotFound, Transient) as exc:
            log.info("%s: not overseen: %s", job_id, exc)
        except FedqueueError as exc:
            log.error("%s: not overseen: %s: %s", job_id, type(exc).__name__, exc)
    memory.last = time.monotonic()


def _look(context: Context, job: Job, memory: Memory) -> None:
    """The steps, each harmless to repeat. What one of them appends to the log, the next one goes by."""
    versions = context.log(job.id)

    def newest() -> LogRecord:
        return versions.seen or versions.head()

    versions.head()
    if newest().head.closed is None:
        members.start(context, job, newest())
        if goes_by_measurements(job) and time.monotonic() >= memory.judge_at.get(job.id, 0.0):
            judge(context, job)
            memory.judge_at[job.id] = time.monotonic() + JUDGE_EVERY_S
        else:
            judge_by_clock(context, job, newest())
        invite.invite(context, job, newest())
    if newest().head.closed is not None:
        memory.closed.add(job.id)
