"""s(τ) and the numbering of updates: golden values, properties, and the tables of the module docstrings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.staleness import constant, hinge, participation, polynomial, staleness_weight
from aggregator.weighting import assign, group_size, met_version
from federation.jobs import ConstantStaleness, HingeStaleness, ParticipationStaleness, PolynomialStaleness
from tests.unit.aggregator_cases import make_spec, make_update

GOLDEN_TAU = (0, 1, 4, 8, 24)
policies = st.one_of(
    st.just(ConstantStaleness()),
    st.builds(PolynomialStaleness, a=st.floats(0, 100)),
    st.builds(HingeStaleness, a=st.floats(0, 1e6), b=st.floats(0, 1e6)),
)


def test_golden_polynomial() -> None:
    assert [round(polynomial(tau), 5) for tau in GOLDEN_TAU] == [1, 0.70711, 0.44721, 0.33333, 0.2]


def test_golden_hinge() -> None:
    assert [hinge(tau) for tau in GOLDEN_TAU] == [1, 1, 1, 1 / 41, 1 / 201]
    assert hinge(5) == 1 / 11


def test_golden_constant() -> None:
    assert [constant(tau) for tau in GOLDEN_TAU] == [1, 1, 1, 1, 1]


def test_golden_participation() -> None:
    assert [participation(tau) for tau in GOLDEN_TAU] == [1, 2, 3, 3, 3]
    assert [participation(tau, limit=1) for tau in GOLDEN_TAU] == [1, 1, 1, 1, 1]
    assert participation(8, limit=7.5) == 7.5


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ConstantStaleness(), 1.0),
        (PolynomialStaleness(a=1.0), 1 / 9),
        (HingeStaleness(a=2.0, b=3.0), 1 / 11),
        (ParticipationStaleness(limit=20), 9.0),
    ],
)
def test_the_policy_picks_function_and_parameters(policy: object, expected: float) -> None:
    assert staleness_weight(policy, 8) == pytest.approx(expected, rel=1e-15)  # type: ignore[arg-type]


@given(policies, st.integers(0, 10**6), st.integers(0, 10**6))
def test_staleness_is_one_when_fresh_never_increases_and_stays_within_0_and_1(
    policy: PolynomialStaleness, tau: int, more: int
) -> None:
    assert staleness_weight(policy, 0) == 1.0
    assert 0.0 <= staleness_weight(policy, tau + more) <= staleness_weight(policy, tau) <= 1.0


@given(st.floats(1, 1000), st.integers(0, 10**6), st.integers(0, 10**6))
def test_participation_is_one_when_fresh_never_decreases_and_stays_within_its_limit(
    limit: float, tau: int, more: int
) -> None:
    policy = ParticipationStaleness(limit=limit)
    assert staleness_weight(policy, 0) == 1.0
    assert 1.0 <= staleness_weight(policy, tau) <= staleness_weight(policy, tau + more) <= limit


def test_staleness_from_the_future_is_an_error() -> None:
    with pytest.raises(ValueError, match="newer than the model"):
        staleness_weight(ConstantStaleness(), -1)


@pytest.mark.parametrize(
    ("strategy", "size", "met"),
    [("fedasync", 1, [7, 8, 9, 10, 11]), ("fedbuff", 2, [7, 7, 8, 8, 9]), ("fedavg", 3, [7, 7, 7, 8, 8])],
)
def test_the_version_an_update_meets_counts_those_before_it(strategy: str, size: int, met: list[int]) -> None:
    spec = make_spec(strategy, buffer_size=2)
    assert group_size(spec) == size
    assert [met_version(spec, 7, position) for position in range(5)] == met


def test_fedasync_numbers() -> None:
    contribution = assign(make_spec(alpha=0.6), make_update(base_version=4), version=7, position=1)
    assert (contribution.staleness, contribution.version) == (4, 9)
    assert contribution.weight == 0.6 * 5**-0.5


def test_fedbuff_numbers() -> None:
    update = make_update(base_version=4, num_examples=50)
    contribution = assign(make_spec("fedbuff", buffer_size=2), update, version=7, position=3)
    assert (contribution.staleness, contribution.version, contribution.weight) == (4, 9, 5**-0.5)


def test_participation_counts_the_versions_for_which_an_update_stands() -> None:
    spec = make_spec(
        "fedbuff",
        staleness=ParticipationStaleness(limit=10),
        weight_by_examples=True,
        buffer_size=1,
        max_inflight=1,
    )
    often = [make_update(base_version=version, num_examples=50) for version in range(6)]
    seldom = make_update(base_version=0, num_examples=50)
    weights = [assign(spec, update, version, 0).weight for version, update in enumerate(often)]
    assert assign(spec, seldom, 5, 0).weight == sum(weights)


def test_fedbuff_weights_by_examples_only_if_the_policy_says_so() -> None:
    spec = make_spec("fedbuff", weight_by_examples=True)
    assert assign(spec, make_update(base_version=0, num_examples=50), 3, 0).weight == 50 / math.sqrt(4)


@pytest.mark.parametrize(
    ("metrics", "counted"),
    [
        ({"objects": 12.0}, 12),
        ({"objects": 0.0}, 1),
        ({"objects": -3.0}, 1),
        ({}, 1),
        ({"objects": 1e300}, 1e12),
    ],
)
def test_fedbuff_weights_by_objects_only_if_the_policy_says_so(
    metrics: dict[str, float], counted: float
) -> None:
    update = make_update(base_version=0, num_examples=50, metrics=metrics)
    assert assign(make_spec("fedbuff"), update, 3, 0).weight == 1 / math.sqrt(4)
    assert assign(make_spec("fedbuff", weight_by_objects=True), update, 3, 0).weight == counted / math.sqrt(4)


def test_fedavg_weighs_by_examples_and_knows_no_staleness_factor() -> None:
    contribution = assign(make_spec("fedavg"), make_update(num_examples=50), version=0, position=2)
    assert (contribution.staleness, contribution.version, contribution.weight) == (0, 1, 50.0)


def test_a_base_newer_than_the_version_it_would_meet_is_an_error() -> None:
    assert assign(make_spec(), make_update(base_version=8), version=7, position=1).staleness == 0
    with pytest.raises(ValueError, match="newer than version 7"):
        assign(make_spec(), make_update(base_version=8), version=7, position=0)
