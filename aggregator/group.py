"""The open group of a buffered strategy: what its updates add up to until there are enough of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.blocks import Floats, Ints
from aggregator.statistics import Moments, forget, no_moments
from federation.layout import Layout


@dataclass
class Group:
    """One accumulator as large as the model's weights, and one for each shared moment, however many updates there are.

    What `weights` holds is the strategy's business: a sum of differences (fedbuff), a mean (fedavg).
    """

    weights: Floats  # [W]; meaningless while count is 0
    statistics: Moments  # [S]
    moments: tuple[Floats, ...]  # [W] each: means of the optimisers' moments, as many as sites share
    ints: Ints  # [I]; the counters' maxima, meaningless while count is 0
    count: int = 0
    amount: float = 0
    """What its updates would weigh together if none were stale (weighting.amount)."""


def empty_group(layout: Layout, moments: int = 0) -> Group:
    return Group(
        weights=np.empty(layout.weight_count, np.float32),
        statistics=no_moments(layout.statistic_count),
        moments=tuple(np.zeros(layout.weight_count, np.float32) for _ in range(moments)),
        ints=np.empty(layout.int_count, np.int64),
    )


def reset(group: Group) -> None:
    """Begin the next group in the same memory."""
    group.count, group.amount = 0, 0
    forget(group.statistics)
