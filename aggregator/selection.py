"""Which sites an invited job asks to train now, and why each other one is passed over.

A site may be invited if it is connected, its load is at most `max_load`, it is not at work already, and
`min_interval_s` have gone by since its last turn began. Of those that may, the one comes first that has most of

    priority = t · w      t   seconds since its last turn began: since it was invited last
                          w   images · speed, its weight
                          images   of its training set, held between 1/8 and 8 times the median of the joined sites
                          speed    1, or (lease / expected)² if its turns take longer than the lease; at least 1/4

Whoever never had a turn comes before all others. Sources: a priority that grows with the time waited, at a rate of
its own for each class (Kleinrock 1964, "A delay dependent queue discipline", Naval Research Logistics Quarterly
11); the penalty on those that are too slow, and on them alone (Oort, Lai et al. 2021, arXiv 2010.06081, with α =
2). docs/adr/0015-selection.md says what was weighed against it.

Turns are in proportion to the weights: in the long run a site is invited whenever t·w reaches the same level θ, so
every θ/w seconds. A site cannot have more turns than it has time for; the others share the rest.

No site starves. Let site i be passed over all the time from t = s to t = T. Site j goes before it only when
t_j·w_j ≥ t·w_i, and t_j begins again from 0 each time. So of two such picks of j the later one is at a t that is
larger by the factor 1/(1 - w_i/w_j) or more: there are at most 1 + (w_j/w_i)·ln(T/s) of them, and at most 1 if w_j
≤ w_i. All others together go before i at most

    n - 1 + (W/w_i)·ln(T/s)      times; n sites, W the sum of the others' weights

while every slot is free again after a lease at the latest. Sites that vanish, come back or join change n and
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from federation.jobs import Participation

IMAGES_RANGE = 8.0
"""A site weighs at most so many times as much as the median one, and at least the inverse: what a site tells of itself
cannot be checked, and one of few images must not wait for ever."""

OVERRUN = 2.0
"""In leases: a turn that took longer than this, or in which nothing came, counts as so long."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A site that has joined the job."""

    site: str
    num_images: int = 0
    """Training images, as the site tells; 0: it does not."""
    since_s: float | None = None
    """Seconds since its last turn began; None: it never had one."""
    expected_s: float | None = None
    """Seconds that a turn of it takes, by its earlier ones (`expected`); None: not known."""
    connected: bool = True
    load: float | None = None
    """Load average per core; None: it does not tell."""
    invited: bool = False
    """It holds an invitation that has not expired, and has not answered it: it has one of the slots."""
    occupied: str = ""
    """Why it could not begin now, in words; empty: it could."""


@dataclass(frozen=True)
class Selection:
    """`invite`: sites in order. `passed_over`: every other candidate -> why."""

    invite: tuple[str, ...]
    passed_over: Mapping[str, str]


def free_slots(policy: Participation, invited: int, unmerged: int) -> int:
    """How many may be invited, while `invited` hold an invitation and `unmerged` updates wait to be merged."""
    free = policy.concurrency - invited
    if policy.max_in_flight is not None:
        free = min(free, policy.max_in_flight - invited - unmerged)
    return max(0, free)


def select(candidates: Sequence[Candidate], policy: Participation, unmerged: int = 0) -> Selection:
    """Fill the free ones of `policy.concurrency` slots. The same candidates in any order give the same result.

    unmerged: updates of the job that wait to be merged.
    """
    passed_over = {c.site: why for c in candidates if (why := _why_not(c, policy))}
    weight = weights(candidates, policy)

    def rank(candidate: Candidate) -> tuple[float, float, str]:
        waited = math.inf if candidate.since_s is None else candidate.since_s
        return -waited * weight[candidate.site], -weight[candidate.site], candidate.site

    ranked = sorted((c for c in candidates if c.site not in passed_over), key=rank)
    free = free_slots(policy, sum(c.invited for c in candidates), unmerged)
    for place, candidate in enumerate(ranked[free:], 1):
        passed_over[candidate.site] = f"number {place} of those that wait for a slot"
    return Selection(tuple(c.site for c in ranked[:free]), passed_over)


def weights(candidates: Sequence[Candidate], policy: Participation) -> dict[str, float]:
    """Site -> its share of the turns, up to a common factor. Above 0."""
    told = sorted(c.num_images for c in candidates if c.num_images > 0)
    median = float(told[len(told) // 2]) if told else 1.0

    def weight(candidate: Candidate) -> float:
        known = candidate.num_images or median
        held = min(max(known, median / IMAGES_RANGE), median * IMAGES_RANGE)
        return held * _speed(candidate.expected_s, policy.lease_s)

    return {c.site: weight(c) for c in candidates}


def expected(before_s: float | None, took_s: float | None, lease_s: float) -> float:
    """Seconds that the next turn of a site should take: the mean of what was expected of its last one and what it took.

    before_s: None if nothing was expected. took_s: None if nothing came of it, which counts as OVERRUN leases.
    """
    took = OVERRUN * lease_s if took_s is None else min(took_s, OVERRUN * lease_s)
    return took if before_s is None else (before_s + took) / 2


def _speed(expected_s: float | None, lease_s: float) -> float:
    if expected_s is None or expected_s <= lease_s:
        return 1.0
    return (lease_s / min(expected_s, OVERRUN * lease_s)) ** 2


def _why_not(candidate: Candidate, policy: Participation) -> str:
    """Why this site cannot be invited now; empty: it can."""
    if candidate.invited:
        return "is invited"
    if not candidate.connected:
        return "is not connected"
    if candidate.occupied:
        return candidate.occupied
    if candidate.load is not None and candidate.load > policy.max_load:
        return f"load {candidate.load:.2f} per core, at most {policy.max_load:g}"
    if candidate.since_s is not None and candidate.since_s < policy.min_interval_s:
        return f"began {candidate.since_s:.0f} s ago, {policy.min_interval_s:g} s must lie between"
    return ""
