"""Stop rules and the gate, by the server's figures and by the sites', late and out of order."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from aggregator import transitions
from aggregator.gate import Failure, failure
from aggregator.stopping import last_version, why_stop
from federation.best import Course
from federation.jobs import StopRule
from federation.types import SERVER, AbandonedLine, Evaluation, Head, Quarantine
from tests.unit.aggregator_cases import NOW, make_head, make_version

METRIC = "mAP@0.5"
Figures = Mapping[int, float | Mapping[str, float]]


def evaluations(figures: Figures, images: Mapping[str, int] | None = None) -> list[Evaluation]:
    """version -> the server's figure, or figures by site."""
    return [
        Evaluation(
            job="toy",
            version=version,
            who=who,
            num_images=(images or {}).get(who, 10),
            metrics={METRIC: value},
            at=NOW,
        )
        for version, by in figures.items()
        for who, value in ({SERVER: by} if isinstance(by, float) else dict(by)).items()
    ]


def course(figures: Figures, images: Mapping[str, int] | None = None) -> Course:
    return Course(evaluations(figures, images), METRIC)


def stop(figures: Figures, head: Head | None = None, **rule: Any) -> str | None:
    return why_stop(StopRule(**rule), course(figures), head or make_head(100), NOW)


def quarantined(version: int, offered: int, newest: int = 100, **changes: Any) -> Head:
    quarantine = Quarantine(version=version, reason="worse", offered=make_version(offered))
    return make_head(newest, quarantine=quarantine, **changes)


# --- max_versions, target, deadline --------------------------------------------------------------------------


def test_the_last_version_is_exact() -> None:
    rule = StopRule(max_versions=12)
    assert last_version(rule, 11) is None
    assert last_version(rule, 12) == "version 12, the last of stop.max_versions, is made"


def test_no_rule_stops_nothing() -> None:
    assert stop({0: 0.1, 4: 1.0, 8: 0.0}) is None


def test_a_target_is_reached_at_its_value() -> None:
    assert stop({4: 0.6, 8: 0.69}, target=0.7) is None
    reached = "version 8 reached mAP@0.5 0.7, the target is 0.7"
    assert stop({4: 0.6, 8: 0.7}, target=0.7) == reached
    assert stop({12: 0.9, 4: 0.6, 8: 0.7}, target=0.7) == reached, "the first that did, whoever came first"


def test_a_version_that_is_withdrawn_reaches_nothing() -> None:
    rolled_back = make_head(100, abandoned=(AbandonedLine(first=5, last=8),))
    assert stop({4: 0.6, 8: 0.9}, rolled_back, target=0.7) is None
    assert stop({4: 0.6, 8: 0.9}, quarantined(8, 4), target=0.7) is None
    assert stop({4: 0.75, 8: 0.9}, quarantined(8, 4), target=0.7) is not None


def test_the_mean_of_the_sites_reaches_the_target_when_all_have_reported() -> None:
    first = {4: {"a": 0.5, "b": 0.5}}
    assert stop({**first, 8: {"a": 0.9}}, target=0.7) is None, "b has not measured it yet"
    assert stop({**first, 8: {"a": 0.9, "b": 0.6}}, target=0.7) is not None
    assert stop({**first, 8: {"a": 0.9}, 12: {"a": 0.6}}, target=0.7) is not None, "b has gone, it seems"


def test_a_deadline_passes() -> None:
    at = NOW.astimezone(timezone(timedelta(hours=2)))
    assert stop({}, deadline=NOW + timedelta(seconds=1)) is None
    assert stop({}, make_head(17), deadline=at) == (
        "the deadline, 2026-01-02 02:00 UTC+02:00, has passed at version 17"
    )


def test_a_closed_job_is_not_closed_again() -> None:
    assert stop({4: 0.9}, make_head(4, closed="over"), target=0.7, deadline=NOW) is None


# --- patience ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ([0.5], False),
        ([0.5, 0.4], False),
        ([0.5, 0.4, 0.3], True),
        ([0.5, 0.5, 0.5], True),  # as good is no improvement
        ([0.5, 0.4, 0.6, 0.5], False),
        ([0.5, 0.4, 0.6, 0.5, 0.6], True),
        ([0.5, 0.4, 0.4, 0.4, 0.6], False),  # it was over once, when a figure had not come
    ],
)
def test_patience_counts_measured_versions_in_a_row(values: list[float], over: bool) -> None:
    figures = {4 * i: value for i, value in enumerate(values)}
    assert (stop(figures, patience=2) is not None) is over


