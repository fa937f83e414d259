"""The head after an event: pure functions from head to head, used by the writer of the log.

They raise ValueError where the event cannot follow the head. That is a mistake of the caller, never of a
site: decide again from the newest head.

Ids are remembered when they are accepted or refused, so that the same update counts once, whatever the broker
delivers again. What may be forgotten:

    ids that every later decision would refuse anyway: too stale for good, or the job is closed
    beyond REMEMBERED_LIMIT those with the oldest bases; `remembered_from` then says so, and `decide` asks for a
    search of the log's history

So a record has a bounded size, however long a backlog and however large `max_staleness` is.
"""

from __future__ import annotations

from collections.abc import Sequence

from federation.jobs import JobSpec
from federation.types import (
    AbandonedLine,
    Contribution,
    Head,
    ModelVersion,
    Published,
    Quarantine,
    Refusal,
    Remembered,
)

REMEMBERED_LIMIT = 256
"""Ids in the head after a publish or a refusal: some 20 KB of each record."""


def is_forgettable(spec: JobSpec, version: int, base_version: int) -> bool:
    """True if at `version` or any later one an update from `base_version` is certainly too stale.

    The version that an update meets is never below the published one, so no queue can change that.
    """
    return base_version < version - spec.aggregation.max_staleness


def accept(head: Head, contribution: Contribution) -> Head:
    """Queue `contribution` and remember its id."""
    update = contribution.update
    if head.closed is not None:
        raise ValueError(f"the job is closed ({head.closed}): {update.update_id} cannot be accepted")
    if any(known.update_id == update.update_id for known in head.remembered):
        raise ValueError(f"{update.update_id} is in the log already: it cannot be accepted again")
    known = Remembered(update_id=update.update_id, base_version=update.base_version)
    return head.model_copy(
        update={"pending": (*head.pending, contribution), "remembered": (*head.remembered, known)}
    )


def refuse(spec: JobSpec, head: Head, refusal: Refusal) -> Head:
    """Remember the id with the reason, and take it out of the queue if it was accepted before.

    Not remembered is what `decide` would refuse from now on anyway, so that a flood of such updates does not
    make every record longer than the one before it.
    """
    gone = refusal.update.update_id
    pending = tuple(c for c in head.pending if c.update.update_id != gone)
    if len(pending) == len(head.pending) and any(known.update_id == gone for known in head.remembered):
        raise ValueError(f"{gone} was merged or refused before: it cannot be refused again")
    hopeless = head.closed is not None or is_forgettable(spec, head.version, refusal.update.base_version)
    waited = len(pending) < len(head.pending)
    known = head.remembered if hopeless and not waited else _with_reasons(head.remembered, (refusal,))
    remembered, remembered_from = _bounded(known, head.remembered_from)
    return head.model_copy(
        update={"pending": pending, "remembered": remembered, "remembered_from": remembered_from}
    )


def still_applies(head: Head, event: Published, base: ModelVersion) -> bool:
    """True if `event`, made from model `base`, may still follow `head`: only other updates came in between.

    False: another publish won, the job was closed, rolled back or its version quarantined, or an update was refused
    meanwhile. Drop the work.
    """
    pending = {c.update.update_id for c in head.pending}
    stays = head.closed is None and head.quarantine is None and head.current == base
    return stays and pending.issuperset(_ids(event))


def publish(
    spec: JobSpec, head: Head, event: Published, current: ModelVersion, closed: str | None = None
) -> Head:
    """`event.merged` became version `current`; `event.refused` turned out bad when they were read.

    Both leave the queue; what was accepted in between stays, with the numbers that it has. If nothing was
    merged, `current` must be the head's. `closed`: why the job ends with this version, if it does; what still
    waits then belongs among the refused, see `decide.leftovers`.
    """
    if not still_applies(head, event, head.current):
        raise ValueError("the head has moved on: an update of the event is not pending, or the job is closed")
    if event.merged:
        if not head.version < current.version == event.merged[-1].version:
            raise ValueError(f"version {current.version} is not what the last of the merged updates makes")
    elif current != head.current:
        raise ValueError("there is a new model, but nothing was merged into it")
    return _advance(spec, head, current, event.refused, _ids(event)).model_copy(update={"closed": closed})


def close(head: Head, reason: str) -> Head:
    """No update is merged any more. What is still pending has to be refused: `decide.leftovers`.

    A job is closed once: the first reason stays.
    """
    return head if head.closed is not None else head.model_copy(update={"closed": reason})


def hold(head: Head, reason: str) -> Head:
    """Sites start no training until `resume`; updates are accepted and merged as before."""
    return head.model_copy(update={"hold": reason})


def resume(head: Head) -> Head:
    """The opposite of `hold`."""
    return head.model_copy(update={"hold": None})


