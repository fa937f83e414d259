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
from federation.points import Point, reach
from federation.types import Accepted, ClientUpdate, Head, LogRecord, Refusal, Refused
from storage.jobs import save_refusal
from storage.log import refusals
from tasks import celery
from tasks.context import Context, current
from tasks.deadletters import keep_update
from tasks.publish import publish_pending
from tasks.tell import tell_refused

log = logging.getLogger("fedqueue.accept")

ASK_AGAIN_EVERY = 16
"""Pending updates."""


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
    if _asks(job, record.head, head):
        context.send(celery.PUBLISH, {"job": job.id})
        reach(Point.PUBLISH_ASKED)


def _asks(job: Job, before: Head, head: Head) -> bool:
    """True if this update has to ask for a publish: the first that makes one wanted, for the publish looks
    again when it ends; a duplicate, whose first delivery may have died before it asked; and now and then one
    more, because a request can be lost with the broker's disk."""
    if not decide.wants_publish(job.spec, head):
        return False
    first = not decide.wants_publish(job.spec, before)
    return first or head is before or len(head.pending) % ASK_AGAIN_EVERY == 0


def _is_full(job: Job, head: Head) -> bool:
    """Every record carries the pending ones whole: unbounded, a backlog of n would write n² of them."""
    return len(head.pending) >= job.spec.aggregation.max_pending and decide.wants_publish(job.spec, head)


def _decide_and_append(context: Context, job: Job, record: LogRecord, update: ClientUpdate) -> Head:
    """Returns the head that holds the decision. Raises Conflict."""
    versions = context.log(job.id)
    decision = decide.decide(job, record.head, update)
    if isinstance(decision, decide.Duplicate):
        log.info("%s: %s of %s is a duplicate", job.id, update.update_id, update.site)
        if decision.reason is not None:
            _after_refusal(context, versions.find(update.update_id), update)
        return record.head
    if decision.maybe_forgotten and (known := versions.find(update.update_id)) is not None:
        log.info("%s: %s of %s is a late duplicate", job.id, update.update_id, update.site)
        _after_refusal(context, known, update)
        return record.head
    if isinstance(decision, decide.Accept):
        refusal = _missing_payload(context, record.head, update)
        if refusal is None:
            accepted = decision.contribution
            event = Accepted(contribution=accepted)
            head = versions.append(record, event, transitions.accept(record.head, accepted)).head
            log.info(
                "%s: accepted %s of %s, base %d, staleness %d, weight %.4f",
                *(job.id, update.update_id, update.site, update.base_version),
                *(accepted.staleness, accepted.weight),
            )
            reach(Point.ACCEPTED)
            return head
    else:
        refusal = decision.refusal
    head = transitions.refuse(job.spec, record.head, refusal)
    appended = versions.append(record, Refused(refusal=refusal), head)
    log.warning("%s: refused %s of %s: %s", job.id, update.update_id, update.site, refusal.message)
    reach(Point.REFUSED)
    _after_refusal(context, appended, update)
    return appended.head


def _after_refusal(context: Context, record: LogRecord | None, update: ClientUpdate) -> None:
    """What follows from a refusal in the log. Repeated when the update is delivered again: the worker that
    recorded it may have died before this."""
    for refusal in refusals(record.event) if record else ():
        if refusal.update.update_id == update.update_id:
            save_refusal(context.store, refusal)
            tell_refused(context, refusal)


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
