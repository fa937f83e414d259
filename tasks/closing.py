"""The end of a job: one record that says why, then a refusal for each update that still waits."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aggregator import decide, transitions
from federation.errors import Conflict
from federation.jobs import Job
from federation.types import SERVER, Closed, Event, Head, LogRecord, Refused
from storage.jobs import save_refusal
from tasks import celery, records
from tasks.context import Context
from tasks.publish import evaluation_due
from tasks.tell import tell_closed, tell_refused

log = logging.getLogger("fedqueue.jobs")


def close(context: Context, job: Job, reason: str, by: str = SERVER) -> LogRecord | None:
    """Nothing is merged from here on. None: the job was closed before, and stays so for the reason that it has.

    Should the worker die in between, tend_jobs refuses what is left.
    """
    return close_if(context, job, lambda head: reason, by)


def close_if(
    context: Context, job: Job, why: Callable[[Head], str | None], by: str = SERVER
) -> LogRecord | None:
    """The same if `why` has a reason, which it gives of the head that the record follows."""

    def end(newest: LogRecord) -> tuple[Event, Head] | None:
        reason = None if newest.head.closed is not None else why(newest.head)
        if reason is None:
            return None
        return Closed(reason=reason[:200], by=by), transitions.close(newest.head, reason[:200])

    record = records.append(context, job.id, end)
    if record is not None and record.head.closed is not None:
        log.info("%s: closed: %s", job.id, record.head.closed)
        tell_closed(context, job, record.head.closed)
        if evaluation_due(job, record.head.version, record.head):  # the last version is measured
            context.send(celery.EVALUATE, {"job": job.id, "version": str(record.head.version)})
    refuse_leftovers(context, job)
    return record


def refuse_leftovers(context: Context, job: Job) -> None:
    """Refuse what still waits in a closed job; nothing, while it is open."""
    versions = context.log(job.id)
    record = versions.head()
    while left := decide.leftovers(record.head):
        refusal = left[0]
        try:
            head = transitions.refuse(job.spec, record.head, refusal)
            record = versions.append(record, Refused(refusal=refusal), head)
        except Conflict:
            record = versions.head()
            continue
        log.warning("%s: refused %s, which waited in a closed job", job.id, refusal.update.update_id)
        save_refusal(context.store, refusal)
        tell_refused(context, refusal)
