"""fedqueue.publish_version: all pending contributions become one stored model version.

Group commit: a backlog of n updates costs one read and one write of the model, with the same result as n
publishes of one. Payloads stream through memory one at a time. Only the log record makes the new version
true; if another publish won meanwhile, this work is dropped and nobody sees its model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from aggregator import decide, transitions
from aggregator.merge import Merge
from aggregator.stopping import last_version
from federation.errors import BadPayload, Conflict, CorruptLog, NotFound
from federation.jobs import Job
from federation.points import Point, reach
from federation.types import (
    ClientUpdate,
    Contribution,
    Head,
    LogRecord,
    ModelVersion,
    Published,
    Refusal,
)
from storage.jobs import save_refusal
from storage.models import load_model, load_payload, save_model
from storage.tensors import TensorFile
from tasks import celery
from tasks.context import Context, current
from tasks.state import load_state, save_state
from tasks.tell import tell_closed, tell_published, tell_refused

log = logging.getLogger("fedqueue.publish")


@celery.task(celery.PUBLISH)
def publish_version(self: Any, job: str) -> None:
    """Publish what is pending in `job`. Asking twice is harmless."""
    context = current()
    the_job = context.job(job)
    published = publish_pending(context, the_job)
    if published is None and (self.request.delivery_info or {}).get("redelivered"):
        # An earlier delivery may have died between the record and the telling.
        record = context.log(job).head()
        if isinstance(record.event, Published):
            _after(context, the_job, record)
    reach(Point.TOLD)


@dataclass(frozen=True)
class _Folded:
    """What the heavy work came to: `current` is stored, but only a log record makes it a version."""

    merged: tuple[Contribution, ...]
    refused: tuple[Refusal, ...]
    current: ModelVersion


def publish_pending(context: Context, job: Job) -> LogRecord | None:
    """Returns the record that was appended, or None if there was nothing to publish.

    Raises Transient if the store does not answer, CorruptLog if the newest version is not in it; nothing has
    happened then.
    """
    versions = context.log(job.id)
    record = versions.head()
    base = record.head.current
    if not decide.wants_publish(job.spec, record.head):
        return None
    try:
        folded = _fold(context, job, record.head)
    except NotFound as exc:
        if versions.head().head.current == base:
            raise CorruptLog(f"{job.id}: version {base.version}: {exc}: restore it from a backup") from exc
        log.info("%s: version %d was superseded and collected meanwhile, again", job.id, base.version)
        return publish_pending(context, job)
    while True:
        event = Published(merged=folded.merged, refused=folded.refused)
        if not transitions.still_applies(record.head, event, base):
            log.info("%s: another worker published version %d first", job.id, record.head.version)
            return None
        event, head = _next(job, record.head, event, folded.current)
        try:
            record = versions.append(record, event, head)
        except Conflict:
            since, record = record, versions.head()  # only accepts came in between? then the fold still holds
            if versions.is_collected(folded.current, since.seq):
                log.warning("%s: the model was stored so long ago that it was collected, again", job.id)
                return publish_pending(context, job)
            continue
        reach(Point.PUBLISHED)
        _after(context, job, record)
        return record


def _fold(context: Context, job: Job, head: Head) -> _Folded:
    """Stream pending payloads into the model, one in memory at a time, and store the result.

    Raises NotFound if the model is not there: retention may remove it once another one has followed.
    """
    model = load_model(context.store, head.current.model)
    layout = model.layout
    flat, ints = np.array(model.flat), np.array(model.ints)  # writable; the file's bytes can go
    del model
    state = load_state(context.store, head.current.server_state)
    merge = Merge(job.spec, layout, flat, ints, version=head.version, state=state)
    sent = layout.with_moments(job.spec.plan.shared_moments)
    refused: list[Refusal] = []
    for left, contribution in zip(range(len(head.pending), 0, -1), head.pending, strict=True):
        if merge.full or merge.needed > left:
            break
        update = contribution.update
        try:
            payload = load_payload(context.store, update, sent, job.max_update_bytes)
        except BadPayload as exc:
            refused.append(_refusal(update, exc.reason, str(exc), head.version))
            continue
        merge.add(update, payload.flat, payload.ints)
        del payload
    result = merge.finish()
    if not result.merged:
        return _Folded((), tuple(refused), head.current)
    reach(Point.FOLDED)
    current_version = ModelVersion(
        version=result.version,
        model=save_model(context.store, job.id, TensorFile(layout, flat, ints), own=True),
        server_state=save_state(context.store, job, result.state),
    )
    reach(Point.MODEL_STORED)
    return _Folded(result.merged, tuple(refused), current_version)


def _next(job: Job, head: Head, event: Published, current: ModelVersion) -> tuple[Published, Head]:
    """What to append on `head`. The last version closes the job and refuses what still waits."""
    closed = last_version(job.spec.stop, current.version)
    if closed is None:
        return event, transitions.publish(job.spec, head, event, current)
    left = decide.leftovers(transitions.publish(job.spec, head, event, current, closed))
    event = Published(merged=event.merged, refused=event.refused + left)
    return event, transitions.publish(job.spec, head, event, current, closed)


def _refused(context: Context, job: Job, refusal: Refusal) -> None:
    log.warning(
        "%s: refused %s of %s: %s", job.id, refusal.update.update_id, refusal.update.site, refusal.message
    )
    save_refusal(context.store, refusal)
    tell_refused(context, refusal)


def _refusal(update: ClientUpdate, reason: str, message: str, version: int) -> Refusal:
    return Refusal(update=update, reason=reason, message=message[:2000], version=version)


def _after(context: Context, job: Job, record: LogRecord) -> None:
    """What follows from a published record. May be repeated, may be lost: the record is the truth."""
    event, head = record.event, record.head
    assert isinstance(event, Published)
    for refusal in event.refused:
        _refused(context, job, refusal)
    if event.merged:
        log.info("%s: version %d from %d updates", job.id, head.version, len(event.merged))
        if evaluation_due(job, event.merged[0].version - 1, head):
            context.send(celery.EVALUATE, {"job": job.id, "version": str(head.version)})
        tell_published(context, job, event, head)
    if head.closed:
        tell_closed(context, job, head.closed)
    elif decide.wants_publish(job.spec, head):
        context.send(celery.PUBLISH, {"job": job.id})


def evaluation_due(job: Job, previous: int, head: Head) -> bool:
    """True if the server measures the version of `head`, which followed version `previous`."""
    return job.spec.evaluation.server_due(previous, head.version, head.closed is not None)
