"""The head after an event: pure functions from head to head, used by the writer of the log.

They raise ValueError where the event cannot follow the head. That is a mistake of the caller, never of a
site: decide again from the newest head.

Ids are remembered when they are accepted or refused, and forgotten in `publish` alone, where versions
advance: only those that `decide` would call too stale from then on anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from aggregator.decide import is_forgettable
from federation.types import Contribution, Head, JobSpec, ModelVersion, Refusal, Remembered


def accept(head: Head, contribution: Contribution) -> Head:
    """Queue `contribution` and remember its id."""
    update = contribution.update
    if head.closed is not None:
        raise ValueError(f"the job is closed ({head.closed}): {update.update_id} cannot be accepted")
    if any(known.update_id == update.update_id for known in head.remembered):
        raise ValueError(f"{update.update_id} is in the log already: it cannot be accepted again")
    known = Remembered(update_id=update.update_id, base_version=update.base_version)
    return Head(
        current=head.current,
        pending=(*head.pending, contribution),
        remembered=(*head.remembered, known),
    )


def refuse(head: Head, refusal: Refusal) -> Head:
    """Remember the id with the reason, and take it out of the queue if it was accepted before."""
    gone = refusal.update.update_id
    return Head(
        current=head.current,
        pending=tuple(c for c in head.pending if c.update.update_id != gone),
        remembered=_with_reasons(head.remembered, (refusal,)),
        closed=head.closed,
    )


def still_applies(
    head: Head, base: ModelVersion, merged: Sequence[Contribution], refused: Sequence[Refusal] = ()
) -> bool:
    """True if a merge onto `base` may still be published on `head`: only other updates came in between.

    False: another publish won, or the job was closed, or an update was refused meanwhile. Drop the work.
    """
    pending = {c.update.update_id for c in head.pending}
    return head.closed is None and head.current == base and pending.issuperset(_ids(merged, refused))


def publish(
    spec: JobSpec,
    head: Head,
    merged: Sequence[Contribution],
    refused: Sequence[Refusal],
    current: ModelVersion,
    closed: str | None = None,
) -> Head:
    """`merged` became version `current`; `refused` turned out bad when they were read.

    Both leave the queue; what was accepted in between stays, with the numbers that it has. If nothing was
    merged there is no new version: use `refuse`.
    """
    if not still_applies(head, head.current, merged, refused):
        raise ValueError(
            "the head has moved on: an update of this publish is not pending, or the job is closed"
        )
    if not merged or current.version != merged[-1].version or current.version <= head.version:
        raise ValueError(f"version {current.version} is not what these {len(merged)} contributions make")
    gone = _ids(merged, refused)
    return Head(
        current=current,
        pending=tuple(c for c in head.pending if c.update.update_id not in gone),
        remembered=tuple(
            known
            for known in _with_reasons(head.remembered, refused)
            if not is_forgettable(spec, current.version, known.base_version)
        ),
        closed=closed,
    )


def close(head: Head, reason: str) -> Head:
    """No update is merged any more. What is still pending has to be refused: `decide.leftovers`.

    A job is closed once: the first reason stays.
    """
    if head.closed is not None:
        return head
    return Head(current=head.current, pending=head.pending, remembered=head.remembered, closed=reason)


def _ids(merged: Sequence[Contribution], refused: Sequence[Refusal]) -> set[str]:
    return {c.update.update_id for c in merged} | {r.update.update_id for r in refused}


def _with_reasons(remembered: Sequence[Remembered], refused: Sequence[Refusal]) -> tuple[Remembered, ...]:
    """`remembered` with the refused ids in it, each with its reason, in order of first appearance."""
    by_id = {known.update_id: known for known in remembered}
    for refusal in refused:
        update = refusal.update
        by_id[update.update_id] = Remembered(
            update_id=update.update_id, base_version=update.base_version, reason=refusal.reason
        )
    return tuple(by_id.values())