def test_patience_says_which_versions_and_of_what() -> None:
    assert stop({4: 0.703, 8: 0.7, 12: 0.701}, patience=2, min_improvement=0.005) == (
        "2 measured versions in a row, 8 to 12, did not beat mAP@0.5 0.703 of version 4 by more than 0.005"
    )


def test_small_steps_add_up() -> None:
    """Each is too small, and the third is more than 0.1 above the last that counted."""
    small = {0: 0.5, 1: 0.56, 2: 0.58, 3: 0.62, 4: 0.66, 5: 0.68, 6: 0.73}
    assert stop(small, patience=3, min_improvement=0.1) is None
    assert stop(small | {6: 0.719}, patience=3, min_improvement=0.1) is not None


def test_what_lies_on_the_limit_is_not_more() -> None:
    assert stop({0: 0.7, 1: 0.8}, patience=1, min_improvement=0.1) is not None  # 0.8 - 0.7 > 0.1 in floats
    assert stop({0: 0.7, 1: 0.8001}, patience=1, min_improvement=0.1) is None


def test_versions_that_were_rolled_back_do_not_count() -> None:
    figures = {0: 0.5, 1: 0.4, 2: 0.3, 3: 0.45}
    head = make_head(9, abandoned=(AbandonedLine(first=1, last=2),))
    assert stop(figures, patience=2) is not None
    assert stop(figures, head, patience=2) is None
    assert stop(figures, head, patience=1) is not None


def test_the_order_in_which_figures_come_is_no_matter() -> None:
    chance = random.Random(1)
    measured = evaluations({v: {"a": chance.random(), "b": chance.random()} for v in range(0, 40, 4)})
    rule = StopRule(patience=2, target=0.8)
    expected = why_stop(rule, Course(measured, METRIC), make_head(40), NOW)
    for _ in range(20):
        chance.shuffle(measured)
        assert why_stop(rule, Course(measured, METRIC), make_head(40), NOW) == expected


def test_what_cannot_be_compared_counts_neither_way() -> None:
    """Sites a and b measured the best; then only a stranger measures, of as many images."""
    best = {0: {"a": 0.8, "b": 0.8}}
    strangers = {v: {"c": 0.1} for v in (4, 8, 12)}
    assert stop({**best, **strangers}, patience=1) is None


def test_patience_waits_for_the_reports_on_the_newest() -> None:
    figures: dict[int, Mapping[str, float]] = {0: {"a": 0.5, "b": 0.5}, 4: {"a": 0.4}}
    assert stop(figures, patience=1) is None, "b may find it much better"
    assert stop({**figures, 4: {"a": 0.4, "b": 0.9}}, patience=1) is None
    assert stop({**figures, 4: {"a": 0.4, "b": 0.5}}, patience=1) is not None
    assert stop({**figures, 8: {"a": 0.4}}, patience=1) is not None, "version 4 is not waited for any more"


# --- the gate ------------------------------------------------------------------------------------------------


def fails(figures: Figures, head: Head | None = None, max_drop: float = 0.1) -> tuple[int, int] | None:
    found = failure(max_drop, course(figures), head or make_head(100))
    return None if found is None else (found.version, found.offered)


def test_a_drop_fails_and_the_newest_good_one_is_offered() -> None:
    found = failure(0.1, course({0: 0.1, 4: 0.7, 8: 0.65, 12: 0.312}), make_head(14))
    reason = "mAP@0.5 is 0.388 lower than at version 4, more than max_drop 0.1"
    assert found == Failure(version=12, offered=8, reason=reason)


def test_a_drop_to_the_limit_passes() -> None:
    assert fails({0: 0.8, 4: 0.7}) is None  # 0.8 - 0.7 > 0.1 in floats
    assert fails({0: 0.8, 4: 0.6999}) == (4, 0)


def test_small_drops_are_measured_from_the_best() -> None:
    assert fails({0: 0.8, 4: 0.75, 8: 0.72, 12: 0.69}) == (12, 8)


