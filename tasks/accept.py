"""fedqueue.accept_update: one client update becomes one log record, exactly once.

Decide purely (`aggregator.decide`), append by compare-and-swap, and on a conflict decide again on the new
head. The record is the only effect that counts; what follows it (asking for a publish, telling the site) may
happen twice or be lost.
"""

from __future__ import annotations

import logging
from typing import Any

from aggregator import decide, transitions
from federation.errors import Conflict, NotFound
from federation.jobs import Job
from federation.types import Accepted, ClientUpdate, Head, LogRecord, Refusal, Refused
from storage.jobs import save_refusal
from tasks import celery
from tasks.context import Context, current
from tasks.deadletters import keep_update
from tasks.publish import publish_pending
from tasks.tell import tell_refused

log = logging.getLogger("fedqueue.accept")


@celery.task(celery.ACCEPT)
def accept_update(self: Any, update: str) -> None:
    """`update`: a ClientUpdate as JSON, checked by the ingress."""
    accept(current(), ClientUpdate.from_json(update))


def accept(context: Context, update: ClientUpdate) -> None:
    """Bring `update` into the log, or its refusal. Raises Transient if the store does not answer."""
    try:
        job = context.job(update.job)
    except NotFound:
        keep_update(context.store, update, "unknown-job", f"there is no job {update.job!r}")
        return
    while True:
        record = context.log(job.id).head()
        if _is_full(job, record.head):
            publish_pending(context, job)
            continue
        try:
            head = _decide_and_append(context, job, record, update)
        except Conflict:
            continue  # somebody else's record came first; it may change the decision
        break
    if decide.wants_publish(job.spec, head):
        context.send(celery.PUBLISH, {"job": job.id})


def _is_full(job: Job, head: Head) -> bool:
    """Every record carries the pending ones whole: unbounded, a backlog of n would write n² of them."""
    return len(head.pending) >= job.spec.aggregation.max_pending and decide.wants_publish(job.spec, head)


def _decide_and_append(context: Context, job: Job, record: LogRecord, update: ClientUpdate) -> Head:
    """Returns the head that holds the decision. Raises Conflict."""
    versions = context.log(job.id)
    decision = decide.decide(job, record.head, update)
    if isinstance(decision, decide.Accept):
        refusal = _missing_payload(context, record.head, update)
        if refusal is None:
            event = Accepted(contribution=decision.contribution)
            head = transitions.accept(record.head, decision.contribution)
            log.info(
                "%s: accepted %s of %s, base %d, staleness %d, weight %.4f",
                *(job.id, update.update_id, update.site, update.base_version),
                *(decision.contribution.staleness, decision.contribution.weight),
            )
            return versions.append(record, event, head).head
    elif isinstance(decision, decide.Duplicate):
        log.info("%s: %s of %s is a duplicate", job.id, update.update_id, update.site)
        return record.head
    else:
        refusal = decision.refusal
        # The ids of updates as old as this one may be forgotten, so only the whole log knows if it was merged.
        forgotten = isinstance(decision, decide.TooStale) and decision.maybe_forgotten
        if forgotten and versions.find(update.update_id) is not None:
            log.info("%s: %s of %s is a late duplicate", job.id, update.update_id, update.site)
            return record.head
    head = versions.append(record, Refused(refusal=refusal), transitions.refuse(record.head, refusal)).head
    log.warning("%s: refused %s of %s: %s", job.id, update.update_id, update.site, refusal.message)
    save_refusal(context.store, refusal)
    tell_refused(context, refusal)
    return head


def _missing_payload(context: Context, head: Head, update: ClientUpdate) -> Refusal | None:
    """Sites upload before they publish, so a payload that is not there now never was."""
    try:
        size = context.store.size(update.payload_key)
    except NotFound:
        reason, message = "missing-payload", f"no object {update.payload_key}: upload it before publishing"
    else:
        if size == update.payload_bytes:
            return None
        reason, message = "wrong-size", f"the object has {size} bytes, declared {update.payload_bytes}"
    return Refusal(update=update, reason=reason, message=message, version=head.version)
