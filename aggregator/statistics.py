"""BatchNorm running statistics: mixed as the mean and variance of a mixture, never averaged as weights.

A site's (μ_i, σ_i²) describes a population of activations. With convex weights w_i the mixture has

    μ = Σ w_i μ_i        σ² = Σ w_i (σ_i² + μ_i²) - μ²

Taken literally the second line subtracts two large numbers: where |μ| >> σ nothing of σ² is left, or less.
For two components it equals

    σ² = (1-t)·σ₁² + t·σ₂² + t(1-t)·(μ₂-μ₁)²

a sum of non-negative terms; more components are added one at a time with t = w_i / Σ w_j so far (West 1979;
Chan, Golub, LeVeque 1983). So one pass suffices, whatever the number of updates. float64 inside a block,
rounded once where it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.blocks import Doubles, Floats, blocks

_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class Moments:
    """The mixture of the components so far, with their summed weight. [S] each."""

    means: Doubles
    variances: Doubles
    weight: float = 0.0


def no_moments(size: int) -> Moments:
    return Moments(np.zeros(size), np.zeros(size))


def forget(moments: Moments) -> None:
    """Back to no components. The old numbers go too: even weighed with zero they would leave their sign."""
    moments.means.fill(0.0)
    moments.variances.fill(0.0)
    moments.weight = 0.0


def add_component(moments: Moments, means: Floats, variances: Floats, weight: float) -> None:
    """One more component of `weight` ≥ 0. A weight of zero (a very stale update) changes nothing."""
    if weight > 0.0:
        moments.weight += weight
        mix_statistics(moments.means, moments.variances, means, variances, weight / moments.weight)


def mix_statistics(
    means: Floats | Doubles,
    variances: Floats | Doubles,
    other_means: Floats | Doubles,
    other_variances: Floats | Doubles,
    t: float,
) -> None:
    """(means, variances) ← their mixture with the other, which weighs t, 0 ≤ t ≤ 1, in place.

    The result is finite and no variance is negative, even if one of the inputs is.
    """
    for at in blocks(means.size):
        mean, other = means[at].astype(np.float64), other_means[at].astype(np.float64)
        apart = np.square(other - mean)
        variance = (1.0 - t) * variances[at].astype(np.float64) + t * other_variances[at].astype(np.float64)
        variance += t * (1.0 - t) * apart
        means[at] = (1.0 - t) * mean + t * other
        variances[at] = np.clip(variance, 0.0, _LARGEST)
