"""One test for each mistake that known federated-learning frameworks make (docs/architecture.md, merging)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aggregator.staleness import hinge, polynomial
from aggregator.weighting import assign
from federation.jobs import PolynomialStaleness
from tests.unit.aggregator_cases import (
    SITES,
    floats,
    fold,
    integers,
    make_layout,
    make_spec,
    make_update,
    payload_for,
)


@pytest.mark.parametrize("tau", [1, 4, 8, 24])
def test_the_root_is_taken_of_one_plus_tau(tau: int) -> None:
    assert polynomial(tau) == pytest.approx(1 / math.sqrt(1 + tau), rel=1e-15)
    assert polynomial(tau) != pytest.approx(1 / (1 + math.sqrt(tau)), rel=1e-2)


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff"])
def test_a_fresh_update_has_staleness_zero_and_full_weight(strategy: str) -> None:
    spec = make_spec(strategy, alpha=1.0, staleness=PolynomialStaleness(a=1.0), buffer_size=1)
    contribution = assign(spec, make_update(base_version=3), version=3, position=0)
    assert (contribution.staleness, contribution.weight) == (0, 1.0)


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
def test_stale_updates_are_damped_not_amplified(a: float) -> None:
    assert polynomial(9, a) < polynomial(1, a) < polynomial(0, a) == 1.0


def test_alpha_does_not_decay_after_a_stale_update() -> None:
    spec, layout = make_spec(alpha=0.5, max_staleness=1000), make_layout(1)
    payloads = [payload_for(spec, floats(0), base=0), payload_for(spec, floats(0), base=101)]
    stale, fresh = fold(spec, layout, floats(1), payloads, version=100).merged
    assert stale.weight == pytest.approx(0.5 / math.sqrt(101))
    assert fresh.weight == 0.5


def test_hinge_adds_one_outside_the_product() -> None:
    assert hinge(8, a=10, b=4) == 1 / (10 * (8 - 4) + 1)
    assert hinge(5, a=0.01, b=4) <= 1.0  # without the +1 it would be 100


def test_an_unchanged_stale_model_does_not_drag_the_global_one_back() -> None:
    spec, layout = make_spec("fedbuff", buffer_size=2), make_layout(3)
    x = floats(1.5, -2.25, 1e-3)
    idle = [payload_for(spec, floats(0, 0, 0), base=base) for base in (0, 3)]
    assert fold(spec, layout, x, idle, version=50).flat.tobytes() == x.tobytes()


@pytest.mark.parametrize(("strategy", "sites"), [("fedasync", SITES), ("fedavg", ("site-a",))])
def test_whole_models_are_mixed_not_added(strategy: str, sites: tuple[str, ...]) -> None:
    spec, layout = make_spec(strategy, sites=sites), make_layout(2)
    x = floats(0.1, -3.7)
    assert fold(spec, layout, x, [payload_for(spec, x)]).flat.tobytes() == x.tobytes()


def test_alpha_is_not_divided_by_the_number_of_sites() -> None:
    few, many = (make_spec(alpha=0.6, sites=tuple(f"site-{i}" for i in range(n))) for n in (1, 50))
    for spec in (few, many):
        result = fold(spec, make_layout(1), floats(0), [payload_for(spec, floats(1), site="site-0")])
        assert result.flat[0] == np.float32(0.6)


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff", "fedavg"])
def test_integer_counters_stay_int64_and_exact(strategy: str) -> None:
    spec, layout = make_spec(strategy, sites=("site-a",), buffer_size=1), make_layout(1, 1, counters=2)
    large = 2**53 + 1  # not representable as a float
    payload = payload_for(spec, floats(0, 0, 1), integers(large, 5))
    result = fold(spec, layout, floats(0, 0, 1), [payload], ints=integers(7, 7))
    assert result.ints.dtype == np.int64
    assert result.ints.tolist() == [large, 7]


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedyogi"])
@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_a_server_optimiser_never_touches_running_variances(strategy: str, kind: str) -> None:
    plain = make_spec(strategy, sites=("site-a",), buffer_size=1)
    adaptive = make_spec(
        strategy,
        sites=("site-a",),
        buffer_size=1,
        server_learning_rate=10.0,
        server_optimizer={"kind": kind},
    )
    layout, x = make_layout(1, 1), floats(0.0, 5.0, 9.0)
    results = []
    for spec in (plain, adaptive):
        flat, state, version = x, None, 0
        for variance in (1.0, 1e-6, 1e-6):  # falling: a step along the difference overshoots below zero
            result = fold(
                spec,
                layout,
                flat,
                [payload_for(spec, floats(1.0, 5.0, variance), base=version)],
                state=state,
                version=version,
            )
            flat, state, version = result.flat, result.state, result.version
        results.append(flat)
    assert results[0][1:].tobytes() == results[1][1:].tobytes()
    assert results[1][2] >= 0
    assert results[0][0] != results[1][0]
