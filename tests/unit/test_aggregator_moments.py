"""Shared moments of the sites' optimisers: how they are averaged, beside the weights and apart from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.blocks import Floats
from aggregator.merge import Merge, MergeResult
from aggregator.server_opt import OptimizerState
from federation.jobs import JobSpec, TrainingPlan
from tests.unit.aggregator_cases import (
    Payload,
    floats,
    fold,
    integers,
    make_layout,
    make_spec,
    payload_for,
)

ADAM = TrainingPlan(optimizer_state="shared")
SGD = TrainingPlan(optimizer_state="shared", optimizer="sgd")
LAYOUT = make_layout(1, 1)  # one weight, one running mean, one variance


def payload(
    spec: JobSpec, weight: float, m: float, v: float, *, base: int = 0, site: str = "site-a", n: int = 1
) -> Payload:
    return payload_for(spec, floats(weight, m, v, 0.0, 1.0), base=base, site=site, n=n)


def state_of(result: MergeResult) -> tuple[float, float]:
    assert result.state is not None
    assert result.state.v is not None
    return result.state.m.item(), result.state.v.item()


def begin() -> Floats:
    return floats(0.0, 0.0, 1.0)


def test_the_first_version_has_the_mean_of_the_moments_that_made_it() -> None:
    spec = make_spec("fedbuff", plan=ADAM, buffer_size=2)
    result = fold(spec, LAYOUT, begin(), [payload(spec, 1, 2, 4), payload(spec, 3, 6, 8, site="site-b")])
    assert result.flat[0] == 2.0, "the differences are averaged as ever"
    assert state_of(result) == (4.0, 6.0)


def test_a_later_version_keeps_the_share_that_staleness_takes_from_the_updates() -> None:
    spec = make_spec("fedbuff", plan=ADAM, buffer_size=2)
    updates = [
        payload(spec, 0, 2, 4, base=3),
        payload(spec, 0, 6, 8, base=0, site="site-b"),
    ]  # s(0) = 1, s(3) = 1/2
    state = OptimizerState(floats(10), floats(20))
    result = fold(spec, LAYOUT, begin(), updates, state=state, version=3)
    mean_m, mean_v = (2 + 6 / 2) / 1.5, (4 + 8 / 2) / 1.5
    assert state_of(result) == pytest.approx((0.25 * 10 + 0.75 * mean_m, 0.25 * 20 + 0.75 * mean_v))


def test_they_weigh_what_their_weights_weigh() -> None:
    spec = make_spec("fedbuff", plan=ADAM, buffer_size=2, weight_by_examples=True)
    updates = [payload(spec, 1, 1, 1, n=30), payload(spec, 5, 5, 5, site="site-b", n=10)]
    result = fold(spec, LAYOUT, begin(), updates)
    assert (result.flat[0], *state_of(result)) == pytest.approx((2, 2, 2))
    spec = make_spec("fedavg", plan=ADAM, sites=("site-a", "site-b"))
    updates = [payload(spec, 1, 1, 1, n=30), payload(spec, 5, 5, 5, site="site-b", n=10)]
    result = fold(spec, LAYOUT, begin(), updates, state=OptimizerState(floats(9), floats(9)))
    assert (result.flat[0], *state_of(result)) == pytest.approx((2, 2, 2)), "a round replaces what was before"


def test_fedasync_mixes_them_by_alpha() -> None:
    spec = make_spec("fedasync", plan=ADAM, alpha=0.5, staleness={"kind": "constant"})
    first = fold(spec, LAYOUT, begin(), [payload(spec, 1, 2, 4)])
    assert (first.flat[0], *state_of(first)) == (0.5, 2.0, 4.0), "zeros are no moments to mix with"
    second = fold(spec, LAYOUT, first.flat, [payload(spec, 1, 4, 8, base=1)], state=first.state, version=1)
    assert state_of(second) == (3.0, 6.0)


def test_momentum_of_sgd_is_one_vector() -> None:
    spec = make_spec("fedbuff", plan=SGD, buffer_size=1)
    result = fold(spec, LAYOUT, begin(), [payload_for(spec, floats(1, 7, 0.0, 1.0))])
    assert result.state is not None
    assert (result.state.m.tolist(), result.state.v) == ([7.0], None)


def test_an_update_that_weighs_nothing_leaves_them() -> None:
    hinge = {"kind": "hinge", "a": 1e6, "b": 0}
    spec = make_spec("fedbuff", plan=ADAM, buffer_size=1, staleness=hinge, max_staleness=1000)
    state = OptimizerState(floats(1), floats(2))
    result = fold(spec, LAYOUT, begin(), [payload(spec, 0, 9, 9)], state=state, version=100)
    assert state_of(result) == pytest.approx((1, 2), abs=1e-4)


def test_the_wrong_number_of_moments_is_refused() -> None:
    spec = make_spec("fedbuff", plan=ADAM, buffer_size=1)
    merge = Merge(spec, LAYOUT, begin(), integers(), None, 0)
    plain = payload_for(spec, floats(1, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"must be float32 \(5,\)"):
        merge.add(plain.update, plain.flat, plain.ints)
    with pytest.raises(ValueError, match="first and second moments"):
        Merge(spec, LAYOUT, begin(), integers(), OptimizerState(floats(0), None), 0)


numbers = st.floats(0, 1e6, width=32)


@settings(deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers, st.integers(0, 9)), min_size=1, max_size=12),
    st.sampled_from(["fedasync", "fedbuff", "fedavg"]),
)
def test_group_commit_equals_one_by_one_and_no_second_moment_becomes_negative(
    sent: list[tuple[float, float, int]], strategy: str
) -> None:
    spec = make_spec(strategy, plan=ADAM, sites=("site-a", "site-b"), buffer_size=2)
    updates = [payload(spec, m, -m, v, base=base, n=1 + base) for m, v, base in sent]
    together = fold(spec, LAYOUT, begin(), updates, version=9)
    flat, state, version = begin(), None, 9
    while True:
        merge = Merge(spec, LAYOUT, flat.copy(), integers(), state, version)
        while updates and merge.version == version:
            one = updates.pop(0)
            merge.add(one.update, one.flat, one.ints)
        step = merge.finish()
        if not step.merged:
            break
        flat, state, version = step.flat, step.state, step.version
    assert together.flat.tobytes() == flat.tobytes()
    assert together.state is not None
    if state is not None:
        assert together.state.m.tobytes() == state.m.tobytes()
    assert together.state.v is not None
    assert (together.state.v >= 0).all()
    assert np.isfinite(together.state.m).all()