def test_the_first_of_the_failed_ones_at_the_end_counts() -> None:
    assert fails({0: 0.8, 4: 0.5, 8: 0.5}) == (4, 0)
    assert fails({0: 0.8, 4: 0.5, 8: 0.8}) is None, "measured late: the job has recovered"
    assert fails({0: 0.8, 4: 0.5, 8: 0.8, 12: 0.4}) == (12, 8)


def test_what_is_in_quarantine_does_not_fail_again() -> None:
    figures = {0: 0.8, 4: 0.8, 8: 0.5, 12: 0.5}
    assert fails(figures, quarantined(8, 4)) is None
    assert fails(figures | {4: 0.5}, quarantined(8, 4)) == (4, 0), "an earlier one, measured late, does"
    assert fails(figures | {12: 0.9}, quarantined(8, 4)) is None


def test_what_was_cleared_does_not_fail_again_and_a_later_one_may() -> None:
    head = make_head(100, cleared=(8,))
    assert fails({0: 0.8, 8: 0.5}, head) is None
    assert fails({0: 0.8, 8: 0.5, 12: 0.45}, head) is None, "it is like the one that was cleared"
    assert fails({0: 0.8, 8: 0.5, 12: 0.3}, head) == (12, 8)
    assert fails({0: 0.8, 4: 0.2, 8: 0.5}, head) is None


def test_what_was_rolled_back_is_no_measure() -> None:
    head = make_head(100, abandoned=(AbandonedLine(first=4, last=8),))
    assert fails({0: 0.5, 4: 0.9, 8: 0.1, 12: 0.5}, head) is None


def test_what_the_log_does_not_know_yet_is_not_judged() -> None:
    assert fails({0: 0.8, 4: 0.5}, make_head(3)) is None


def test_the_gate_of_the_sites_figures_acts_as_soon_as_half_of_the_images_say_so() -> None:
    good = {0: {"a": 0.8, "b": 0.8}}
    assert fails({**good, 4: {"a": 0.5}}) == (4, 0)
    images = {"a": 10, "b": 30}
    by_few = course({**good, 4: {"a": 0.5}}, images)
    assert failure(0.1, by_few, make_head(100)) is None
    assert failure(0.1, course({**good, 4: {"b": 0.5}}, images), make_head(100)) is not None
    assert fails({**good, 4: {"c": 0.1}}) is None, "a stranger's figures compare with nothing"


# --- the head after it ---------------------------------------------------------------------------------------


def test_a_quarantine_offers_an_older_version_until_it_is_cleared() -> None:
    head = transitions.quarantine(make_head(10), 8, "worse", make_version(4))
    assert (head.version, head.offered, head.idle_because) == (
        10,
        make_version(4),
        "version 8 is in quarantine: worse",
    )
    assert [head.withdrawn(v) for v in (7, 8, 10)] == [None, "in quarantine", "in quarantine"]
    earlier = transitions.quarantine(head, 6, "worse still", make_version(4))
    assert earlier.quarantine is not None
    assert earlier.quarantine.version == 6
    cleared = transitions.clear(head)
    assert (cleared.offered, cleared.idle_because, cleared.cleared) == (make_version(10), None, (8,))


@pytest.mark.parametrize(
    ("head", "version", "offered"),
    [
        (make_head(10), 11, 4),
        (make_head(10), 4, 4),
        (quarantined(6, 4, 10), 8, 4),
        (quarantined(6, 4, 10), 6, 4),
        (make_head(10, cleared=(8,)), 8, 4),
        (make_head(10, cleared=(8,)), 6, 4),
        (make_head(10, abandoned=(AbandonedLine(first=3, last=5),)), 8, 4),
        (make_head(10, abandoned=(AbandonedLine(first=3, last=8),)), 8, 2),
    ],
)
def test_a_quarantine_that_cannot_be(head: Head, version: int, offered: int) -> None:
    with pytest.raises(ValueError, match="version"):
        transitions.quarantine(head, version, "worse", make_version(offered))


def test_nothing_in_quarantine_cannot_be_cleared() -> None:
    with pytest.raises(ValueError, match="no version"):
        transitions.clear(make_head(3))


def test_deadlines_have_a_zone() -> None:
    assert StopRule(deadline=datetime(2026, 1, 1, tzinfo=UTC)).deadline is not None
    with pytest.raises(ValueError, match="timezone"):
        StopRule(deadline=datetime(2026, 1, 1))
