"""FedAvgM, FedAdam and FedYogi against the papers' formulas in float64, and the life of their state."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.merge import Merge
from aggregator.server_opt import OptimizerState, initial_state, step
from federation.jobs import ServerOptimizer
from tests.unit.aggregator_cases import floats, fold, integers, make_layout, make_spec, payload_for

BETA1, BETA2, EPSILON, ETA = 0.9, 0.99, 1e-3, 0.5


def reference(kind: str, x: float, directions: list[float]) -> float:
    """Reddi et al. 2021, algorithm 2 (FedAdam, FedYogi); Hsu et al. 2019 (FedAvgM), for one parameter."""
    m, v = 0.0, EPSILON**2
    for delta in directions:
        if kind == "fedavgm":
            m = BETA1 * m + delta
            x += ETA * m
            continue
        m = BETA1 * m + (1 - BETA1) * delta
        if kind == "fedadam":
            v = BETA2 * v + (1 - BETA2) * delta**2
        else:
            v = v - (1 - BETA2) * delta**2 * math.copysign(v != delta**2, v - delta**2)
        x += ETA * m / (math.sqrt(v) + EPSILON)
    return x


KINDS = ["fedavgm", "fedadam", "fedyogi"]


def test_golden_first_steps() -> None:
    # Δ = 1: FedAvgM moves by η; the adaptive ones by η·0.1/(√(ε² + 0.01·1) + ε), with 0.99·ε² for FedAdam
    assert reference("fedavgm", 0, [1]) == 0.5
    assert reference("fedadam", 0, [1]) == pytest.approx(0.5 * 0.1 / (math.sqrt(0.99e-6 + 0.01) + 1e-3))
    assert reference("fedyogi", 0, [1]) == pytest.approx(0.5 * 0.1 / (math.sqrt(1e-6 + 0.01) + 1e-3))


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8))
def test_steps_follow_the_paper(kind: str, directions: list[float]) -> None:
    optimizer = ServerOptimizer.model_validate({"kind": kind})
    state, x = initial_state(optimizer, 1), floats(0)
    for delta in directions:
        step(optimizer, state, x, floats(delta), ETA)
    assert x[0] == pytest.approx(reference(kind, 0.0, directions), rel=1e-3, abs=1e-3)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), st.floats(0, 0.999))
def test_the_second_moment_of_yogi_is_never_negative(directions: list[float], beta2: float) -> None:
    optimizer = ServerOptimizer(kind="fedyogi", beta2=beta2)
    state, x = initial_state(optimizer, 1), floats(0)
    for delta in directions:
        step(optimizer, state, x, floats(delta), ETA)
        assert state.v is not None
        assert state.v[0] >= 0
        assert np.isfinite(x[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_the_direction_is_the_merged_one(strategy: str, kind: str) -> None:
    spec = make_spec(
        strategy,
        sites=("site-a", "site-b"),
        buffer_size=2,
        server_learning_rate=ETA,
        server_optimizer={"kind": kind},
    )
    x, state, version = floats(1.0), None, 0
    for values in ((2.0, 4.0), (-1.0, 0.5), (3.0, 3.0)):  # differences; FedAvg gets the models x + difference
        sent = values if strategy == "fedbuff" else tuple(float(x[0]) + v for v in values)
        payloads = [payload_for(spec, floats(v), base=version) for v in sent]
        result = fold(spec, make_layout(1), x, payloads, state=state, version=version)
        x, state, version = result.flat, result.state, result.version
    assert x[0] == pytest.approx(reference(kind, 1.0, [3.0, -0.25, 3.0]), rel=1e-4)


def test_state_is_returned_for_storing_and_is_none_without_an_optimiser() -> None:
    layout = make_layout(3, 2)
    payload = np.ones(layout.float_count, np.float32)
    shapes = {}
    for kind in KINDS:
        spec = make_spec("fedbuff", buffer_size=1, server_optimizer={"kind": kind})
        state = fold(spec, layout, payload, [payload_for(spec, payload)]).state
        assert state is not None
        shapes[kind] = [None if part is None else (part.dtype, part.shape) for part in (state.m, state.v)]
    both = [(np.float32, (3,)), (np.float32, (3,))]
    assert shapes == {"fedavgm": [both[0], None], "fedadam": both, "fedyogi": both}
    spec = make_spec("fedbuff", buffer_size=1)
    assert fold(spec, layout, payload, [payload_for(spec, payload)]).state is None


def test_the_initial_second_moment_is_epsilon_squared() -> None:
    state = initial_state(ServerOptimizer(kind="fedadam", epsilon=0.5), 2)
    assert state.v is not None
    assert (state.m.tolist(), state.v.tolist()) == ([0, 0], [0.25, 0.25])


@pytest.mark.parametrize(
    ("optimizer", "state", "message"),
    [
        (None, OptimizerState(floats(0), None), "neither a server optimiser"),
        ({"kind": "fedadam"}, OptimizerState(floats(0), None), "first and second moments"),
        ({"kind": "fedavgm"}, OptimizerState(floats(0), floats(0)), "first moments alone"),
        ({"kind": "fedavgm"}, OptimizerState(floats(0, 0), None), r"must be float32 \(1,\)"),
        ({"kind": "fedadam"}, OptimizerState(floats(0), np.zeros(1)), "must be float32"),  # type: ignore[arg-type]
    ],
)
def test_a_state_of_something_else_is_refused(
    optimizer: dict[str, str] | None, state: OptimizerState, message: str
) -> None:
    spec = make_spec("fedbuff", server_optimizer=optimizer)
    with pytest.raises(ValueError, match=message):
        Merge(spec, make_layout(1), floats(0), integers(), state, 0)
