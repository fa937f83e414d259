"""The evaluation gate: which version has become so much worse that nothing may be built on it. Pure.

A version fails if it is lower than the best one before it by more than `evaluation.max_drop`. What counts is how the
job stands: of the versions that were measured, the failed ones at the end. A bad version that was followed by a good
one is over. The newest good one before them is offered instead: a version between the two may hold what went wrong,
though nobody has measured it.

Once somebody has cleared a version, the gate measures from that one on: it is good, and what is like it is, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.stopping import ROUNDING
from federation.best import Course
from federation.types import Head


@dataclass(frozen=True)
class Failure:
    """`version` and all after it are not to be used; version `offered` is."""

    version: int
    offered: int
    reason: str


def failure(max_drop: float, course: Course, head: Head) -> Failure | None:
    """None: nothing has failed, or it is in quarantine already."""
    since = head.cleared[-1] if head.cleared else 0
    best: int | None = None
    offered: int | None = None
    failed: Failure | None = None  # the first of those at the end
    for version in course.versions:
        if version < since or version > head.version or head.is_rolled_back(version):
            continue
        gain = 0.0 if best is None else course.gain(version, best)
        if gain is None:
            continue
        if offered is None or gain >= -max_drop - ROUNDING:
            offered, failed = version, None
        elif failed is None:
            failed = Failure(
                version,
                offered,
                f"{course.metric} is {-gain:.3g} lower than at version {best}, more than max_drop {max_drop:g}",
            )
        if gain >= 0:
            best = version
    if failed is not None and head.quarantine is not None and failed.version >= head.quarantine.version:
        return None
    return failed
