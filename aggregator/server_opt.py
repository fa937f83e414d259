"""Server optimisers: a step from x along the merged direction Δ, the mean of what the sites changed.

FedAdam and FedYogi follow algorithm 2 of Reddi et al. 2021 (arXiv 2003.00295), FedAvgM the server momentum
of Hsu et al. 2019 (arXiv 1909.06335). ε is the adaptivity that the first paper calls τ:

    FedAvgM   m ← β₁·m + Δ                                                     x ← x + η·m
    FedAdam   m ← β₁·m + (1-β₁)·Δ    v ← β₂·v + (1-β₂)·Δ²                      x ← x + η·m/(√v + ε)
    FedYogi   m ← β₁·m + (1-β₁)·Δ    v ← v - (1-β₂)·Δ²·sign(v - Δ²)            x ← x + η·m/(√v + ε)

m starts at 0 and v at ε², the smallest start that the paper admits; there is no bias correction, as in the
paper. Momentum of FedAvgM is not damped: a constant direction ends up 1/(1-β₁) times as large.

Only for parameters: an adaptive step on a running variance can make it negative, so statistics stay out.
The state belongs to the model version and is stored beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.blocks import Floats, blocks, scratch
from federation.jobs import ServerOptimizer


@dataclass(frozen=True)
class OptimizerState:
    """Updated in place. [W] each, float32; v is None for an optimiser without a second moment."""

    m: Floats
    v: Floats | None


def initial_state(optimizer: ServerOptimizer, size: int) -> OptimizerState:
    """The state before the first step over `size` parameters."""
    m = np.zeros(size, np.float32)
    if optimizer.kind == "fedavgm":
        return OptimizerState(m, None)
    return OptimizerState(m, np.full(size, optimizer.epsilon**2, np.float32))


def no_state(moments: int, size: int) -> OptimizerState:
    """Zeros: of 1 or 2 moments of `size` parameters."""
    return OptimizerState(np.zeros(size, np.float32), np.zeros(size, np.float32) if moments == 2 else None)


def moment_count(optimizer: ServerOptimizer | None) -> int:
    """How many moments its state has."""
    if optimizer is None:
        return 0
    return 1 if optimizer.kind == "fedavgm" else 2


def check_state(moments: int, state: OptimizerState | None, size: int) -> None:
    """Raises ValueError if `state` is not one of `moments` moments of `size` parameters. None fits always."""
    if state is None:
        return
    if not moments:
        raise ValueError(
            "there is an optimiser state, but the job has neither a server optimiser nor a shared one"
        )
    if (state.v is None) != (moments == 1):
        raise ValueError(
            "this is another optimiser's state: this job's has "
            + ("first moments alone" if moments == 1 else "first and second moments")
        )
    for vector in (state.m, state.v):
        if vector is not None and (vector.dtype != np.float32 or vector.shape != (size,)):
            raise ValueError(f"optimiser state is {vector.dtype} {vector.shape}, must be float32 ({size},)")


def step(optimizer: ServerOptimizer, state: OptimizerState, x: Floats, direction: Floats, eta: float) -> None:
    """One server step: `x` and `state` in place; `direction` is left as it is. [W] each."""
    if state.v is None:
        _momentum_step(optimizer, state.m, x, direction, eta)
    else:
        _adaptive_step(optimizer, state.m, state.v, x, direction, eta)


def _momentum_step(optimizer: ServerOptimizer, m: Floats, x: Floats, direction: Floats, eta: float) -> None:
    beta1, rate, temporary = np.float32(optimizer.beta1), np.float32(eta), scratch(x.size)
    for at in blocks(x.size):
        ms, xs, t = m[at], x[at], temporary[: at.stop - at.start]
        np.multiply(ms, beta1, out=ms)
        np.add(ms, direction[at], out=ms)
        np.multiply(ms, rate, out=t)
        np.add(xs, t, out=xs)


def _adaptive_step(
    optimizer: ServerOptimizer, m: Floats, v: Floats, x: Floats, direction: Floats, eta: float
) -> None:
    beta1, fresh1 = np.float32(optimizer.beta1), np.float32(1.0 - optimizer.beta1)
    beta2, fresh2 = np.float32(optimizer.beta2), np.float32(1.0 - optimizer.beta2)
    epsilon, rate = np.float32(optimizer.epsilon), np.float32(eta)
    yogi = optimizer.kind == "fedyogi"
    first, second = scratch(x.size), scratch(x.size)
    for at in blocks(x.size):
        ms, vs, xs, delta = m[at], v[at], x[at], direction[at]
        t, u = first[: at.stop - at.start], second[: at.stop - at.start]
        np.multiply(ms, beta1, out=ms)
        np.multiply(delta, fresh1, out=t)
        np.add(ms, t, out=ms)
        np.multiply(delta, delta, out=t)
        if yogi:
            np.subtract(vs, t, out=u)
            np.sign(u, out=u)
            np.multiply(t, fresh2, out=t)
            np.multiply(t, u, out=t)
            np.subtract(vs, t, out=vs)
        else:
            np.multiply(vs, beta2, out=vs)
            np.multiply(t, fresh2, out=t)
            np.add(vs, t, out=vs)
        np.sqrt(vs, out=t)
        np.add(t, epsilon, out=t)
        np.divide(ms, t, out=t)
        np.multiply(t, rate, out=t)
        np.add(xs, t, out=xs)
