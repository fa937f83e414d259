"""Requests steer-job and steer-model: pause, resume, stop; promote, roll back, clear a quarantine.

Of the job's submitter and of operators. Each is one log record.
"""

from __future__ import annotations

from aggregator import decide, transitions
from aggregator.stopping import last_version
from federation.errors import Rejected
from federation.jobs import Job
from federation.requests import Request, SteerJob, SteerModel
from federation.types import (
    SERVER,
    Cleared,
    Collected,
    Event,
    Head,
    Held,
    LogRecord,
    ModelVersion,
    Promoted,
    Resumed,
    RolledBack,
)
from storage.jobs import save_refusal
from storage.log import refusals
from tasks import celery, records
from tasks.closing import close
from tasks.context import Context
from tasks.publish import evaluation_due
from tasks.tell import tell_changed, tell_closed, tell_refused


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
        return _promote(context, job, asked.version, request)
    if asked.action == "clear":
        return _clear(context, job, asked.version, request.who)
    return _roll_back(context, job, asked.version, asked.reason, request)


class _Kept:
    """A version that a record may name, because its model stays: nothing since it was made has taken it.

    `done`: the record that was made for `request`, which is delivered again.
    """

    done: LogRecord | None

    def __init__(self, context: Context, job: Job, number: int, request: Request) -> None:
        """Raises NotFound if it was never stored."""
        self._log, self._job_id, self._request = context.log(job.id), job.id, request
        self.version = self._log.version(number)
        self._seen = self._log.first_at(number).seq
        self._is_gone, self.done = False, None

    def look(self) -> None:
        """At what is new. To be called for each record that is to be appended, before it is decided on."""
        refs = (self.version.model, self.version.server_state)
        keys = {ref.key for ref in refs if ref is not None}
        for record in self._log.history(self._seen + 1):
            event = record.event
            self._is_gone |= isinstance(event, Collected) and not keys.isdisjoint(event.keys)
            if isinstance(event, RolledBack) and event.request_id == self._request.request_id:
                self.done = record
            self._seen = record.seq

    def require(self) -> ModelVersion:
        """Raises Rejected if it has gone."""
        if self._is_gone:
            number, job_id = self.version.version, self._job_id
            raise Rejected(
                f"version {number} of {job_id} is not kept any more: `fedqueue replay {job_id} --to {number} "
                f"--out FILE` makes its file again; `fedqueue model list {job_id}` shows what is kept"
            )
        return self.version


def _promote(context: Context, job: Job, number: int, request: Request) -> str:
    kept = _Kept(context, job, number, request)

    def promote(newest: LogRecord) -> tuple[Event, Head] | None:
        kept.look()
        if newest.head.stable == kept.version:
            return None
        withdrawn = newest.head.withdrawn(number)
        if withdrawn is not None:
            raise Rejected(f"version {number} of {job.id} is {withdrawn}: promote one that is good")
        version = kept.require()
        return Promoted(version=number, by=request.who), transitions.promote(newest.head, version)

    if records.append(context, job.id, promote) is None:
        return f"version {number} of {job.id} was stable already"
    tell_changed(context, job)
    return f"version {number} of {job.id} is stable now"


def _clear(context: Context, job: Job, number: int, by: str) -> str:
    def clear(newest: LogRecord) -> tuple[Event, Head] | None:
        head = newest.head
        if number in head.cleared:
            return None
        if head.quarantine is None or head.quarantine.version != number:
            at_all = "none" if head.quarantine is None else f"version {head.quarantine.version}"
            raise Rejected(f"version {number} of {job.id} is not what is in quarantine; {at_all} is")
        return Cleared(version=number, by=by), transitions.clear(head)

    record = records.append(context, job.id, clear) or context.log(job.id).head()
    tell_changed(context, job)
    _ask_for_publish(context, job, record)
    return f"version {number} of {job.id} is out of quarantine"


def _roll_back(context: Context, job: Job, number: int, reason: str, request: Request) -> str:
    kept = _Kept(context, job, number, request)

    def roll_back(newest: LogRecord) -> tuple[Event, Head] | None:
        head = newest.head
        kept.look()
        if kept.done is not None:
            return None
        if head.closed is not None:
            raise Rejected(
                f"job {job.id} is closed ({head.closed}): it makes no version any more. To have version {number} "
                f"used, `fedqueue model promote {job.id} {number}`"
            )
        if head.quarantine is not None and number >= head.quarantine.version:
            raise Rejected(
                f"version {number} is in quarantine, as all from {head.quarantine.version} on are: clear that one, or "
                f"roll back to one before it, e.g. {head.offered.version}"
            )
        if number >= head.version:
            raise Rejected(f"version {number} is not older than the newest, {head.version}")
        if head.quarantine is None and head.current == kept.version.model_copy(
            update={"version": head.version}
        ):
            return None  # somebody who had no answer asks again
        version = kept.require()
        refused = decide.stranded(head, number)
        after = transitions.roll_back(job.spec, head, version, refused)
        closed = last_version(job.spec.stop, after.version)
        if closed is not None:  # rolling back makes a version, and it may be the last
            refused += decide.leftovers(transitions.close(after, closed))
            after = transitions.roll_back(job.spec, head, version, refused, closed)
        event = RolledBack(
            to=number, reason=reason, by=request.who, refused=refused, request_id=request.request_id
        )
        return event, after

    record = records.append(context, job.id, roll_back) or kept.done
    if record is None:
        return f"the newest version of {job.id} has the model of version {number} already: nothing was done"
    _after_rollback(context, job, record)
    done = f"version {record.head.version} of {job.id} is version {number} again"
    stable = record.head.stable
    if stable is not None and record.head.is_rolled_back(stable.version):
        done += f"; stable is still version {stable.version}, which was rolled back: promote another one"
    return done


def _after_rollback(context: Context, job: Job, record: LogRecord) -> None:
    """May be repeated: whoever made the record may have died before this."""
    for refusal in refusals(record.event):
        save_refusal(context.store, refusal)
        tell_refused(context, refusal)
    tell_changed(context, job)
    if record.head.closed is not None:
        tell_closed(context, job, record.head.closed)
    _ask_for_publish(context, job, record)
    if evaluation_due(job, record.head.version - 1, record.head):
        context.send(celery.EVALUATE, {"job": job.id, "version": str(record.head.version)})


def _ask_for_publish(context: Context, job: Job, record: LogRecord) -> None:
    if decide.wants_publish(job.spec, record.head):
        context.send(celery.PUBLISH, {"job": job.id})
