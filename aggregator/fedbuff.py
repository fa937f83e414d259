"""FedBuff: buffered asynchronous aggregation. Nguyen et al. 2022, arXiv 2106.06639, algorithm 1.

    c_i = s(τ_i)                              1/√(1+τ_i) in the paper, min(1+τ_i, limit) for participation
    x ← x + η · (1/K) · Σ c_i Δ_i             after K updates
    x ← x + η · Σ c_i n_i Δ_i / Σ n_i         if the policy weights by examples or objects (not in the paper)

Δ_i = y_i - x_base is taken by the site against the version that it trained from: a site that changed nothing
sends zeros, however stale it is. Running statistics travel as values: each weighs c_i/K (or c_i n_i / Σ n_i), and
what remains to 1 stays on the global model's; where the c_i come to more, they weigh 1 together. Memory: the model,
one accumulator and one payload.
"""

from __future__ import annotations

from aggregator import server_opt
from aggregator.blocks import add_scaled, set_scaled
from aggregator.group import Group
from aggregator.server_opt import OptimizerState
from aggregator.statistics import add_component, mix_statistics
from aggregator.tensors import Tensors, raise_counters
from aggregator.weighting import amount
from federation.jobs import AggregationPolicy
from federation.types import Contribution


def fold(
    group: Group,
    payload: Tensors,
    counters: tuple[slice, ...],
    contribution: Contribution,
    policy: AggregationPolicy,
) -> None:
    """Add one update to the open group. `payload.weights` is the difference Δ_i."""
    if group.count == 0:
        set_scaled(group.weights, payload.weights, contribution.weight)
        group.ints[:] = payload.ints
    else:
        add_scaled(group.weights, payload.weights, contribution.weight)
        raise_counters(group.ints, payload.ints, counters)
    add_component(group.statistics, payload.means, payload.variances, contribution.weight)
    group.count += 1
    group.amount += amount(policy, contribution.update)


def flush(
    model: Tensors,
    group: Group,
    counters: tuple[slice, ...],
    policy: AggregationPolicy,
    state: OptimizerState | None,
) -> None:
    """Make the next version from a full group: `model`, and `state` if there is one, in place."""
    if policy.server_optimizer is None or state is None:
        add_scaled(model.weights, group.weights, policy.server_learning_rate / group.amount)
    else:
        set_scaled(group.weights, group.weights, 1.0 / group.amount)
        server_opt.step(
            policy.server_optimizer, state, model.weights, group.weights, policy.server_learning_rate
        )
    moments = group.statistics
    mix_statistics(model.means, model.variances, moments.means, moments.variances, share(group))
    raise_counters(model.ints, group.ints, counters)


def share(group: Group) -> float:
    """Of a full group in what travels as values, at most 1; what remains to 1 stays on the global model's."""
    return min(1.0, group.statistics.weight / group.amount)
