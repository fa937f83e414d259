"""How far two models are apart, layer by layer: the relative change ‖b - a‖₂ / ‖a‖₂ of tensors and groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.layout import is_statistic

STATISTICS = "running statistics"
"""The group of BatchNorm's means and variances, whatever layer they are of: they are measured, not trained."""


@dataclass(frozen=True)
class Change:
    """Of a tensor, or of all tensors of a group. `count`: numbers in it; the others are sums of squares."""

    name: str
    count: int
    before: float
    moved: float

    @property
    def relative(self) -> float:
        """0: the same. Infinite if everything was 0 before."""
        if not self.moved:
            return 0.0
        return sqrt(self.moved / self.before) if self.before else inf


def changes(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> list[Change]:
    """Of every float tensor, in the order of `before`. Raises ValueError if the models have other tensors or shapes."""
    shapes = {name: array.shape for name, array in before.items()}
    if shapes != {name: array.shape for name, array in after.items()}:
        raise ValueError("the two models do not have the same tensors")
    found = []
    for name, array in before.items():
        if np.issubdtype(array.dtype, np.floating):
            old = array.astype(np.float64).ravel()
            step = after[name].astype(np.float64).ravel() - old
            found.append(Change(name, old.size, float(old @ old), float(step @ step)))
    return found


def by_group(found: Iterable[Change], depth: int) -> list[Change]:
    """Sums over the layers whose dotted names begin with the same `depth` words, in order of first appearance."""
    groups: dict[str, Change] = {}
    for change in found:
        name = STATISTICS if is_statistic(change.name) else _group(change.name, depth)
        old = groups.get(name, Change(name, 0, 0.0, 0.0))
        groups[name] = Change(
            name, old.count + change.count, old.before + change.before, old.moved + change.moved
        )
    return list(groups.values())


def _group(name: str, depth: int) -> str:
    layer = name.rpartition(".")[0] or name  # without "weight", "bias"
    return ".".join(layer.split(".")[:depth])
