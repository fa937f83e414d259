"""Arithmetic on long vectors in cache-sized blocks, in place.

A model is one flat float32 vector of up to hundreds of megabytes. `x += a * u` in numpy allocates a temporary
as large as the model and drags everything through memory twice; block by block the temporary stays in the
cache and the memory sees each number once.

Only elementwise +, -, *, / and square root are used, one IEEE operation at a time, so a result does not
depend on the length of a block, on the processor, or on how many updates are folded in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 1 << 16
"""Numbers per block: 256 KiB of float32, so that three of them fit a second-level cache."""


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover 0 … size in order."""
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def scratch(size: int) -> Floats:
    """Room for the temporary of one block of a vector of `size` numbers."""
    return np.empty(min(size, BLOCK), np.float32)


def mix(x: Floats, y: Floats, a: float) -> None:
    """x ← (1-a)·x + a·y, where a ≥ 0.

    Written as a step from the nearer end, x + a·(y-x) or y - (1-a)·(y-x): where y equals x the result is x
    exactly, and a = 1 gives y exactly, both of which the convex form and a single one of these miss.
    """
    temporary = scratch(x.size)
    near_x = a < 0.5
    step = np.float32(a if near_x else 1.0 - a)
    for at in blocks(x.size):
        xs, ys, t = x[at], y[at], temporary[: at.stop - at.start]
        np.subtract(ys, xs, out=t)
        np.multiply(t, step, out=t)
        if near_x:
            np.add(xs, t, out=xs)
        else:
            np.subtract(ys, t, out=xs)


def add_scaled(x: Floats, u: Floats, c: float) -> None:
    """x ← x + c·u."""
    temporary, factor = scratch(x.size), np.float32(c)
    for at in blocks(x.size):
        xs, t = x[at], temporary[: at.stop - at.start]
        np.multiply(u[at], factor, out=t)
        np.add(xs, t, out=xs)


def set_scaled(x: Floats, u: Floats, c: float) -> None:
    """x ← c·u."""
    np.multiply(u, np.float32(c), out=x)