def quarantine(head: Head, version: int, reason: str, offered: ModelVersion) -> Head:
    """`version` failed its gate, so it and all that was made after it is not offered: `offered`, an older one, is.

    One that lies in quarantine already is not put there again: the first has to be decided on. Nor is one that was
    cleared, or one before it.
    """
    if not offered.version < version <= head.version:
        raise ValueError(
            f"version {offered.version} cannot be offered instead of {version} of {head.version}"
        )
    if any(head.withdrawn(number) for number in (version, offered.version)):
        raise ValueError(f"version {version} or {offered.version} is withdrawn already")
    if head.cleared and version <= head.cleared[-1]:
        raise ValueError(f"version {version} is not after {head.cleared[-1]}, which was cleared")
    return head.model_copy(update={"quarantine": Quarantine(version=version, reason=reason, offered=offered)})


def clear(head: Head) -> Head:
    """The quarantined version is good after all, and what is like it: the gate measures from it on."""
    if head.quarantine is None:
        raise ValueError("no version is in quarantine")
    cleared = (*head.cleared, head.quarantine.version)
    return head.model_copy(update={"quarantine": None, "cleared": cleared})


def promote(head: Head, version: ModelVersion) -> Head:
    """`version`, a stored one, becomes the stable one."""
    if version.version > head.version:
        raise ValueError(f"version {version.version} is not made yet")
    return head.model_copy(update={"stable": version})


def roll_back(
    spec: JobSpec, head: Head, to: ModelVersion, refused: Sequence[Refusal], closed: str | None = None
) -> Head:
    """A new version with the model of `to`. What lies between is abandoned, and a quarantine is over.

    refused: `decide.stranded(head, to.version)`, the pending updates that were trained from the abandoned line.
    `closed`: why the job ends with this version, if it does; then `decide.leftovers` belong among the refused.
    """
    if head.closed is not None:
        raise ValueError(f"the job is closed ({head.closed}): it makes no version any more")
    if not to.version < head.version:
        raise ValueError(f"version {to.version} is not older than the newest, {head.version}")
    if head.quarantine is not None and to.version >= head.quarantine.version:
        raise ValueError(f"version {to.version} is in quarantine, as version {head.quarantine.version} is")
    current = to.model_copy(update={"version": head.version + 1})
    gone = {refusal.update.update_id for refusal in refused}
    line = AbandonedLine(first=to.version + 1, last=head.version)
    return _advance(spec, head, current, refused, gone).model_copy(
        update={
            "abandoned": _with_line(head.abandoned, line),
            "quarantine": None,
            "cleared": tuple(version for version in head.cleared if version <= to.version),
            "closed": closed,
        }
    )


def _advance(
    spec: JobSpec, head: Head, current: ModelVersion, refused: Sequence[Refusal], gone: set[str]
) -> Head:
    """`current` is the newest version: the updates `gone` leave the queue, and ids that are too old are forgotten."""
    known = (
        known
        for known in _with_reasons(head.remembered, refused)
        if not is_forgettable(spec, current.version, known.base_version)
    )
    remembered, remembered_from = _bounded(tuple(known), head.remembered_from)
    return head.model_copy(
        update={
            "current": current,
            "pending": tuple(c for c in head.pending if c.update.update_id not in gone),
            "remembered": remembered,
            "remembered_from": remembered_from,
        }
    )


def _with_line(lines: Sequence[AbandonedLine], line: AbandonedLine) -> tuple[AbandonedLine, ...]:
    """`line` ends with the newest version, so it swallows the lines that it touches."""
    first = min([other.first for other in lines if other.last >= line.first - 1], default=line.first)
    before = tuple(other for other in lines if other.last < line.first - 1)
    return (*before, AbandonedLine(first=min(first, line.first), last=line.last))


def _ids(event: Published) -> set[str]:
    return {c.update.update_id for c in event.merged} | {r.update.update_id for r in event.refused}


def _with_reasons(remembered: Sequence[Remembered], refused: Sequence[Refusal]) -> tuple[Remembered, ...]:
    """`remembered` with the refused ids in it, each with its reason, in order of first appearance."""
    by_id = {known.update_id: known for known in remembered}
    for refusal in refused:
        update = refusal.update
        by_id[update.update_id] = Remembered(
            update_id=update.update_id, base_version=update.base_version, reason=refusal.reason
        )
    return tuple(by_id.values())


def _bounded(remembered: tuple[Remembered, ...], since: int) -> tuple[tuple[Remembered, ...], int]:
    """At most REMEMBERED_LIMIT of them, all those from the newest bases; and the base from which that is all."""
    if len(remembered) <= REMEMBERED_LIMIT:
        return remembered, since
    bases = sorted((known.base_version for known in remembered), reverse=True)
    since = max(since, bases[REMEMBERED_LIMIT] + 1)
    return tuple(known for known in remembered if known.base_version >= since), since
