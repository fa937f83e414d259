"""Does a log record follow from the one before it? What can be said of ids and numbers, without the mathematics.

`aggregator.transitions` makes heads, and `fedqueue replay` makes them again. These rules are written down a second
time here, from the other side and on purpose: an audit that called the code that it audits would share its mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator

from federation.types import (
    AbandonedLine,
    Accepted,
    Cleared,
    Closed,
    Collected,
    Contribution,
    Created,
    Event,
    Head,
    Held,
    Promoted,
    Published,
    Quarantined,
    Refused,
    Resumed,
    RolledBack,
)
from storage.log import named, refusals

_STEERED = ("hold", "quarantine", "stable", "abandoned", "cleared")


def begins(event: Event, head: Head) -> Iterator[str]:
    """What is wrong with the first record of a log, in words."""
    if not isinstance(event, Created):
        yield f"the log begins with {event.type!r}, not with 'created'"
    elif head != Head(current=head.current, hold=head.hold) or head.version:
        yield "the log does not begin with an open version 0 and nothing pending"


def breaks(before: Head, event: Event, head: Head, max_staleness: int | None) -> Iterator[str]:
    """In what `head` is not what `event` makes of `before`, in words. max_staleness None: unknown, not checked."""
    if isinstance(event, Created):
        yield "the log was created by an earlier record"
    if isinstance(event, Collected) and head != before:
        yield "the head changed, but retention changes none"
        return
    yield from _pending(before, event, head)
    yield from _version(before, event, head)
    yield from _closed(before, event, head)
    yield from _steered(before, event, head)
    yield from _remembered(before, event, head, max_staleness)


def _pending(before: Head, event: Event, head: Head) -> Iterator[str]:
    waited = {c.update.update_id: c for c in before.pending}
    for contribution in _merged(event):
        known = waited.get(contribution.update.update_id)
        if known is not None and known.update != contribution.update:
            yield f"{contribution.update.update_id} is merged as another update than was accepted"
    gone = named(event) if not isinstance(event, Accepted) else set()
    expected = [c for c in before.pending if c.update.update_id not in gone]
    if isinstance(event, Accepted):
        expected.append(event.contribution)
    if list(head.pending) == expected:
        return
    ids, expected_ids = _ids(head.pending), _ids(expected)
    lost, extra = expected_ids - ids, ids - expected_ids
    if lost:
        yield f"pending updates are lost: {_some(lost)}"
    if extra:
        yield f"updates are pending that were not accepted here: {_some(extra)}"
    if not lost and not extra:
        yield "the order or the numbers of pending updates changed"


def _version(before: Head, event: Event, head: Head) -> Iterator[str]:
    merged = _merged(event)
    if isinstance(event, RolledBack):
        if not event.to < before.version == head.version - 1:
            yield f"a rollback to version {event.to} makes version {head.version} of {before.version}"
        return
    if not merged:
        if head.current != before.current:
            yield f"the model changed (version {before.version} to {head.version}), but nothing was merged"
        return
    made = [c.version for c in merged]
    steps = zip([before.version, *made], made, strict=False)
    if made[0] != before.version + 1 or any(not 0 <= after - first <= 1 for first, after in steps):
        yield f"the merged updates make versions {_some(made)}, they must count up from {before.version + 1}"
    if not before.version < head.version == made[-1]:
        yield f"version {before.version} became {head.version}, but the last merged update makes {made[-1]}"


def _closed(before: Head, event: Event, head: Head) -> Iterator[str]:
    if before.closed is not None:
        if head.closed != before.closed:
            yield f"the job was closed ({before.closed}), and now it is {head.closed or 'open'}"
        if isinstance(event, Accepted | RolledBack) or _merged(event):
            yield f"work is taken on although the job is closed ({before.closed})"
    elif isinstance(event, Closed):
        if head.closed != event.reason:
            yield f"the job closes ({event.reason}), but the head says {head.closed or 'open'}"
    elif head.closed is not None and not _merged(event) and not isinstance(event, RolledBack):
        yield f"the job is closed ({head.closed}) by a record that closes nothing"


def _steered(before: Head, event: Event, head: Head) -> Iterator[str]:
    """What is decided about a job and its versions changes by the events that say so, and by no other."""
    allowed: dict[str, object] = {name: getattr(before, name) for name in _STEERED}
    match event:
        case Held():
            allowed["hold"] = event.reason
        case Resumed():
            allowed["hold"] = None
        case Promoted():
            allowed["stable"] = head.stable
            if head.stable is None or head.stable.version != event.version or event.version > before.version:
                yield f"version {event.version} is promoted, but another one is stable"
        case Quarantined():
            allowed["quarantine"] = head.quarantine
            yield from _quarantined(before, event, head)
        case Cleared():
            allowed |= {"quarantine": None, "cleared": (*before.cleared, event.version)}
            if before.quarantine is None or before.quarantine.version != event.version:
                yield f"version {event.version} is cleared, which was not what was in quarantine"
        case RolledBack():
            allowed |= {
                "quarantine": None,
                "cleared": tuple(version for version in before.cleared if version <= event.to),
                "abandoned": head.abandoned,
            }
            yield from _abandoned(before, event, head)
        case Published() if event.merged and before.quarantine is not None:
            yield f"a version is made, but version {before.quarantine.version} is in quarantine"
    for name, value in allowed.items():
        if getattr(head, name) != value:
            yield f"{name!r} is not what {event.type!r} makes of it"


def _quarantined(before: Head, event: Quarantined, head: Head) -> Iterator[str]:
    now = head.quarantine
    if now is None or (now.version, now.reason) != (event.version, event.reason):
        yield f"version {event.version} is put in quarantine, but the head says otherwise"
    elif not now.offered.version < now.version <= before.version:
        yield f"version {now.offered.version} is offered instead of version {now.version} of {before.version}"
    elif before.quarantine is not None and before.quarantine.version <= now.version:
        yield f"version {now.version} was in quarantine already"
    elif before.cleared and now.version <= before.cleared[-1]:
        yield f"version {now.version} is put in quarantine, though version {before.cleared[-1]} was cleared"


def _abandoned(before: Head, event: RolledBack, head: Head) -> Iterator[str]:
    """Each version that was rolled back before still is, those since `event.to` are, and no other is."""
    lines = (*before.abandoned, AbandonedLine(first=event.to + 1, last=before.version))
    ends = {0, head.version} | {n for x in (*lines, *head.abandoned) for n in (x.first, x.last + 1)}
    for version in sorted(ends):  # between two of these nothing changes
        if head.is_rolled_back(version) != any(line.first <= version <= line.last for line in lines):
            yield f"version {version} is or is not said to be rolled back, against what the log says"


def _remembered(before: Head, event: Event, head: Head, max_staleness: int | None) -> Iterator[str]:
    known = {r.update_id: r for r in before.remembered}
    now = {r.update_id: r for r in head.remembered}
    of_event = named(event)
    refused = {refusal.update.update_id: refusal for refusal in refusals(event)}
    forged = now.keys() - known.keys() - of_event
    if forged:
        yield f"ids are remembered that no record names: {_some(forged)}"
    for update_id in now.keys() & known.keys() - refused.keys():
        if now[update_id] != known[update_id]:
            yield f"what is remembered of {update_id} changed"
    for update_id in now.keys() & refused.keys():
        if now[update_id].reason != refused[update_id].reason:
            yield f"{update_id} is refused, but remembered as {now[update_id].reason or 'accepted'}"
    if head.remembered_from < before.remembered_from:
        yield f"ids are said to be remembered from base {head.remembered_from} on, which were forgotten before"
    lost = known.keys() - now.keys()
    if lost and not isinstance(event, Published | Refused | RolledBack):
        yield f"ids are forgotten by {event.type!r}: {_some(lost)}"
        return
    if max_staleness is None:
        return
    # an update from an older base is refused, or the whole log is searched for its id
    oldest = max(head.version - max_staleness, head.remembered_from)
    early = {update_id for update_id in lost if known[update_id].base_version >= oldest}
    bases = {c.update.update_id: c.update.base_version for c in _accepted(event)}
    bases |= {update_id: refusal.update.base_version for update_id, refusal in refused.items()}
    if head.closed is None:
        early |= {i for i, base in bases.items() if base >= oldest and i not in now}
    if early:
        yield f"ids are not remembered, so that the same updates could count again: {_some(early)}"


def _accepted(event: Event) -> tuple[Contribution, ...]:
    return (event.contribution,) if isinstance(event, Accepted) else ()


def _merged(event: Event) -> tuple[Contribution, ...]:
    return event.merged if isinstance(event, Published) else ()


def _ids(contributions: tuple[Contribution, ...] | list[Contribution]) -> set[str]:
    return {c.update.update_id for c in contributions}


def _some(values: set[str] | list[int]) -> str:
    shown = ", ".join(str(value) for value in (sorted(values) if isinstance(values, set) else values)[:5])
    return f"{shown} and {len(values) - 5} more" if len(values) > 5 else shown
