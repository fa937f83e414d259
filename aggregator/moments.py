"""Moments of the sites' optimisers, where a job shares them: averaged beside the weights that they were made with.

    M̄ = Σ w_i M_i / Σ w_i            over the updates of a version, w_i as the weights have it
    M ← (1-t)·M + t·M̄                t the share that running statistics get, 1 in the first version

M_i is the first or the second moment of a site's gradients at the end of its update. So every site goes on with the
moments of the whole federation (local Adam whose state is averaged: Cheng, Glasgow 2025, arXiv 2409.13155; periodic
averaging of Adam's second moments: Chen, Li, Li 2020, "Toward communication efficient adaptive gradient method").
Convex combinations, so a second moment stays ≥ 0, however stale the updates are.
"""

from __future__ import annotations

from aggregator.blocks import Floats, mix
from aggregator.group import Group
from aggregator.server_opt import OptimizerState
from federation.types import Contribution


def fold(group: Group, moments: tuple[Floats, ...], contribution: Contribution) -> None:
    """Add those of one update, whose statistics are in the group already, to the means of the open group."""
    if contribution.weight > 0.0:
        for mean, one in zip(group.moments, moments, strict=True):
            mix(mean, one, contribution.weight / group.statistics.weight)


def flush(state: OptimizerState, means: tuple[Floats, ...], share: float) -> None:
    """Move the state of the version by `share` towards `means`, in place."""
    for moment, mean in zip(_vectors(state), means, strict=True):
        mix(moment, mean, share)


def _vectors(state: OptimizerState) -> tuple[Floats, ...]:
    return (state.m,) if state.v is None else (state.m, state.v)
