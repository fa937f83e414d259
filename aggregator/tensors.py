"""A model or a payload as the stretches that are merged by different rules (see federation.layout)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.blocks import Floats, Ints
from federation.layout import Layout


@dataclass(frozen=True)
class Tensors:
    """Views into a flat vector pair; writing to them writes to the vectors."""

    weights: Floats  # [W] parameters, or their difference
    moments: tuple[
        Floats, ...
    ]  # [W] each: first, second; of a payload alone, if its site's optimiser is shared
    means: Floats  # [S] BatchNorm running means
    variances: Floats  # [S] BatchNorm running variances, in the same order
    ints: Ints  # [I]


def split(layout: Layout, flat: Floats, ints: Ints) -> Tensors:
    """Views of `flat`, as long as the layout says, and `ints` [I]. Raises ValueError if they are not of this layout."""
    if flat.dtype != np.float32 or flat.shape != (layout.float_count,):
        raise ValueError(f"flat is {flat.dtype} {flat.shape}, must be float32 ({layout.float_count},)")
    if ints.dtype != np.int64 or ints.shape != (layout.int_count,):
        raise ValueError(f"ints is {ints.dtype} {ints.shape}, must be int64 ({layout.int_count},)")
    w, s = layout.weight_count, layout.statistic_count
    at = layout.float_count - 2 * s
    moments = tuple(flat[w * k : w * (k + 1)] for k in range(1, layout.moments + 1))
    return Tensors(flat[:w], moments, flat[at : at + s], flat[at + s :], ints)


def raise_counters(ints: Ints, other: Ints, counters: tuple[slice, ...]) -> None:
    """Counters (`num_batches_tracked`) take the maximum; every other integer keeps what it is."""
    for at in counters:
        np.maximum(ints[at], other[at], out=ints[at])
