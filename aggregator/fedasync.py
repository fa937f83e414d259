"""FedAsync: every update is mixed into the model as it comes. Xie, Koyejo, Gupta 2019, arXiv 1903.03934.

    α_i = α·s(τ_i)
    x ← (1-α_i)·x + α_i·y_i        one after the other, in log order

y_i is the site's whole model, not a difference. Memory: the model and the one payload being folded.
"""

from __future__ import annotations

from aggregator.blocks import mix
from aggregator.statistics import mix_statistics
from aggregator.tensors import Tensors, raise_counters
from federation.types import Contribution


def fold(model: Tensors, payload: Tensors, counters: tuple[slice, ...], contribution: Contribution) -> None:
    """Mix one update into `model`, in place. Its weight is α_i in (0, 1]."""
    alpha = contribution.weight
    mix(model.weights, payload.weights, alpha)
    mix_statistics(model.means, model.variances, payload.means, payload.variances, alpha)
    raise_counters(model.ints, payload.ints, counters)
