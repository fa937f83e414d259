"""Hints to sites on the control exchange. The log says the same and counts; so a lost hint is only logged."""

from __future__ import annotations

import logging

from broker import topology
from federation.errors import BadMessage, BrokerUnavailable
from federation.jobs import Job
from federation.types import Head, Published, Refusal
from federation.wire import Control, JobChanged, JobClosed, NewVersion, Outcome, encode_control
from tasks.context import Context

log = logging.getLogger("fedqueue.tell")


def tell_published(context: Context, job: Job, event: Published, head: Head) -> None:
    """The new version to all, and to each contributor that its update is in."""
    hint(context, NewVersion(job=job.id, version=head.version))
    for contribution in event.merged:
        outcome = Outcome(
            job=job.id,
            update_id=contribution.update.update_id,
            result="merged",
            version=contribution.version,
            staleness=contribution.staleness,
            weight=contribution.weight,
        )
        hint(context, outcome, contribution.update.site)


def tell_refused(context: Context, refusal: Refusal) -> None:
    outcome = Outcome(
        job=refusal.update.job,
        update_id=refusal.update.update_id,
        result="rejected",
        version=refusal.version,
        reason=refusal.reason,
        message=refusal.message[:1000],
    )
    hint(context, outcome, refusal.update.site)


def tell_closed(context: Context, job: Job, reason: str) -> None:
    hint(context, JobClosed(job=job.id, reason=reason))


def tell_changed(context: Context, job: Job) -> None:
    """Held, resumed, rolled back, in quarantine or out of it."""
    hint(context, JobChanged(job=job.id))


def hint(context: Context, control: Control, to: str = "all") -> None:
    """Send `control` to a site, or to all of them; that nobody hears it is no failure."""
    try:
        context.broker.publish(topology.CONTROL_EXCHANGE, encode_control(control, to))
    except BadMessage:
        log.debug("nobody listens for %s", to)  # no control queue: the site is not enrolled, or long gone
    except BrokerUnavailable as exc:
        log.warning("hint %s to %s not sent: %s", control.kind, to, exc)
