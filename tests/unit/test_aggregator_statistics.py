"""Running statistics: the mixture formula, exactly, and never a negative variance."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.statistics import Moments, add_component, mix_statistics, no_moments
from tests.unit.aggregator_cases import floats, fold, make_layout, make_spec, payload_for

means = st.floats(-(2.0**60), 2.0**60, width=32)
variances = st.floats(0, 2.0**100, width=32)
components = st.tuples(means, variances, st.floats(1e-3, 1e6))


def exact_mixture(parts: list[tuple[float, float, float]]) -> tuple[Fraction, Fraction]:
    """μ = Σwμ_i and σ² = Σw(σ_i²+μ_i²) − μ² of (mean, variance, weight), in exact rational arithmetic."""
    total = sum(Fraction(w) for _, _, w in parts)
    mean = sum((Fraction(w) * Fraction(m) for m, _, w in parts), Fraction(0)) / total
    second = sum((Fraction(w) * (Fraction(v) + Fraction(m) ** 2) for m, v, w in parts), Fraction(0)) / total
    return mean, second - mean**2


def streamed(parts: list[tuple[float, float, float]]) -> Moments:
    moments = no_moments(1)
    for mean, variance, weight in parts:
        add_component(moments, floats(mean), floats(variance), weight)
    return moments


def test_golden_mixture_of_two() -> None:
    # half of N(0, 1) and half of N(2, 3): mean 1, variance (1+0 + 3+4)/2 - 1 = 3
    mean, variance = floats(0), floats(1)
    mix_statistics(mean, variance, floats(2), floats(3), 0.5)
    assert (mean[0], variance[0]) == (1.0, 3.0)


@given(st.lists(components, min_size=1, max_size=12))
def test_one_pass_equals_the_formula(parts: list[tuple[float, float, float]]) -> None:
    moments, (mean, variance) = streamed(parts), exact_mixture(parts)
    scale = max(abs(m) for m, _, _ in parts)
    assert abs(moments.means[0] - float(mean)) <= 1e-13 * scale + 1e-300
    # a weight of 1 - t is rounded to 1e-16: times (μ_i - μ_j)², or times σ² if the other part has almost no weight
    spread = scale**2 + max(v for _, v, _ in parts)
    assert moments.variances[0] == pytest.approx(float(variance), rel=1e-12, abs=1e-14 * spread)
    assert moments.variances[0] >= 0


@given(st.floats(2.0**10, 2.0**50, width=32), st.floats(0, 2.0**-20, width=32), st.floats(0, 1))
def test_nothing_cancels_where_the_mean_dwarfs_the_deviation(mean: float, variance: float, t: float) -> None:
    # literally (1-t)(σ²+μ²) + t(σ²+μ²) - μ² loses σ² altogether here, and comes out negative half the time
    ours, theirs = floats(mean), floats(variance)
    mix_statistics(ours, theirs, floats(mean), floats(variance), t)
    assert (ours[0], theirs[0]) == (np.float32(mean), np.float32(variance))


@given(
    st.tuples(means, variances), st.tuples(means, variances), st.floats(0, 1), st.sampled_from([1.0, -1.0])
)
def test_a_variance_is_never_negative_nor_infinite(
    ours: tuple[float, float], theirs: tuple[float, float], t: float, sign: float
) -> None:
    mean, variance = floats(ours[0]), floats(ours[1])
    mix_statistics(mean, variance, floats(theirs[0]), floats(sign * theirs[1]), t)
    assert 0.0 <= variance[0] < np.inf


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_means_at_the_edge_of_float32_give_a_finite_variance(value: float) -> None:
    mean, variance = floats(value), floats(1)
    mix_statistics(mean, variance, floats(-value), floats(1), 0.5)
    assert (mean[0], variance[0]) == (0.0, np.finfo(np.float32).max)


def test_a_component_without_weight_changes_nothing() -> None:
    moments = no_moments(1)
    add_component(moments, floats(5), floats(5), 0.0)
    add_component(moments, floats(1), floats(2), 0.25)
    assert (moments.means[0], moments.variances[0], moments.weight) == (1.0, 2.0, 0.25)


LAYOUT = make_layout(1, 1)


def statistics_after(spec_args: dict[str, object], parts: list[tuple[float, float, int, int]]) -> list[float]:
    """Mean and variance of a model at (1, 2), version 10, after payloads (mean, variance, base, n)."""
    sites = tuple(f"site-{i}" for i in range(len(parts)))
    spec = make_spec(sites=sites, **spec_args)  # type: ignore[arg-type]
    payloads = [
        payload_for(spec, floats(0, mean, variance), base=base, n=n, site=sites[i])
        for i, (mean, variance, base, n) in enumerate(parts)
    ]
    result = fold(spec, LAYOUT, floats(0, 1, 2), payloads, version=10)
    assert len(result.merged) == len(parts)
    return [float(value) for value in result.flat[1:]]


def expected(parts: list[tuple[float, float, float]]) -> list[float]:
    return pytest.approx([float(value) for value in exact_mixture(parts)], rel=1e-6)  # type: ignore[return-value]


def test_fedasync_mixes_statistics_with_its_alpha() -> None:
    alpha = 0.6 * 4**-0.5
    assert statistics_after({}, [(5, 3, 7, 1)]) == expected([(1, 2, 1 - alpha), (5, 3, alpha)])


def test_fedbuff_leaves_the_remainder_on_the_global_statistics() -> None:
    spec = {"strategy": "fedbuff", "buffer_size": 2, "server_learning_rate": 5.0}
    c = [1 / 2, 4**-0.5 / 2]
    assert statistics_after(spec, [(5, 3, 10, 9), (-4, 1, 7, 9)]) == expected(
        [(1, 2, 1 - sum(c)), (5, 3, c[0]), (-4, 1, c[1])]
    )


def test_fedbuff_weighted_by_examples_weighs_statistics_alike() -> None:
    spec = {"strategy": "fedbuff", "buffer_size": 2, "weight_by_examples": True}
    c = [30 / 40, 4**-0.5 * 10 / 40]
    assert statistics_after(spec, [(5, 3, 10, 30), (-4, 1, 7, 10)]) == expected(
        [(1, 2, 1 - sum(c)), (5, 3, c[0]), (-4, 1, c[1])]
    )


def test_fedavg_replaces_statistics_by_the_mixture_of_the_sites() -> None:
    assert statistics_after({"strategy": "fedavg"}, [(5, 3, 10, 30), (-4, 1, 10, 10)]) == expected(
        [(5, 3, 30), (-4, 1, 10)]
    )
