"""Merge: the algebra of each strategy, group commit bit for bit, and what stays pending."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aggregator import blocks
from aggregator.blocks import Floats
from aggregator.merge import Merge
from federation.jobs import ConstantStaleness, JobSpec
from federation.types import Contribution
from tests.unit.aggregator_cases import (
    Payload,
    floats,
    fold,
    integers,
    make_layout,
    make_spec,
    make_update,
    payload_for,
)

W, S = 5, 3
LAYOUT = make_layout(W, S, counters=1, integers=1)
numbers = st.floats(-1e6, 1e6, width=32)
weights = arrays(np.float32, W, elements=numbers)
statistics = st.tuples(
    arrays(np.float32, S, elements=numbers), arrays(np.float32, S, elements=st.floats(0, 1e6, width=32))
)
models = st.builds(lambda w, s: np.concatenate([w, *s]), weights, statistics)
ints = arrays(np.int64, 2, elements=st.integers(0, 2**40))
optimizers = st.sampled_from([None, {"kind": "fedavgm"}, {"kind": "fedadam"}, {"kind": "fedyogi"}])
ONE_SITE = ("site-a",)


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    strategy = draw(st.sampled_from(["fedasync", "fedbuff", "fedavg"]))
    if strategy == "fedasync":
        return make_spec(alpha=draw(st.floats(0.01, 1)))
    sites = tuple(f"site-{i}" for i in range(draw(st.integers(1, 3))))
    fedbuff = strategy == "fedbuff"
    weight_by = draw(st.sampled_from(["updates", "examples", "objects"])) if fedbuff else ""
    staleness = draw(st.sampled_from(["polynomial", "participation"])) if fedbuff else "constant"
    return make_spec(
        strategy,
        sites=sites,
        buffer_size=draw(st.integers(1, 4)),
        server_learning_rate=draw(st.sampled_from([0.1, 1.0, 2.5])),
        server_optimizer=draw(optimizers),
        weight_by_examples=weight_by == "examples",
        weight_by_objects=weight_by == "objects",
        staleness={"kind": staleness},
        max_inflight=1,
    )


@st.composite
def payload_lists(draw: st.DrawFn, spec: JobSpec, version: int, max_size: int = 9) -> list[Payload]:
    return [
        payload_for(
            spec,
            draw(models),
            draw(ints),
            base=draw(st.integers(0, version)),
            n=draw(st.integers(1, 10**6)),
            metrics={"objects": draw(st.integers(0, 10**6))},
        )
        for _ in range(draw(st.integers(1, max_size)))
    ]


# --- group commit --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_folding_n_in_one_merge_equals_one_by_one_bit_for_bit(data: st.DataObject) -> None:
    spec, start = data.draw(specs()), data.draw(models)
    start_ints, payloads = data.draw(ints), data.draw(payload_lists(spec, version=20))
    together = fold(spec, LAYOUT, start, payloads, ints=start_ints, version=20)

    flat, counters, state, version = start, start_ints, None, 20
    merged: list[Contribution] = []
    left = list(payloads)
    while left:
        merge = Merge(spec, LAYOUT, flat.copy(), counters.copy(), state, version)
        while left and merge.version == version:
            payload = left.pop(0)
            merge.add(payload.update, payload.flat, payload.ints)
        step = merge.finish()
        flat, counters, state, version = step.flat, step.ints, step.state, step.version
        merged += step.merged

    assert together.flat.tobytes() == flat.tobytes()
    assert together.ints.tobytes() == counters.tobytes()
    assert together.merged == tuple(merged)
    assert together.version == version
    if state is not None and together.state is not None:
        assert together.state.m.tobytes() == state.m.tobytes()
        assert (together.state.v is None) == (state.v is None)
        if together.state.v is not None and state.v is not None:
            assert together.state.v.tobytes() == state.v.tobytes()


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("fedasync", None),
        ("fedbuff", None),
        ("fedavg", None),
        ("fedbuff", {"kind": "fedavgm"}),
        ("fedbuff", {"kind": "fedadam"}),
        ("fedavg", {"kind": "fedyogi"}),
    ],
)
def test_the_length_of_a_block_does_not_show_in_the_result(
    strategy: str, optimizer: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout(101, 17)
    spec = make_spec(strategy, sites=("site-a", "site-b"), buffer_size=2, server_optimizer=optimizer)
    random = np.random.default_rng(0)
    vectors = [np.abs(random.standard_normal(layout.float_count, np.float32)) for _ in range(4)]
    payloads = [payload_for(spec, vector, n=n) for n, vector in enumerate(vectors[1:], start=1)]
    whole = fold(spec, layout, vectors[0], payloads).flat
    monkeypatch.setattr(blocks, "BLOCK", 10)
    assert fold(spec, layout, vectors[0], payloads).flat.tobytes() == whole.tobytes()
    assert whole.tobytes() != vectors[0].tobytes()


# --- FedAsync ------------------------------------------------------------------------------------------


def test_fedasync_golden() -> None:
    spec = make_spec(alpha=0.5)
    payloads = [payload_for(spec, floats(4, 0), base=0), payload_for(spec, floats(0, 8), base=0)]
    result = fold(spec, make_layout(2), floats(0, 4), payloads, version=3)
    # τ = 3: α = .5/√4 = .25 -> (1, 3); then τ = 4: α = .5/√5
    alpha = 0.5 / 5**0.5
    assert result.flat == pytest.approx([1 - alpha, 3 + 5 * alpha], rel=1e-6)
    assert [(c.staleness, c.version) for c in result.merged] == [(3, 4), (4, 5)]


@given(models, models, st.floats(0.01, 1))
def test_fedasync_at_staleness_zero_equals_a_step_along_the_difference(
    x: Floats, y: Floats, alpha: float
) -> None:
    spec = make_spec(alpha=alpha)
    result = fold(spec, LAYOUT, x, [payload_for(spec, y, integers(0, 0))], ints=integers(0, 0))
    exact = x[:W].astype(np.float64) + alpha * (y[:W].astype(np.float64) - x[:W])
    # three roundings, each at most half an ulp of the larger of x and y (and their difference)
    bound = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(x[:W]), np.abs(y[:W])) + 1e-37
    assert np.all(np.abs(result.flat[:W] - exact) <= bound)


@given(models, st.floats(0.01, 1))
def test_a_site_that_changed_nothing_changes_nothing(x: Floats, alpha: float) -> None:
    spec = make_spec(alpha=alpha)
    result = fold(spec, LAYOUT, x, [payload_for(spec, x, integers(3, 3))], ints=integers(3, 3))
    assert np.array_equal(result.flat, x)


@given(models, models)
def test_alpha_one_replaces_the_model_exactly(x: Floats, y: Floats) -> None:
    spec = make_spec(alpha=1.0, staleness=ConstantStaleness())
    result = fold(spec, LAYOUT, x, [payload_for(spec, y, integers(0, 0))], ints=integers(0, 0), version=9)
    assert np.array_equal(result.flat, y)


def test_alpha_one_survives_a_global_model_of_another_magnitude() -> None:
    spec = make_spec(alpha=1.0)
    assert fold(spec, make_layout(1), floats(1e8), [payload_for(spec, floats(1))]).flat[0] == 1.0


# --- FedBuff -------------------------------------------------------------------------------------------


@given(weights, st.lists(weights, min_size=1, max_size=8))
def test_a_fresh_buffer_moves_the_model_by_the_mean_of_the_differences(
    x: Floats, differences: list[Floats]
) -> None:
    spec, layout = make_spec("fedbuff", buffer_size=len(differences)), make_layout(W)
    result = fold(spec, layout, x, [payload_for(spec, d) for d in differences])
    exact = x.astype(np.float64) + np.mean(differences, axis=0, dtype=np.float64)
    largest = max(np.abs(x).max(), *(np.abs(d).max() for d in differences))
    assert np.all(np.abs(result.flat - exact) <= 16 * np.finfo(np.float32).eps * largest)


def test_fedbuff_golden() -> None:
    spec = make_spec("fedbuff", buffer_size=2, server_learning_rate=0.5)
    payloads = [payload_for(spec, floats(4), base=3), payload_for(spec, floats(8), base=0)]
    result = fold(spec, make_layout(1), floats(1), payloads, version=3)
    assert result.flat[0] == 1 + 0.5 * (4 + 8 / 2) / 2


def test_fedbuff_weighted_by_examples_golden() -> None:
    spec = make_spec("fedbuff", buffer_size=2, weight_by_examples=True)
    payloads = [payload_for(spec, floats(4), base=3, n=30), payload_for(spec, floats(8), base=0, n=10)]
    result = fold(spec, make_layout(1), floats(1), payloads, version=3)
    assert result.flat[0] == 1 + (30 * 4 + 10 * 8 / 2) / 40


def test_fedbuff_weighted_by_objects_golden() -> None:
    spec = make_spec("fedbuff", buffer_size=2, weight_by_objects=True)
    payloads = [
        payload_for(spec, floats(4), base=3, n=10, metrics={"objects": 30.0}),
        payload_for(spec, floats(8), base=0, n=90, metrics={"objects": 10.0}),
    ]
    result = fold(spec, make_layout(1), floats(1), payloads, version=3)
    assert result.flat[0] == 1 + (30 * 4 + 10 * 8 / 2) / 40


def test_fedbuff_counts_a_late_update_several_times_and_its_statistics_as_no_more_than_all() -> None:
    late = {"kind": "participation", "limit": 3.0}
    spec = make_spec("fedbuff", buffer_size=2, staleness=late, max_inflight=1)
    payloads = [
        payload_for(spec, floats(4, 10, 1), base=9),
        payload_for(spec, floats(8, 30, 1), base=0, site="site-b"),
    ]
    result = fold(spec, make_layout(1, 1), floats(1, 99, 1), payloads, version=9)
    assert [c.weight for c in result.merged] == [1, 3]
    assert result.flat[0] == 1 + (4 + 3 * 8) / 2
    assert result.flat[1] == (10 + 3 * 30) / 4, "a mean of values, with nothing left of the global model's"


def test_an_update_so_stale_that_its_weight_is_zero_is_harmless() -> None:
    steep = {"kind": "polynomial", "a": 100.0}
    spec = make_spec("fedbuff", buffer_size=1, staleness=steep, max_staleness=10**6, max_versions=10**9)
    x = floats(1, 2, 3)
    result = fold(spec, make_layout(1, 1), x, [payload_for(spec, floats(5, 5, 5))], version=10**6)
    assert result.merged[0].weight == 0.0
    assert result.flat.tobytes() == x.tobytes()


# --- FedAvg --------------------------------------------------------------------------------------------


def test_fedavg_golden() -> None:
    spec = make_spec("fedavg", sites=("site-a", "site-b"))
    payloads = [payload_for(spec, floats(1, 0), n=3), payload_for(spec, floats(5, 4), n=1, site="site-b")]
    assert fold(spec, make_layout(2), floats(100, -7), payloads).flat.tolist() == [2, 1]


def test_fedavg_with_a_server_learning_rate_goes_part_of_the_way() -> None:
    spec = make_spec("fedavg", sites=("site-a", "site-b"), server_learning_rate=0.5)
    payloads = [payload_for(spec, floats(1), n=3), payload_for(spec, floats(5), n=1, site="site-b")]
    assert fold(spec, make_layout(1), floats(10), payloads).flat.tolist() == [6]


@given(weights, weights, st.lists(st.integers(1, 10**9), min_size=1, max_size=6))
def test_sites_that_agree_are_taken_at_their_word(x: Floats, y: Floats, examples: list[int]) -> None:
    spec = make_spec("fedavg", sites=tuple(f"site-{i}" for i in range(len(examples))))
    result = fold(spec, make_layout(W), x, [payload_for(spec, y, n=n) for n in examples])
    assert np.array_equal(result.flat, y)


# --- integers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff", "fedavg"])
def test_counters_take_the_maximum_and_other_integers_stay(strategy: str) -> None:
    spec = make_spec(strategy, sites=("site-a", "site-b"), buffer_size=2)
    x = np.ones(LAYOUT.float_count, np.float32)
    assert LAYOUT.counter_slices == (slice(1, 2),)
    payloads = [payload_for(spec, x, integers(90, 7)), payload_for(spec, x, integers(91, 5))]
    assert fold(spec, LAYOUT, x, payloads, ints=integers(50, 6)).ints.tolist() == [50, 7]
    assert fold(spec, LAYOUT, x, payloads, ints=integers(50, 9)).ints.tolist() == [50, 9]


# --- groups, skipping, the stop rule -------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_an_incomplete_group_leaves_everything_as_it_was(strategy: str) -> None:
    spec = make_spec(
        strategy, sites=("site-a", "site-b"), buffer_size=2, server_optimizer={"kind": "fedadam"}
    )
    x = np.ones(LAYOUT.float_count, np.float32)
    y = np.full_like(x, 3)
    payloads = [payload_for(spec, y, integers(9, 9)) for _ in range(3)]
    two = fold(spec, LAYOUT, x, payloads[:2], ints=integers(1, 1))
    three = fold(spec, LAYOUT, x, payloads, ints=integers(1, 1))
    assert three.version == two.version == 1
    assert [c.update for c in three.merged] == [p.update for p in payloads[:2]]
    assert three.flat.tobytes() == two.flat.tobytes() != x.tobytes()
    assert three.ints.tolist() == two.ints.tolist()
    one = fold(spec, LAYOUT, x, payloads[:1], ints=integers(1, 1), version=4)
    assert (one.version, one.merged, one.flat.tobytes(), one.ints.tolist()) == (4, (), x.tobytes(), [1, 1])


def test_a_skipped_update_renumbers_those_after_it() -> None:
    spec = make_spec(max_staleness=100)
    payloads = [payload_for(spec, floats(v), base=0) for v in (1, 2, 3)]
    accepted = fold(spec, make_layout(1), floats(0), payloads, version=5).merged
    final = fold(spec, make_layout(1), floats(0), [payloads[0], payloads[2]], version=5).merged
    assert [(c.staleness, c.version) for c in accepted] == [(5, 6), (6, 7), (7, 8)]
    assert [(c.staleness, c.version) for c in final] == [(5, 6), (6, 7)]
    assert final[1].weight == accepted[1].weight > accepted[2].weight


def test_a_skipped_update_moves_the_border_of_fedbuff_groups() -> None:
    spec = make_spec("fedbuff", buffer_size=2)
    payloads = [payload_for(spec, floats(v), base=0) for v in (1, 2, 3, 4)]
    merge = Merge(spec, make_layout(1), floats(0), integers(), None, 0)
    numbers = [merge.add(p.update, p.flat, p.ints).version for p in payloads[1:]]  # the first is unreadable
    assert numbers == [1, 1, 2]
    assert (merge.version, merge.needed) == (1, 1)
    assert [c.update for c in merge.merged] == [p.update for p in payloads[1:3]]


def test_needed_says_when_reading_more_is_wasted() -> None:
    spec = make_spec("fedbuff", buffer_size=3)
    merge = Merge(spec, make_layout(1), floats(0), integers(), None, 0)
    seen = []
    for _ in range(4):
        seen.append(merge.needed)
        payload = payload_for(spec, floats(1))
        merge.add(payload.update, payload.flat, payload.ints)
    assert seen == [3, 2, 1, 3]


@pytest.mark.parametrize(("strategy", "size"), [("fedasync", 1), ("fedbuff", 2)])
def test_the_last_version_of_the_stop_rule_takes_no_more(strategy: str, size: int) -> None:
    spec = make_spec(strategy, max_versions=2, buffer_size=size)
    merge = Merge(spec, make_layout(1), floats(0), integers(), None, 0)
    payload = payload_for(spec, floats(1))
    for _ in range(2 * size):
        assert not merge.full
        merge.add(payload.update, payload.flat, payload.ints)
    assert merge.full
    before = merge.finish()
    with pytest.raises(ValueError, match="ends with version 2"):
        merge.add(payload.update, payload.flat, payload.ints)
    assert merge.finish() == before


# --- replay and what does not fit ----------------------------------------------------------------------


def test_replay_uses_the_recorded_weight_and_gives_the_same_bytes() -> None:
    spec = make_spec("fedbuff", buffer_size=2)
    payloads = [payload_for(spec, floats(0.1 * i, i), base=0) for i in range(4)]
    made = fold(spec, make_layout(2), floats(1, 1), payloads, version=3)
    merge = Merge(spec, make_layout(2), floats(1, 1), integers(), None, 3)
    for contribution, payload in zip(made.merged, payloads, strict=True):
        merge.replay(contribution, payload.flat, payload.ints)
    assert merge.finish().flat.tobytes() == made.flat.tobytes()
    assert merge.merged == made.merged

    other = made.merged[0].model_copy(update={"weight": 0.0})
    merge = Merge(spec, make_layout(2), floats(1, 1), integers(), None, 3)
    merge.replay(other, payloads[0].flat, payloads[0].ints)
    merge.replay(other, payloads[1].flat, payloads[1].ints)
    assert merge.finish().flat.tolist() == [1, 1]


def test_replay_refuses_a_contribution_of_another_version() -> None:
    spec = make_spec()
    payload = payload_for(spec, floats(1))
    (contribution,) = fold(spec, make_layout(1), floats(0), [payload]).merged
    merge = Merge(spec, make_layout(1), floats(0), integers(), None, 5)
    with pytest.raises(ValueError, match="belongs to version 1, not 6"):
        merge.replay(contribution, payload.flat, payload.ints)


def test_a_payload_that_does_not_fit_changes_nothing() -> None:
    spec, flat = make_spec(), floats(1, 2)
    merge = Merge(spec, make_layout(2), flat, integers(), None, 0)
    for wrong in (floats(1), np.array([1.0, 2.0]), floats(1, 2).reshape(1, 2)):
        with pytest.raises(ValueError, match="must be float32"):
            merge.add(make_update(), wrong, integers())
    with pytest.raises(ValueError, match="must be int64"):
        merge.add(make_update(), floats(1, 2), integers(1))
    with pytest.raises(ValueError, match="holds difference, not weights"):
        merge.add(make_update(kind="difference"), floats(1, 2), integers())
    assert (merge.version, merge.merged, flat.tolist()) == (0, (), [1, 2])


def test_a_read_only_model_is_refused_before_anything_is_folded() -> None:
    flat = floats(1)
    flat.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        Merge(make_spec(), make_layout(1), flat, integers(), None, 0)
