"""Requests join-job and decline-job: which sites take part, and when there are enough of them."""

from __future__ import annotations

from aggregator import transitions
from federation.errors import Rejected
from federation.governance import Member
from federation.jobs import Job
from federation.requests import DeclineJob, JoinJob, Request
from federation.types import Event, Head, LogRecord, Resumed
from storage.control import list_members, pin_key, save_member
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
    head = context.log(job.id).head().head
    if head.closed is not None:
        raise Rejected(f"job {job.id} is closed: {head.closed}")
    if job.spec.participants is not None and request.who not in job.spec.participants:
        raise Rejected(f"site {request.who} is not among the participants of job {job.id}: ask its owner")
    save_member(
        context.store,
        Member(job=job.id, site=request.who, answer="joined", num_images=asked.num_images, at=request.at),
    )
    start(context, job)
    return f"joined job {job.id}{_keep_key(context, request.who, asked.public_key)}"


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
    save_member(
        context.store,
        Member(job=job.id, site=request.who, answer="declined", reason=asked.reason, at=request.at),
    )
    return f"declined job {job.id}: {asked.reason}"


def first_hold(job: Job) -> str | None:
    """Why a new job's sites start no training yet; None: they may at once."""
    needed = job.spec.participation.min_sites
    return f"{WAITING}: {needed} must join first" if needed > 1 else None


def start(context: Context, job: Job) -> None:
    """Let the sites train as soon as enough have joined. Repeating it changes nothing."""

    def enough(newest: LogRecord) -> tuple[Event, Head] | None:
        hold = newest.head.hold
        if hold is None or not hold.startswith(WAITING):
            return None
        joined = sum(member.answer == "joined" for member in list_members(context.store, job.id))
        if joined < job.spec.participation.min_sites:
            return None
        return Resumed(), transitions.resume(newest.head)

    if records.append(context, job.id, enough) is not None:
        tell_changed(context, job)
