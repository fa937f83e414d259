"""fedqueue.oversee_jobs: what a job needs by the clock. The ingress asks for it every `oversee_every_s`.

enough sites have joined          tasks/members.py: it starts
it chooses who trains             tasks/invite.py: as many sites as it wants are invited
its deadline has passed           tasks/judge.py: it closes; likewise for a measurement whose worker died
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from federation.errors import FedqueueError, NotFound, Transient
from federation.jobs import Job
from federation.types import Head
from storage.control import announced
from tasks import celery, invite, members
from tasks.context import Context, current
from tasks.judge import judge

log = logging.getLogger("fedqueue.oversee")

Step = Callable[[Context, Job, Head], None]
STEPS: tuple[Step, ...] = (
    lambda context, job, head: members.start(context, job),
    lambda context, job, head: judge(context, job),
    invite.invite,
)
"""Each gets an open job and its newest head, and must be harmless to repeat."""


@dataclass
class _Memory:
    """Of this thread, while it works with `context`."""

    context: Context
    closed: set[str] = field(default_factory=set)
    """Jobs that need no looking at any more."""
    last: float = float("-inf")
    """Monotonic time."""


_here = threading.local()


@celery.task(celery.OVERSEE_JOBS)
def oversee_jobs(self: Any) -> None:
    """Look at every open job. Asking twice is harmless, and soon after another time does nothing."""
    context = current()
    memory: _Memory | None = getattr(_here, "memory", None)
    if memory is None or memory.context is not context:
        memory = _here.memory = _Memory(context)
    # workers that were away find many of these messages waiting
    if time.monotonic() - memory.last < context.settings.oversee_every_s / 2:
        return
    oversee(context, memory.closed)
    memory.last = time.monotonic()


def oversee(context: Context, closed: set[str]) -> None:
    """Look at each job that is not among `closed`, and add those that are. A job that fails delays no other."""
    for job_id in announced(context.store):
        if job_id in closed:
            continue
        try:
            job = context.job(job_id)
            head = context.log(job_id).head().head
            if head.closed is not None:
                closed.add(job_id)
                continue
            for step in STEPS:
                step(context, job, head)
        except (NotFound, Transient) as exc:
            log.info("%s: not overseen: %s", job_id, exc)
        except FedqueueError as exc:
            log.error("%s: not overseen: %s: %s", job_id, type(exc).__name__, exc)
