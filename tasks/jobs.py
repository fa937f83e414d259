"""fedqueue.create_job: a job description becomes job.json and version 0.

The submitter has uploaded two tensor files, because making initial weights takes torch, which a merge worker
does not have: `initial` with every tensor of the model, and `first` with those that sites exchange (the same
file unless the norm layers stay local or frozen).
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from federation.errors import BadJob, BadPayload, NotFound
from federation.governance import Announcement
from federation.jobs import Job, JobSpec, ModelRef
from federation.points import Point, reach
from federation.types import Head, ModelVersion
from federation.wire import JobAnnounced
from storage.control import announce
from storage.jobs import load_job, save_job
from storage.models import load_model
from tasks import celery
from tasks.context import Context, current
from tasks.members import first_hold
from tasks.tell import hint

log = logging.getLogger("fedqueue.jobs")

UPDATE_SLACK_BYTES = 64 * 1024
"""An update has the size of its version, but its header may be spelt with more room."""


@celery.task(celery.CREATE_JOB)
def create_job(self: Any, spec: str, initial: str, first: str) -> None:
    """JSON of a JobSpec and two ModelRefs. Asking again with the same is harmless."""
    create(
        current(),
        JobSpec.from_json(spec, BadJob),
        ModelRef.from_json(initial, BadJob),
        ModelRef.from_json(first, BadJob),
    )


def create(context: Context, spec: JobSpec, initial: ModelRef, first: ModelRef) -> Job:
    """Raises BadJob if the files are not what they should be, or another job has this id."""
    store = context.store
    try:
        exchanged = load_model(store, first).layout
        whole = {tensor.name: tensor for tensor in load_model(store, initial).layout.tensors}
    except (NotFound, BadPayload) as exc:
        raise BadJob(f"initial model: {exc}") from exc
    for tensor in exchanged.tensors:
        if whole.get(tensor.name) != tensor:
            raise BadJob(f"tensor {tensor.name!r} of version 0 is not in the initial model")
    limit = first.nbytes + UPDATE_SLACK_BYTES
    if limit > context.settings.max_update_bytes:
        raise BadJob(f"updates of {first.nbytes} bytes exceed FEDQUEUE_MAX_UPDATE_BYTES of this server")
    job = Job(spec=spec, initial=initial, max_update_bytes=limit, created_at=datetime.now(UTC))
    if not save_job(store, job):
        existing = load_job(store, spec.id)
        if (existing.spec, existing.initial) != (spec, initial):
            raise BadJob(f"there is another job {spec.id!r}: choose another id")
        job = existing
    reach(Point.JOB_WRITTEN)
    head = Head(current=ModelVersion(version=0, model=first), hold=first_hold(job))
    record = context.log(spec.id).create(head)
    announce(store, Announcement(job=job.id, submitted_by=job.submitted_by, at=job.created_at))
    hint(context, JobAnnounced(job=job.id))
    log.info("%s: created, %d tensors, %d bytes per update", job.id, len(exchanged.tensors), first.nbytes)
    if spec.evaluation.every and record.head.version == 0:
        context.send(celery.EVALUATE, {"job": job.id, "version": "0"})
    return job
