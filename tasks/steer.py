"""Requests steer-job and steer-model: pause, resume, stop; promote, roll back, clear a quarantine.

Of the job's submitter and of operators. Each is one log record.
"""

from __future__ import annotations

from aggregator import decide, transitions
from federation.errors import Rejected
from federation.jobs import Job
from federation.requests import Request, SteerJob, SteerModel
from federation.types import (
    SERVER,
    Cleared,
    Event,
    Head,
    Held,
    LogRecord,
    Promoted,
    Resumed,
    RolledBack,
)
from storage.jobs import save_refusal
from storage.log import refusals
from tasks import celery, records
from tasks.closing import close
from tasks.context import Context
from tasks.tell import tell_changed, tell_refused


def owned_job(context: Context, request: Request, job_id: str) -> Job:
    """The job, if whoever asks may steer it. Raises NotFound, Rejected."""
    job = context.job(job_id)
    if request.who not in (SERVER, job.submitted_by):
        raise Rejected(
            f"job {job_id} was submitted by {job.submitted_by}: only that site or an operator may do this",
            "not-yours",
        )
    return job


def steer_job(context: Context, request: Request) -> str:
    """Raises NotFound, Rejected. Pausing what is paused, and so on, changes nothing."""
    asked = request.what
    assert isinstance(asked, SteerJob)
    job = owned_job(context, request, asked.job)
    if asked.action == "stop":
        reason = f"stopped by {request.who}" + (f": {asked.reason}" if asked.reason else "")
        close(context, job, reason[:200], request.who)
        return f"job {job.id} is closed"

    def change(newest: LogRecord) -> tuple[Event, Head] | None:
        head = newest.head
        if head.closed is not None:
            raise Rejected(f"job {job.id} is closed: {head.closed}")
        if asked.action == "resume":
            return (Resumed(by=request.who), transitions.resume(head)) if head.hold is not None else None
        reason = f"paused by {request.who}" + (f": {asked.reason}" if asked.reason else "")
        held = transitions.hold(head, reason[:200])
        return (Held(reason=reason[:200], by=request.who), held) if held != head else None

    if records.append(context, job.id, change) is None:
        return f"job {job.id} was so already"
    tell_changed(context, job)
    return f"job {job.id}: {asked.action}d"


def steer_model(context: Context, request: Request) -> str:
    """Raises NotFound, Rejected."""
    asked = request.what
    assert isinstance(asked, SteerModel)
    job = owned_job(context, request, asked.job)
    if asked.action == "promote":
        return _promote(context, job, asked.version, request.who)
    if asked.action == "clear":
        return _clear(context, job, asked.version, request.who)
    return _roll_back(context, job, asked.version, asked.reason, request.who)


def _promote(context: Context, job: Job, number: int, by: str) -> str:
    version = context.log(job.id).version(number)
    context.store.size(version.model.key)  # NotFound if retention has removed it

    def promote(newest: LogRecord) -> tuple[Event, Head] | None:
        if newest.head.stable == version:
            return None
        return Promoted(version=number, by=by), transitions.promote(newest.head, version)

    if records.append(context, job.id, promote) is None:
        return f"version {number} of {job.id} was stable already"
    tell_changed(context, job)
    return f"version {number} of {job.id} is stable now"


def _clear(context: Context, job: Job, number: int, by: str) -> str:
    def clear(newest: LogRecord) -> tuple[Event, Head] | None:
        quarantine = newest.head.quarantine
        if quarantine is None or quarantine.version != number:
            at_all = "no version" if quarantine is None else f"version {quarantine.version}"
            raise Rejected(f"version {number} of {job.id} is not in quarantine; {at_all} is")
        return Cleared(version=number, by=by), transitions.clear(newest.head)

    record = records.append(context, job.id, clear)
    assert record is not None
    tell_changed(context, job)
    _ask_for_publish(context, job, record)
    return f"version {number} of {job.id} is out of quarantine"


def _roll_back(context: Context, job: Job, number: int, reason: str, by: str) -> str:
    version = context.log(job.id).version(number)
    context.store.size(version.model.key)  # NotFound if retention has removed it

    def roll_back(newest: LogRecord) -> tuple[Event, Head] | None:
        head = newest.head
        if head.closed is not None:
            raise Rejected(f"job {job.id} is closed ({head.closed}): it makes no version any more")
        if number >= head.version:
            raise Rejected(f"version {number} is not older than the newest, {head.version}")
        if isinstance(newest.event, RolledBack) and newest.event.to == number:
            return None  # this very request, delivered again
        refused = decide.stranded(head, number)
        event = RolledBack(to=number, reason=reason, by=by, refused=refused)
        return event, transitions.roll_back(job.spec, head, version, refused)

    record = records.append(context, job.id, roll_back)
    if record is None:
        return f"{job.id} was rolled back to version {number} already"
    for refusal in refusals(record.event):
        save_refusal(context.store, refusal)
        tell_refused(context, refusal)
    tell_changed(context, job)
    _ask_for_publish(context, job, record)
    return f"version {record.head.version} of {job.id} is version {number} again"


def _ask_for_publish(context: Context, job: Job, record: LogRecord) -> None:
    if decide.wants_publish(job.spec, record.head):
        context.send(celery.PUBLISH, {"job": job.id})
