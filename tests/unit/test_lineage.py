"""What a version is made of: the line that led to it, and each site's share, with rollbacks in between."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import transitions
from aggregator.lineage import lineage
from federation.jobs import JobSpec, ModelRef
from federation.types import (
    Accepted,
    Contribution,
    Created,
    Event,
    Head,
    LogRecord,
    ModelVersion,
    Promoted,
    Published,
    RolledBack,
)
from tests.factories import client_update, job_spec


def ref(number: int) -> ModelRef:
    return ModelRef(key=f"models/{number}", sha256=f"{number:064x}", nbytes=1)


class Log:
    """Makes records as the tasks do, by the real transitions."""

    def __init__(self, spec: JobSpec | None = None) -> None:
        self.spec = spec or job_spec()
        self.records: list[LogRecord] = []
        self._append(Created(), Head(current=ModelVersion(version=0, model=ref(0))))

    @property
    def head(self) -> Head:
        return self.records[-1].head

    def _append(self, event: Event, head: Head) -> None:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        nonce = f"{len(self.records):032x}"
        record = LogRecord(job="toy", seq=len(self.records), nonce=nonce, at=at, event=event, head=head)
        self.records.append(record)

    def merge(self, *sites: str, weight: float = 0.5, images: int = 10, staleness: int = 0) -> int:
        """One publish that folds an update of each of `sites`. Returns its version."""
        merged = []
        for i, site in enumerate(sites):
            version = self.head.version + 1 + i
            update = client_update(site=site, base_version=self.head.version, num_examples=images)
            contribution = Contribution(update=update, staleness=staleness, weight=weight, version=version)
            merged.append(contribution)
        for contribution in merged:
            self._append(Accepted(contribution=contribution), transitions.accept(self.head, contribution))
        event = Published(merged=tuple(merged))
        current = ModelVersion(version=merged[-1].version, model=ref(merged[-1].version))
        self._append(event, transitions.publish(self.spec, self.head, event, current))
        return current.version

    def roll_back(self, to: int) -> int:
        target = next(r.head.current for r in self.records if r.head.version == to)
        head = transitions.roll_back(self.spec, self.head, target, ())
        self._append(RolledBack(to=to), head)
        return head.version

    def sites(self, version: int) -> set[str]:
        return set(lineage(self.records, version).parts)


def test_version_0_is_nobodys_work() -> None:
    found = lineage(Log().records, 0)
    assert (found.line, found.spans, found.parts, found.updates) == ((0,), ((0, 0),), {}, 0)


def test_a_version_is_made_of_what_was_merged_up_to_it_and_no_further() -> None:
    log = Log()
    log.merge("a")
    log.merge("b", "c")
    log.merge("d")
    assert [log.sites(version) for version in (1, 3, 4)] == [{"a"}, {"a", "b", "c"}, {"a", "b", "c", "d"}]
    assert lineage(log.records, 4).line == (0, 1, 3, 4)
    assert lineage(log.records, 4).spans == ((0, 4),)


def test_a_version_that_was_folded_over_was_never_stored() -> None:
    log = Log()
    log.merge("a", "b")
    with pytest.raises(ValueError, match="no stored version 1"):
        lineage(log.records, 1)


def test_what_a_rollback_abandons_is_not_in_what_comes_after_it() -> None:
    log = Log()
    log.merge("a")
    log.merge("bad")
    back = log.roll_back(1)
    after = log.merge("c")
    assert log.sites(back) == {"a"}
    assert log.sites(after) == {"a", "c"}
    assert log.sites(2) == {"a", "bad"}
    assert lineage(log.records, after).line == (0, 1, 3, 4)
    assert lineage(log.records, after).spans == ((0, 1), (3, 4))
    assert 2 not in lineage(log.records, log.head.version).line


def test_a_later_rollback_may_take_up_an_abandoned_version_again() -> None:
    log = Log()
    log.merge("a")
    kept = log.merge("b")
    log.merge("bad")
    log.roll_back(1)
    log.merge("c")
    again = log.roll_back(kept)
    assert log.sites(again) == {"a", "b"}
    assert log.sites(log.merge("d")) == {"a", "b", "d"}


def test_a_rollback_to_a_rollback() -> None:
    log = Log()
    log.merge("a")
    log.merge("bad")
    first = log.roll_back(1)
    log.merge("worse")
    second = log.roll_back(first)
    assert log.sites(second) == {"a"}
    assert lineage(log.records, second).spans == ((0, 1), (first, first), (second, second))


def test_a_rollback_to_version_0_leaves_nobody() -> None:
    log = Log()
    log.merge("a")
    assert log.sites(log.roll_back(0)) == set()


def test_records_that_make_no_version_change_nothing() -> None:
    log = Log()
    log.merge("a")
    log._append(Promoted(version=1), transitions.promote(log.head, log.head.current))
    assert lineage(log.records, log.merge("b")).line == (0, 1, 2)


def test_a_share_is_the_part_of_all_weights() -> None:
    log = Log()
    log.merge("a", weight=0.6, images=100)
    log.merge("a", weight=0.3, images=120, staleness=3)
    newest = log.merge("b", weight=0.3, images=7)
    found = lineage(log.records, newest)
    assert found.parts["a"].share == pytest.approx(0.75)
    assert found.parts["b"].share == pytest.approx(0.25)
    assert (found.parts["a"].updates, found.parts["a"].images) == (2, 120)
    assert (found.updates, found.mean_staleness) == (3, 1.0)


def test_weights_that_are_all_0_leave_the_numbers_of_updates() -> None:
    log = Log()
    log.merge("a", "a", "a", weight=0.0)
    found = lineage(log.records, log.merge("b", weight=0.0))
    assert {site: part.share for site, part in found.parts.items()} == {"a": 0.75, "b": 0.25}


@given(st.lists(st.one_of(st.sampled_from("abc"), st.integers(0, 30)), max_size=30))
def test_any_history(steps: list[str | int]) -> None:
    """A version's contributors are its parent's and those that were merged into it; shares add up to 1."""
    log = Log()
    expected: dict[int, list[str]] = {0: []}
    for step in steps:
        before = log.head.version
        if isinstance(step, str):
            expected[log.merge(step)] = [*expected[before], step]
        elif step < before:
            expected[log.roll_back(step)] = expected[step]
    for version, sites in expected.items():
        found = lineage(log.records, version)
        assert {site: part.updates for site, part in found.parts.items()} == {
            s: sites.count(s) for s in sites
        }
        assert sum(part.share for part in found.parts.values()) == pytest.approx(1.0 if sites else 0.0)
        assert all(first <= last for first, last in found.spans)
