"""The end of a job: one record that says why, then a refusal for each update that still waits."""

from __future__ import annotations

import logging

from aggregator import decide, transitions
from federation.errors import Conflict
from federation.jobs import Job
from federation.types import SERVER, Closed, Event, Head, LogRecord, Refused
from storage.jobs import save_refusal
from tasks import records
from tasks.context import Context
from tasks.tell import tell_closed, tell_refused

log = logging.getLogger("fedqueue.jobs")


def close(context: Context, job: Job, reason: str, by: str = SERVER) -> LogRecord | None:
    """Nothing is merged from here on. None: the job was closed before, and stays so for the reason that it has.

    Should the worker die in between, tend_jobs refuses what is left.
    """

    def end(newest: LogRecord) -> tuple[Event, Head] | None:
        if newest.head.closed is not None:
            return None
        return Closed(reason=reason, by=by), transitions.close(newest.head, reason)

    record = records.append(context, job.id, end)
    if record is not None:
        log.info("%s: closed: %s", job.id, reason)
        tell_closed(context, job, reason)
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
