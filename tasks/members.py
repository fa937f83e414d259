"""Requests join-job and decline-job: which sites take part, and when there are enough of them."""

from __future__ import annotations

from aggregator import transitions
from federation.errors import Rejected
from federation.governance import Member
from federation.jobs import Job
from federation.requests import DeclineJob, JoinJob, Request
from federation.types import Event, Head, LogRecord, Resumed
from storage.control import pin_key, save_member
from tasks import records
from tasks.context import Context
from tasks.tell import tell_changed

WAITING = "waiting for sites"
"""How the hold of a job begins that has not yet the sites that it needs."""


def join(context: Context, request: Request) -> str:
    """The site takes part. Raises NotFound, Rejected."""
    asked = request.what
    assert isinstance(asked, JoinJob)
    job = context.job(asked.job)
    newest = context.log(job.id).head()
    if newest.head.closed is not None:
        raise Rejected(f"job {job.id} is closed: {newest.head.closed}")
    if job.spec.participants is not None and request.who not in job.spec.participants:
        raise Rejected(f"site {request.who} is not among the participants of job {job.id}: ask its owner")
    _keep(
        context,
        Member(job=job.id, site=request.who, answer="joined", num_images=asked.num_images, at=request.at),
    )
    start(context, job, newest)
    return f"joined job {job.id}{_keep_key(context, request.who, asked.public_key)}"


def _keep(context: Context, member: Member) -> None:
    try:
        save_member(context.store, member)
    finally:  # its reply may be lost, and it be there
        context.forget_member(member.job, member.site)


def _keep_key(context: Context, site: str, public_key: str | None) -> str:
    """Pin the key, or say that another one counts: a site that has lost its key may train, and not consent."""
    try:
        if public_key is not None:
            pin_key(context.store, site, public_key)
    except Rejected as exc:
        return f"; but its signatures will not count: {exc}"
    return ""


def decline(context: Context, request: Request) -> str:
    """The site does not take part, or not any more. Raises NotFound."""
    asked = request.what
    assert isinstance(asked, DeclineJob)
    job = context.job(asked.job)
    _keep(
        context,
        Member(job=job.id, site=request.who, answer="declined", reason=asked.reason, at=request.at),
    )
    return f"declined job {job.id}: {asked.reason}"


def first_hold(job: Job) -> str | None:
    """Why a new job's sites start no training yet; None: they may at once."""
    needed = job.spec.participation.min_sites
    return f"{WAITING}: {needed} must join first" if needed > 1 else None


def start(context: Context, job: Job, newest: LogRecord) -> None:
    """Let the sites train as soon as enough have joined. Repeating it changes nothing."""
    if not _waits(newest.head):
        return
    joined = sum(member.answer == "joined" for member in context.members(job.id))
    if joined < job.spec.participation.min_sites:
        return

    def enough(newest: LogRecord) -> tuple[Event, Head] | None:
        return (Resumed(), transitions.resume(newest.head)) if _waits(newest.head) else None

    if records.append(context, job.id, enough) is not None:
        tell_changed(context, job)


def _waits(head: Head) -> bool:
    return head.hold is not None and head.hold.startswith(WAITING)
