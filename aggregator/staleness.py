"""s(τ): how much an update counts that is τ versions old. Xie, Koyejo, Gupta 2019, §5.2, arXiv 1903.03934.

All have s(0) = 1. Theirs never increase, and lie in [0, 1] for the parameters that `federation.jobs` admits: what is
old fits less. `participation` rises from 1 to its limit: who is slow comes seldom. A job chooses one of the two.
"""

from __future__ import annotations

from typing import assert_never

from federation.jobs import (
    ConstantStaleness,
    HingeStaleness,
    ParticipationStaleness,
    PolynomialStaleness,
    Staleness,
)


def constant(staleness: int) -> float:
    """s(τ) = 1. Xie et al. 2019."""
    return 1.0


def polynomial(staleness: int, a: float = 0.5) -> float:
    """s(τ) = (1+τ)^-a. Xie et al. 2019; with a = 1/2 the 1/√(1+τ) of FedBuff (arXiv 2106.06639)."""
    return float((1.0 + staleness) ** -a)


def hinge(staleness: int, a: float = 10.0, b: float = 4.0) -> float:
    """s(τ) = 1 if τ ≤ b else 1/(a(τ-b)+1). Xie et al. 2019."""
    return 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)


def participation(staleness: int, limit: float = 3.0) -> float:
    """s(τ) = min(1+τ, limit). After FedAU, Wang, Ji 2024, arXiv 2306.03401.

    FedAU counts an update as often as there were rounds since the site's last one, up to a limit. A site that trains
    all the time, with one update in flight, began this one from the version that its last one made: that was 1+τ
    versions ago, and its message says so.
    """
    return min(1.0 + staleness, limit)


def staleness_weight(policy: Staleness, staleness: int) -> float:
    """s(τ) as the job's policy says. Raises ValueError for τ < 0: nothing is trained from the future."""
    if staleness < 0:
        raise ValueError(f"staleness is {staleness}: an update cannot be newer than the model that it meets")
    match policy:
        case ConstantStaleness():
            return constant(staleness)
        case PolynomialStaleness():
            return polynomial(staleness, policy.a)
        case HingeStaleness():
            return hinge(staleness, policy.a, policy.b)
        case ParticipationStaleness():
            return participation(staleness, policy.limit)
        case _:
            assert_never(policy)
