"""FedAvg: the synchronous baseline. McMahan et al. 2017, arXiv 1602.05629.

    ȳ = Σ n_i y_i / Σ n_i             when every invited site has contributed
    x ← x + η·(ȳ - x)                 η = 1, the default, is plain FedAvg: x ← ȳ

The mean is kept as a running mean, ȳ ← ȳ + n_i/N·(y_i - ȳ) with N the examples so far, not as a sum to be
divided at the end: sites that agree give their common value exactly, and nothing grows with n. A server
optimiser gets the direction ȳ - x. Running statistics are the mixture of the sites', weighted by n_i. Memory:
the model, one accumulator and one payload.
"""

from __future__ import annotations

import numpy as np

from aggregator import server_opt
from aggregator.blocks import mix
from aggregator.group import Group
from aggregator.server_opt import OptimizerState
from aggregator.statistics import add_component, mix_statistics
from aggregator.tensors import Tensors, raise_counters
from federation.jobs import AggregationPolicy
from federation.types import Contribution


def fold(group: Group, payload: Tensors, counters: tuple[slice, ...], contribution: Contribution) -> None:
    """Add one site's model to the open round."""
    group.count += 1
    group.amount += contribution.weight
    if group.count == 1:
        np.copyto(group.weights, payload.weights)
        group.ints[:] = payload.ints
    else:
        mix(group.weights, payload.weights, contribution.weight / group.amount)
        raise_counters(group.ints, payload.ints, counters)
    add_component(group.statistics, payload.means, payload.variances, contribution.weight)


def flush(
    model: Tensors,
    group: Group,
    counters: tuple[slice, ...],
    policy: AggregationPolicy,
    state: OptimizerState | None,
) -> None:
    """Make the next version from a complete round: `model`, and `state` if there is one, in place."""
    if policy.server_optimizer is None or state is None:
        mix(model.weights, group.weights, policy.server_learning_rate)
    else:
        np.subtract(group.weights, model.weights, out=group.weights)
        server_opt.step(
            policy.server_optimizer, state, model.weights, group.weights, policy.server_learning_rate
        )
    moments = group.statistics
    mix_statistics(model.means, model.variances, moments.means, moments.variances, 1.0)
    raise_counters(model.ints, group.ints, counters)
