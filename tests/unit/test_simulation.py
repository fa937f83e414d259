"""The federation in virtual time: who trains when. The training itself is a toy's: it adds noise to the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.simulation import Site, Snapshot, federate
from detection import engine
from federation.jobs import AggregationPolicy, JobSpec, Participation, StopRule
from tests.factories import Arrays, job_spec, toy_arrays


@pytest.fixture(autouse=True)
def _toy_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(spec: JobSpec, weights: Arrays, dataset: Any, *, seed: int, **_: object) -> SimpleNamespace:
        noise = np.random.default_rng(seed).normal(0, 0.01, 4).astype(np.float32)
        trained = weights | {"norm.bias": weights["norm.bias"] + noise}
        return SimpleNamespace(
            weights=trained, num_examples=dataset.num_examples, metrics={}, optimizer_state=None
        )

    monkeypatch.setattr(engine, "train", train)


def sites(*num_images: int, step_times: tuple[float, ...] = ()) -> list[Site]:
    times = step_times or (1.0,) * len(num_images)
    datasets: list[Any] = [SimpleNamespace(num_examples=size) for size in num_images]
    return [
        Site(f"s{n}", dataset, step_time)
        for n, (dataset, step_time) in enumerate(zip(datasets, times, strict=True))
    ]


def spec(versions: int) -> JobSpec:
    policy = AggregationPolicy(strategy="fedbuff", buffer_size=2)
    return job_spec(aggregation=policy, max_inflight=1, stop=StopRule(max_versions=versions))


def invited(versions: int, **changes: int) -> JobSpec:
    participation = Participation(mode="invited", concurrency=4, **changes)
    return spec(versions).model_copy(update={"participation": participation})


def last(snapshots: Any) -> Snapshot:
    *_, found = snapshots
    assert isinstance(found, Snapshot)
    return found


def test_without_a_limit_each_site_works_at_its_own_speed() -> None:
    end = last(federate(spec(100), sites(10, 1000, step_times=(1.0, 1.0)), toy_arrays()))
    assert end.updates == {"s0": 100, "s1": 100}
    three = sites(10, 10, 10, step_times=(1.0, 1.0, 4.0))
    slow = last(federate(spec(100), three, toy_arrays()))
    assert slow.updates["s0"] > 2 * slow.updates["s2"] > 0


def test_with_a_limit_the_turns_are_shared_in_proportion_to_the_images() -> None:
    sizes = (10, 20, 30, 40, 50, 60, 70, 40, 40, 40)
    end = last(federate(invited(200), sites(*sizes), toy_arrays()))
    for n, size in enumerate(sizes):
        assert end.updates[f"s{n}"] == pytest.approx(400 * size / sum(sizes), rel=0.2)
    assert end.time == 100 * 40.0, "four at a time, forty steps each"


def test_a_site_that_must_pause_goes_on_when_its_pause_ends_and_not_when_another_finishes() -> None:
    """Forty steps a turn: the fast site begins every 50, the slow one's turn takes 400."""
    paced = spec(100).model_copy(
        update={
            "participation": Participation(mode="invited", concurrency=2, min_interval_s=50.0),
            "aggregation": AggregationPolicy(strategy="fedbuff", buffer_size=1),
        }
    )
    end = last(federate(paced, sites(10, 10, step_times=(1.0, 10.0)), toy_arrays()))
    fast, slow = end.updates["s0"], end.updates["s1"]
    assert fast + slow == 100
    assert end.time == pytest.approx(50 * fast, rel=0.05)
    assert end.time == pytest.approx(400 * slow, rel=0.15)


def test_fewer_updates_in_flight_are_less_stale() -> None:
    speeds = tuple(1 + 0.03 * n for n in range(10))
    loose = last(federate(invited(200), sites(*[10] * 10, step_times=speeds), toy_arrays()))
    tight = last(federate(invited(200, max_in_flight=3), sites(*[10] * 10, step_times=speeds), toy_arrays()))
    assert tight.mean_staleness < loose.mean_staleness / 2


def test_those_that_finish_at_once_are_merged_before_anybody_starts() -> None:
    pairs = spec(100).model_copy(update={"participation": Participation(mode="invited", concurrency=2)})
    equal = last(federate(pairs, sites(10, 10, 10), toy_arrays()))
    assert equal.mean_staleness == 0
    uneven = last(federate(pairs, sites(10, 10, 10, step_times=(1.0, 1.01, 1.02)), toy_arrays()))
    assert uneven.mean_staleness > 0.4


def test_the_same_run_gives_the_same_model() -> None:
    models = [last(federate(invited(30), sites(10, 20, 30, 40), toy_arrays())).model.flat for _ in range(2)]
    assert np.array_equal(models[0], models[1])
