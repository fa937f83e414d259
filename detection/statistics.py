"""What is in a data set, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detection.annotations import Picture

SMALL_PX, LARGE_PX = 32, 96
"""COCO's bounds of small, medium and large: an area of 32² and of 96² pixels (Lin et al. 2014, arXiv 1405.0312; the
areas are of outlines there and of boxes here)."""
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class ClassCount:
    """Of one class: boxes, images with at least one, and the median side of its boxes."""

    boxes: int
    images: int
    median_px: float


@dataclass(frozen=True, eq=False)
class Statistics:
    """Counts, and box sizes as the side of a square of the same area.

    `side_px` in pixels of the file and `side_share` as a share of the image's own side, both at QUANTILES; empty
    without boxes. `sizes` are shares of the boxes that COCO calls small, medium and large.
    """

    images: int
    empty_images: int
    boxes: int
    classes: dict[str, ClassCount]
    image_sizes: Counter[tuple[int, int]]
    side_px: tuple[float, ...]
    side_share: tuple[float, ...]
    sizes: dict[str, float]
    fields: dict[str, int]
    """Fields of the images, such as the camera's id, and how many values each has."""


def describe(pictures: Sequence[Picture], classes: Sequence[str]) -> Statistics:
    """Statistics of checked pictures, classes in the order of `classes`."""
    sides: dict[str, list[float]] = {name: [] for name in classes}
    shares: list[float] = []
    images: Counter[str] = Counter()
    image_sizes: Counter[tuple[int, int]] = Counter()
    fields: dict[str, set[str | int]] = {}
    for picture in pictures:
        width, height = picture.width or 0, picture.height or 0
        image_sizes[width, height] += 1
        images.update({box.name for box in picture.boxes})
        for key, value in picture.fields.items():
            fields.setdefault(key, set()).add(value)
        for box in picture.boxes:
            left, top, right, bottom = box.corners
            side = ((right - left) * (bottom - top)) ** 0.5
            sides[box.name].append(side)
            shares.append(side / (width * height) ** 0.5)
    every = np.array([side for own in sides.values() for side in own])
    small, large = (every < SMALL_PX).sum(), (every >= LARGE_PX).sum()
    count = max(len(every), 1)
    return Statistics(
        images=len(pictures),
        empty_images=sum(not picture.boxes for picture in pictures),
        boxes=len(every),
        classes={
            name: ClassCount(len(own), images[name], float(np.median(own)) if own else 0.0)
            for name, own in sides.items()
        },
        image_sizes=image_sizes,
        side_px=_quantiles(every),
        side_share=_quantiles(np.array(shares)),
        sizes={
            "small": float(small / count),
            "medium": float((len(every) - small - large) / count),
            "large": float(large / count),
        },
        fields={key: len(values) for key, values in fields.items()},
    )


def _quantiles(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if len(values) else ()
