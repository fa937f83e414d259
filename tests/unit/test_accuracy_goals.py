"""How benchmarks/accuracy.py judges its goals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aggregator.weighting import group_size
from benchmarks.accuracy import SEEDS, TOTAL_STEPS, Row, _goals, rows
from federation.jobs import ConstantStaleness, HingeStaleness, ParticipationStaleness, PolynomialStaleness


def line(*points: tuple[float, float]) -> dict[str, Any]:
    """A result whose curve goes through (time, mAP@0.5)."""
    return {"curve": [{"time": time, "metrics": {"mAP@0.5": value}} for time, value in points]}


def test_a_row_is_compared_with_central_over_the_seeds_that_both_have() -> None:
    central = {0: line((3000, 0.6)), 1: line((3000, 0.7))}
    near = list(_goals({"central": central, "async": {0: line((1500, 0.585))}}))
    assert near == ["async within 0.02 of central: +0.015 over 1 seeds, reached"]
    both = {0: line((1500, 0.58)), 1: line((1500, 0.6))}
    assert list(_goals({"central": central, "async": both})) == [
        "async within 0.02 of central: +0.060 over 2 seeds, missed"
    ]


def test_the_slow_row_is_judged_by_the_first_version_that_reaches_the_bar() -> None:
    found = {
        "central": {seed: line((3000, 0.6)) for seed in (0, 1)},
        "slow": {0: line((1000, 0.5), (2000, 0.56)), 1: line((1000, 0.55), (2000, 0.58))},
        "fedavg-slow": {0: line((3000, 0.5), (9000, 0.53)), 1: line((2000, 0.55), (9000, 0.6))},
    }
    assert list(_goals(found)) == [
        "seed 0: slow reaches 90% of central (0.540) at 2,000, less than 0.22 of the time of rounds: reached",
        "seed 1: slow reaches 90% of central (0.540) at 1,000, 0.50 of the time of rounds: missed",
        "mean of the curves: slow reaches 90% of central (0.540) at 2,000, 0.22 of the time of rounds: reached",
    ]
    found["slow"] = {0: line((1000, 0.5))}
    assert list(_goals(found)) == [
        "seed 0: slow never reaches 90% of central (0.540), rounds neither: missed"
    ]
    found["slow"] = {1: line((1000, 0.5))}
    assert list(_goals(found)) == [
        "seed 1: slow never reaches 90% of central (0.540), rounds at 2,000: missed"
    ]


def test_a_run_of_another_staleness_is_another_run() -> None:
    row = next(row for row in rows(0) if row.name == "slow")

    def settings(staleness: Any) -> str:
        aggregation = row.spec.aggregation.model_copy(update={"staleness": staleness})
        other: Row = replace(row, spec=row.spec.model_copy(update={"aggregation": aggregation}))
        return other.settings

    kinds = [ConstantStaleness(), PolynomialStaleness(), HingeStaleness(), ParticipationStaleness()]
    assert len({settings(kind) for kind in kinds}) == len(kinds)
    assert settings(ParticipationStaleness(limit=3)) == row.settings


def test_every_federation_makes_as_many_steps_as_central() -> None:
    for row in (row for seed in SEEDS for row in rows(seed)):
        merged = row.spec.stop.max_versions * group_size(row.spec) * row.spec.plan.local_steps
        assert len(row.files) == 1 or merged == TOTAL_STEPS
