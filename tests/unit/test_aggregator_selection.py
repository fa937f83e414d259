"""Selection: who may be invited, in which order, and that in the long run nobody starves and shares follow the data."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.selection import IMAGES_RANGE, OVERRUN, Candidate, Selection, expected, select, weights
from federation.jobs import Participation


def policy(**changes: object) -> Participation:
    return Participation.model_validate(
        {"mode": "invited", "concurrency": 1, "lease_s": 100.0, "max_load": 1.5} | changes
    )


def candidate(site: str, since_s: float | None = 50.0, **changes: object) -> Candidate:
    return replace(Candidate(site=site, since_s=since_s), **changes)  # type: ignore[arg-type]


# --- who may be invited --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unfit", "why"),
    [
        (candidate("b", connected=False), "is not connected"),
        (candidate("b", load=1.51), "load 1.51 per core, at most 1.5"),
        (candidate("b", occupied="is at work"), "is at work"),
        (candidate("b", since_s=9.0), "began 9 s ago, 10 s must lie between"),
        (candidate("b", invited=True), "is invited"),
    ],
)
def test_a_site_that_cannot_train_now_is_passed_over(unfit: Candidate, why: str) -> None:
    chosen = select([candidate("a", 20.0), unfit], policy(concurrency=2, min_interval_s=10.0))
    assert chosen.invite == ("a",)
    assert chosen.passed_over == {"b": why}
    assert select([unfit], policy(concurrency=2, min_interval_s=10.0)).invite == ()


def test_a_load_at_the_limit_or_untold_is_no_reason() -> None:
    chosen = select([candidate("a", load=1.5), candidate("b", load=None)], policy(concurrency=2))
    assert chosen.invite == ("a", "b")


@given(invited=st.integers(0, 6), waiting=st.integers(0, 6), concurrency=st.integers(1, 8))
def test_the_slots_are_filled_and_never_more(invited: int, waiting: int, concurrency: int) -> None:
    sites = [candidate(f"i{n}", invited=True) for n in range(invited)]
    sites += [candidate(f"w{n}") for n in range(waiting)]
    chosen = select(sites, policy(concurrency=concurrency))
    assert len(chosen.invite) == min(waiting, max(0, concurrency - invited))
    assert set(chosen.invite) | set(chosen.passed_over) == {c.site for c in sites}
    assert not set(chosen.invite) & set(chosen.passed_over)


def test_updates_that_wait_to_be_merged_hold_back_others_if_the_job_says_so() -> None:
    sites = [candidate("i", invited=True), *(candidate(f"w{n}") for n in range(5))]
    assert len(select(sites, policy(concurrency=4), unmerged=9).invite) == 3
    for unmerged, free in ((0, 3), (2, 2), (4, 0), (9, 0)):
        limited = policy(concurrency=4, max_in_flight=5)
        assert len(select(sites, limited, unmerged).invite) == free


def test_those_that_wait_for_a_slot_are_told_their_place() -> None:
    chosen = select([candidate("a", 1.0), candidate("b", 3.0), candidate("c", 2.0)], policy())
    assert chosen.invite == ("b",)
    assert chosen.passed_over == {
        "c": "number 1 of those that wait for a slot",
        "a": "number 2 of those that wait for a slot",
    }


# --- in which order ------------------------------------------------------------------------------------


def first(*candidates: Candidate, **changes: object) -> str:
    return select(candidates, policy(**changes)).invite[0]


def test_who_waits_longer_comes_first_and_a_site_without_a_turn_before_all() -> None:
    assert first(candidate("a", 50.0), candidate("b", 51.0)) == "b"
    assert first(candidate("a", 1e9, num_images=800), candidate("b", None, num_images=100)) == "b"


def test_twice_the_images_wait_half_as_long() -> None:
    small, large = candidate("a", 50.0, num_images=100), candidate("b", num_images=200)
    assert first(small, replace(large, since_s=26.0)) == "b"
    assert first(small, replace(large, since_s=24.0)) == "a"


def test_what_a_site_tells_of_its_images_counts_within_limits() -> None:
    told = {"liar": 10**12, "a": 100, "b": 100, "c": 100, "one": 1, "silent": 0}
    found = weights([candidate(site, num_images=n) for site, n in told.items()], policy())
    assert found == {
        "liar": 100 * IMAGES_RANGE,
        "a": 100,
        "b": 100,
        "c": 100,
        "one": 100 / IMAGES_RANGE,
        "silent": 100,
    }


def test_a_site_that_finishes_in_time_comes_before_one_that_does_not() -> None:
    assert first(candidate("a", expected_s=101.0), candidate("b", expected_s=100.0)) == "b"
    slow, quick = candidate("a", expected_s=100.0), candidate("b", expected_s=1.0)
    assert first(slow, quick) == "a", "within the lease speed is no merit: a slow site's images count as much"


def test_a_site_that_never_finishes_in_time_has_a_quarter_of_the_turns() -> None:
    found = weights([candidate("a", expected_s=1e9), candidate("b")], policy())
    assert found["a"] / found["b"] == 1 / OVERRUN**2
    assert first(candidate("a", expected_s=1e9)) == "a", "and a turn if there is nobody else"


def test_what_is_expected_follows_the_turns() -> None:
    assert expected(None, 40.0, 100.0) == 40.0
    assert expected(40.0, 60.0, 100.0) == 50.0
    assert expected(None, None, 100.0) == OVERRUN * 100.0
    assert expected(None, 1e9, 100.0) == OVERRUN * 100.0
    lost = expected(30.0, None, 100.0)
    assert lost > 100.0
    assert expected(lost, 30.0, 100.0) < 100.0, "one lost turn is forgiven after one good one"


@given(st.permutations([candidate(f"s{n}", 10.0 * (n % 3), num_images=n) for n in range(7)]))
def test_the_order_of_the_candidates_does_not_matter(order: list[Candidate]) -> None:
    assert select(order, policy(concurrency=3)) == select(
        sorted(order, key=lambda c: c.site), policy(concurrency=3)
    )


# --- in the long run -----------------------------------------------------------------------------------


@dataclass
class Site:
    """`works_s`: how long a turn takes. `away`: at these times it is not there; what it works at then is lost."""

    name: str
    num_images: int = 100
    works_s: float = 20.0
    load: Callable[[float], float] = lambda now: 0.5
    away: Callable[[float], bool] = lambda now: False
    began: float | None = None
    ends: float | None = None
    expected_s: float | None = None


@dataclass
class Turn:
    at: float
    site: str


@dataclass
class Federation:
    """Virtual time in steps of `step_s`, as tasks/invite.py takes them."""

    sites: list[Site]
    policy: Participation
    step_s: float = 5.0
    rule: Callable[[list[Candidate], Participation], Selection] = select
    now: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    eligible_since: dict[str, float] = field(default_factory=dict)
    """Since when a site could have been invited and was not."""
    waits: list[tuple[Site, float, float]] = field(default_factory=list)
    """Site, from when to when it was passed over though it could have trained: one entry per wait."""

    def run(self, turns: int) -> None:
        while len(self.turns) < turns:
            self.step()

    def step(self) -> None:
        lease_s = self.policy.lease_s
        for site in self.sites:
            if site.began is None or site.ends is None:
                continue
            if site.away(self.now):
                site.ends = math.inf
            if min(site.ends, site.began + lease_s) <= self.now:
                took = site.ends - site.began
                site.expected_s = expected(site.expected_s, None if math.isinf(took) else took, lease_s)
                site.ends = None
        chosen = self.rule([self._candidate(site) for site in self.sites], self.policy)
        assert (
            sum(site.ends is not None for site in self.sites) + len(chosen.invite) <= self.policy.concurrency
        )
        for site in self.sites:
            place = chosen.passed_over.get(site.name, "")
            if place.startswith("number"):
                self.eligible_since.setdefault(site.name, self.now)
                continue
            since = self.eligible_since.pop(site.name, None)
            if since is not None:
                self.waits.append((site, since, self.now))
            if site.name in chosen.invite:
                site.began, site.ends = self.now, self.now + site.works_s
                self.turns.append(Turn(self.now, site.name))
        self.now += self.step_s

    def _candidate(self, site: Site) -> Candidate:
        return Candidate(
            site=site.name,
            num_images=site.num_images,
            since_s=None if site.began is None else self.now - site.began,
            expected_s=site.expected_s,
            connected=not site.away(self.now),
            load=site.load(self.now),
            invited=site.ends is not None,
        )

    def counts(self) -> Counter[str]:
        return Counter(turn.site for turn in self.turns)

    def assert_nobody_starved(self) -> None:
        """The bound of aggregator/selection.py, for every wait that there was."""
        weight = weights(
            [replace(self._candidate(site), expected_s=None) for site in self.sites], self.policy
        )
        least = 1 / OVERRUN**2  # a site's own speed may have been as bad as that, the others' as good as 1
        still = [
            (s, self.eligible_since[s.name], self.now) for s in self.sites if s.name in self.eligible_since
        ]
        for site, since, until in [*self.waits, *still]:
            # of a site that is new the wait begins when all that were new with it have had a turn
            begun = max([t.at for t in self.turns if t.site == site.name and t.at < since], default=None)
            if begun is None:
                continue
            others = sum(1 for t in self.turns if since <= t.at < until)
            heavier = sum(w for name, w in weight.items() if name != site.name) / (least * weight[site.name])
            bound = len(self.sites) - 1 + heavier * math.log((until - begun) / (since - begun))
            assert others <= bound, (site.name, since, until, others, bound)


def test_a_thousand_turns_are_shared_in_proportion_to_the_images() -> None:
    """Sizes of the twenty devices of Federated Street; four at a time; turns of different length."""
    sizes = [163, 76, 50, 39, 52, 14, 38, 8, 34, 13, 18, 39, 32, 14, 37, 30, 27, 32, 15, 34]
    sites = [Site(f"d{n:02d}", size, works_s=20.0 + 3 * (n % 5)) for n, size in enumerate(sizes)]
    federation = Federation(sites, policy(concurrency=4), step_s=1.0)
    federation.run(1000)
    federation.assert_nobody_starved()
    counts = federation.counts()
    for site in sites:
        fair = 1000 * site.num_images / sum(sizes)
        assert abs(counts[site.name] - fair) <= max(3.0, 0.15 * fair), (site, counts[site.name], fair)


def test_a_thousand_turns_with_sites_that_come_and_go_are_late_or_overloaded() -> None:
    rng = random.Random(5)

    def absences() -> Callable[[float], bool]:
        period, share, phase = rng.uniform(300, 3000), rng.uniform(0.1, 0.6), rng.uniform(0, 3000)
        return lambda now: (now + phase) % period < share * period

    def bursts() -> Callable[[float], float]:
        period, phase = rng.uniform(100, 1000), rng.uniform(0, 1000)
        return lambda now: 3.0 if (now + phase) % period < period / 3 else 0.3

    steady = [Site(f"steady{n}", 50 * 2**n) for n in range(4)]
    late = [Site(f"late{n}", 100, works_s=150.0 + 100 * n) for n in range(2)]
    away = [Site(f"away{n}", rng.randint(20, 500), rng.uniform(5, 90), away=absences()) for n in range(6)]
    busy = [Site(f"busy{n}", rng.randint(20, 500), rng.uniform(5, 90), load=bursts()) for n in range(4)]
    dead = [Site("dead", 300, works_s=math.inf)]  # it sends heartbeats, and never an update
    joins = [Site("joins", 100, away=lambda now: now < 3000)]
    sites = [*steady, *late, *away, *busy, *dead, *joins]
    federation = Federation(sites, policy(concurrency=3))
    federation.run(1000)
    federation.assert_nobody_starved()
    counts = federation.counts()
    assert set(counts) == {site.name for site in sites}, "everybody had a turn"
    assert [counts[f"steady{n}"] for n in range(4)] == sorted(counts[f"steady{n}"] for n in range(4))
    # an hour of virtual time has twelve times three leases: what the bound comes to for these sites
    longest = max(until - since for site, since, until in federation.waits if site in steady)
    assert longest < 1800
    assert counts["dead"] * 3 < counts["steady3"], "what comes to nothing is tried seldom"


def test_a_site_that_returns_after_a_long_time_has_one_turn_and_no_arrears() -> None:
    sites = [Site(f"s{n}") for n in range(4)] + [Site("back", away=lambda now: 500 < now < 50_000)]
    federation = Federation(sites, policy())
    while federation.now < 51_000:
        federation.step()
    since = [turn.site for turn in federation.turns if turn.at >= 50_000]
    assert since[0] == "back"
    counts = Counter(since)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_same_federation_gives_the_same_turns() -> None:
    def turns() -> list[Turn]:
        federation = Federation(
            [Site(f"s{n}", 10 + n, works_s=7.0 * n) for n in range(9)], policy(concurrency=3)
        )
        federation.run(200)
        return federation.turns

    assert turns() == turns()


@given(
    images=st.lists(st.integers(1, 10_000), min_size=2, max_size=8),
    works=st.lists(st.integers(1, 300), min_size=8, max_size=8),
    concurrency=st.integers(1, 3),
)
def test_nobody_starves_whatever_the_sites_are(images: list[int], works: list[int], concurrency: int) -> None:
    sites = [Site(f"s{n}", size, float(works[n])) for n, size in enumerate(images)]
    federation = Federation(sites, policy(concurrency=concurrency))
    federation.run(100)
    federation.assert_nobody_starved()


def test_the_bound_finds_a_rule_that_starves() -> None:
    """With the largest site always first the smallest one has no second turn."""

    def largest_first(candidates: list[Candidate], policy: Participation) -> Selection:
        return select([replace(c, since_s=c.since_s and 1.0) for c in candidates], policy)

    sites = [Site("small", 10), Site("large", 80), Site("larger", 90)]
    federation = Federation(sites, policy(), rule=largest_first)
    federation.run(300)
    with pytest.raises(AssertionError):
        federation.assert_nobody_starved()
