"""What becomes of a client update: a pure function of the job, the head and the update.

    Accept      append it with these numbers, unless the log's history names the id
    Duplicate   its id is remembered: nothing to append, answer as before
    Refuse      refuse it for good, likewise

Outcomes, not exceptions. A decision holds for the head that it was made from; after a conflict decide again.
The head after the event that records it comes from `aggregator.transitions`.

The order of the checks matters. A redelivered update must be recognised whatever has changed since, so the
duplicate check is first. The head does not remember every id (`aggregator.transitions` says which it forgets);
where it may have forgotten this one, the decision says `maybe_forgotten`: search the log's history before you
record it, because an update ends in exactly one way.
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.transitions import is_forgettable
from aggregator.weighting import assign, met_version
from federation.jobs import Job, JobSpec
from federation.types import ClientUpdate, Contribution, Head, Refusal

TOO_STALE = "too-stale"
JOB_CLOSED = "job-closed"
NOT_A_PARTICIPANT = "not-a-participant"
FUTURE_BASE = "future-base"
WRONG_PAYLOAD_KIND = "wrong-payload-kind"
TOO_LARGE = "too-large"
ALREADY_CONTRIBUTED = "already-contributed"
ABANDONED_BASE = "abandoned-base"
TOO_MANY_PENDING = "too-many-pending"


@dataclass(frozen=True)
class Accept:
    """Append `contribution`."""

    contribution: Contribution
    maybe_forgotten: bool


@dataclass(frozen=True)
class Duplicate:
    """The id is in the log already. `reason` is why it was refused then; None: it was accepted."""

    reason: str | None


@dataclass(frozen=True)
class Refuse:
    """The update is wrong for this job and stays wrong, or too old."""

    refusal: Refusal
    maybe_forgotten: bool


Decision = Accept | Duplicate | Refuse


def decide(job: Job, head: Head, update: ClientUpdate) -> Decision:
    """Judge `update`, which is addressed to `job`, against the job's newest `head`."""
    for known in head.remembered:
        if known.update_id == update.update_id:
            return Duplicate(known.reason)

    maybe_forgotten = (
        head.closed is not None
        or update.base_version < head.remembered_from
        or is_forgettable(job.spec, head.version, update.base_version)
    )
    problem = _problem(job, head, update)
    if problem is not None:
        reason, message = problem
        refusal = Refusal(update=update, reason=reason, message=message, version=head.version)
        return Refuse(refusal, maybe_forgotten)
    return Accept(assign(job.spec, update, head.version, len(head.pending)), maybe_forgotten)


def wants_publish(spec: JobSpec, head: Head) -> bool:
    """True if the pending contributions suffice to make a new version.

    Never once the job is closed, and not while its newest version is in quarantine.
    """
    if head.closed is not None or head.quarantine is not None:
        return False
    if spec.aggregation.strategy == "fedasync":
        return bool(head.pending)
    if spec.aggregation.strategy == "fedbuff":
        return len(head.pending) >= spec.aggregation.buffer_size
    return {c.update.site for c in head.pending}.issuperset(spec.participants or ())


def leftovers(head: Head) -> tuple[Refusal, ...]:
    """Refusals for what is still pending in a closed job, so that those updates end in exactly one way too.

    Record them with `transitions.refuse`, one by one. Empty while the job is open, and once all are refused.
    """
    if head.closed is None:
        return ()
    message = f"the job closed ({head.closed}) before this update could be merged: nothing to do"
    return tuple(
        Refusal(update=c.update, reason=JOB_CLOSED, message=message, version=head.version)
        for c in head.pending
    )


def stranded(head: Head, to: int) -> tuple[Refusal, ...]:
    """Refusals for pending updates that were trained from versions which a rollback to version `to` abandons.

    The others stay: they were trained from `to` or before it, and are merged with the staleness that they have then.
    """
    message = f"trained from a version that was rolled back to version {to}: pull the newest version and train again"
    return tuple(
        Refusal(update=c.update, reason=ABANDONED_BASE, message=message, version=head.version)
        for c in head.pending
        if c.update.base_version > to
    )


def _staleness_problem(spec: JobSpec, head: Head, update: ClientUpdate) -> str:
    """Why the update is too old, in words; empty if it is not."""
    base = update.base_version
    if spec.aggregation.strategy == "fedavg" and base < head.version:
        return (
            f"trained from version {base}, but the round is at version {head.version}: "
            "pull the newest version and train again"
        )
    limit = spec.aggregation.max_staleness
    met = met_version(spec, head.version, len(head.pending))
    if met - base > limit:
        return (
            f"trained from version {base}, {met - base} merges behind version {met} that it would meet; "
            f"at most {limit} are allowed: pull the newest version and train again"
        )
    return ""


def _problem(job: Job, head: Head, update: ClientUpdate) -> tuple[str, str] | None:
    """(reason, message) of the first thing wrong with the update, or None."""
    spec = job.spec
    stale = _staleness_problem(spec, head, update)
    if stale:
        return TOO_STALE, stale
    if head.closed is not None:
        return JOB_CLOSED, f"job {spec.id} is closed ({head.closed}): stop training for it"
    if spec.participants is not None and update.site not in spec.participants:
        return (
            NOT_A_PARTICIPANT,
            f"site {update.site} is not among the participants of job {spec.id}: ask its owner",
        )
    if update.base_version > head.version:
        return FUTURE_BASE, (
            f"base version {update.base_version} is not published, the newest is {head.version}: "
            "send the number of the version that training started from"
        )
    if head.is_rolled_back(update.base_version):
        return ABANDONED_BASE, (
            f"version {update.base_version}, from which it was trained, was rolled back: "
            "pull the newest version and train again"
        )
    if update.payload_kind != spec.aggregation.payload_kind:
        return WRONG_PAYLOAD_KIND, (
            f"the payload holds {update.payload_kind}, but {spec.aggregation.strategy} merges "
            f"{spec.aggregation.payload_kind}: send those"
        )
    if update.payload_bytes > job.max_update_bytes:
        return TOO_LARGE, (
            f"the payload is {update.payload_bytes} bytes, at most {job.max_update_bytes}: "
            "send only the tensors of the job's model"
        )
    waiting = sum(c.update.site == update.site for c in head.pending)
    if head.quarantine is not None and waiting >= spec.inflight_limit:
        # nothing is merged now, and every record carries what waits
        return TOO_MANY_PENDING, (
            f"{waiting} updates of site {update.site} wait until somebody decides on version "
            f"{head.quarantine.version}, which is in quarantine: train again after that"
        )
    if spec.aggregation.strategy == "fedavg" and any(c.update.site == update.site for c in head.pending):
        return ALREADY_CONTRIBUTED, (
            f"site {update.site} has contributed to the round of version {head.version}: "
            "wait for the next version"
        )
    return None
