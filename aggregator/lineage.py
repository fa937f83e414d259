"""Which updates a version is made of, and each site's share in it: read from the log.

Every version has one parent: the version that it was merged into, or, if a rollback made it, the one whose model
it took over. The way up from a version to version 0 is its line, and the updates that were merged along it are all
that is in it. What was merged into versions that a rollback abandoned is in none of the line's, unless a later
rollback went back to one of them.

An update was trained from a version of the same line, because one whose base was abandoned is refused
(`aggregator.decide`). So no site's work gets into a version but by an update of its own that is counted here.

Share of site s in a version, over the updates i that are in it, with the weight w_i that each was merged with:

    share(s) = Σ_{i of s} w_i / Σ_i w_i

w_i is α·s(τ_i) in fedasync, s(τ_i) (times n_i, if the policy says so) in fedbuff, n_i in fedavg. So a site's share
grows with how often it contributed, falls with how stale it was, and the shares add up to 1. It is not the factor
of the site's tensors in the sum that the model is: in fedasync what is merged later covers what was merged before,
which was the ground that it stands on all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from federation.types import Contribution, Head, LogRecord, Published, RolledBack


@dataclass(frozen=True)
class Part:
    """One site's part in a version. `images`: training images behind its largest update."""

    updates: int
    images: int
    weight: float
    share: float


@dataclass(frozen=True)
class Lineage:
    """`line`: the stored versions from 0 on that led to the version, itself last. `parts`: by site.

    `spans`: the same, first and last of each stretch; a rollback begins a new one.
    """

    line: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    parts: dict[str, Part]
    updates: int
    mean_staleness: float


@dataclass(frozen=True)
class _Made:
    """How a version came about."""

    parent: int | None
    rolled_back: bool
    merged: tuple[Contribution, ...]


def lineage(records: Iterable[LogRecord], version: int) -> Lineage:
    """Of a stored version, from the whole log. Raises ValueError if the log has no such version."""
    made: dict[int, _Made] = {}
    before: Head | None = None
    for record in records:
        event, current = record.event, record.head.current.version
        if before is None or before.current.version != current:
            parent = None if before is None else before.current.version
            if isinstance(event, RolledBack):
                made[current] = _Made(event.to, True, ())
            else:
                made[current] = _Made(parent, False, event.merged if isinstance(event, Published) else ())
        before = record.head
    if version not in made:
        raise ValueError(f"the log has no stored version {version}")
    line, spans, merged = [], [], []
    last, at = version, version
    while True:
        step = made[at]
        line.append(at)
        merged.append(step.merged)
        if step.parent is None or step.rolled_back:
            spans.append((at, last))
        if step.parent is None:
            break
        if step.rolled_back:
            last = step.parent
        at = step.parent
    contributions = [contribution for group in reversed(merged) for contribution in group]
    count = len(contributions)
    return Lineage(
        line=tuple(reversed(line)),
        spans=tuple(reversed(spans)),
        parts=_parts(contributions),
        updates=count,
        mean_staleness=sum(c.staleness for c in contributions) / count if count else 0.0,
    )


def _parts(contributions: list[Contribution]) -> dict[str, Part]:
    by_site: dict[str, list[Contribution]] = {}
    for contribution in contributions:
        by_site.setdefault(contribution.update.site, []).append(contribution)
    total = sum(c.weight for c in contributions)
    parts = {}
    for site, own in sorted(by_site.items()):
        weight = sum(c.weight for c in own)
        # weights that are all 0 say nothing; then the numbers of updates do
        share = weight / total if total > 0 else len(own) / len(contributions)
        images = max(c.update.num_examples for c in own)
        parts[site] = Part(updates=len(own), images=images, weight=weight, share=min(share, 1.0))
    return parts
