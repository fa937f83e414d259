"""VOC2010 average precision: the area under the interpolated precision/recall curve, over all its points.

The measure of the Federated Street paper (Luo et al. 2019, arXiv 1910.11089), as the VOC2010 development kit defines
it (VOCevaldet.m, VOCap.m; http://host.robots.ox.ac.uk/pascal/VOC/voc2010/devkit_doc_08-May-2010.pdf, section 3.4.1):
the detections of a class, over all images, best score first; each belongs to the box of its image that it overlaps
most, whether or not that is found already; it is true if the overlap is at least 0.5 and the box was not found
before, otherwise false. Differences of definition, not of value:

- The kit's boxes name their first and last pixel, so it adds 1 to each width; ours are edges (xyxy), and it does not.
- The kit leaves the order of equal scores open. Here it is that of the images, and within one that of its detections.
- There are no "difficult" boxes, which the kit counts neither way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_OVERLAP = 0.5

Boxes = NDArray[np.floating]
Flags = NDArray[np.bool_]


def average_precision(
    truth: Sequence[Boxes], found: Sequence[Boxes], scores: Sequence[NDArray[np.floating]]
) -> float:
    """AP of one class, 0..1; one entry per image.

    truth: [G, 4] xyxy, at least one box in all. found: [D, 4] xyxy, and scores: [D], the same length.
    """
    count = sum(len(boxes) for boxes in truth)
    if not count:
        raise ValueError("a class without ground truth has no average precision")
    order = np.argsort(-np.concatenate([*scores, np.zeros(0)]), kind="stable")
    return area(hits(truth, found, order), count)


def hits(truth: Sequence[Boxes], found: Sequence[Boxes], order: NDArray[np.intp]) -> Flags:
    """[D]: whether each detection of all images is true; `order` sorts them, best first."""
    claimed: list[NDArray[np.intp]] = []  # number of the box that a detection belongs to; -1: none
    first = 0
    for real, boxes in zip(truth, found, strict=True):
        if len(real) and len(boxes):
            overlap = iou(boxes, real)
            claimed.append(np.where(overlap.max(axis=1) >= MIN_OVERLAP, overlap.argmax(axis=1) + first, -1))
        else:
            claimed.append(np.full(len(boxes), -1))
        first += len(real)
    ranked = np.concatenate([*claimed, np.zeros(0, np.intp)])[order]
    true = np.zeros(len(ranked), np.bool_)
    true[np.unique(ranked, return_index=True)[1]] = True  # of those that claim a box, the first
    return true & (ranked >= 0)


def area(true: Flags, count: int) -> float:
    """Under the curve of detections, best first, of which `true` are, when there are `count` boxes to find.

    p(r) is the highest precision at a recall of at least r, so the curve falls in steps, one at each true detection.
    """
    if not len(true):
        return 0.0
    precision = np.cumsum(true) / np.arange(1, len(true) + 1)
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]
    return float(interpolated[true].sum() / count)


def iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """[N, M]: intersection over union of every box of `a` [N, 4] with every one of `b` [M, 4], xyxy."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    both: NDArray[np.float64] = sides.clip(min=0).prod(axis=2)
    either = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1)[None, :] - both
    overlap: NDArray[np.float64] = np.zeros_like(both)
    np.divide(both, either, out=overlap, where=either > 0)
    return overlap
