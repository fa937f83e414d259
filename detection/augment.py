"""Batches for training: uint8 squares in, augmented float images and boxes out.

Geometry is decided per image with numpy's generator and done by one resize of uint8 pixels; colour is done on
the whole batch. All randomness comes from the generator that the caller passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from detection.dataset import Dataset

MIN_SCALE, MAX_SCALE = 0.75, 1.5
RESCALED = 0.5
"""Share of the images that are scaled; the cameras stand still, so the others are as they will be met."""
MIN_VISIBLE = 0.3
"""A box is kept if at least this share of its area is still in the picture."""
MIN_SIDE_PX = 2.0
CANVAS = 114
"""Grey around an image that was made smaller; near the mean of photographs."""
BRIGHTNESS = CONTRAST = 0.2
SATURATION = 0.3
COLOUR_SHIFT = 0.05

Target = dict[str, Tensor]
"""`boxes` float32 [N, 4] xyxy in pixels of the square, `labels` int64 [N]."""


def batch(
    dataset: Dataset, indices: Sequence[int], side: int, rng: np.random.Generator, *, augment: bool
) -> tuple[Tensor, list[Target]]:
    """Images float32 [N, 3, side, side] in 0..1 and their targets."""
    if not augment:
        squares = torch.stack([dataset.square(i, side) for i in indices])
        return squares.float().div_(255), [whole_target(dataset, i, side) for i in indices]
    squares = torch.empty((len(indices), 3, side, side), dtype=torch.uint8, memory_format=torch.channels_last)
    targets = []
    for square, index in zip(squares, indices, strict=True):
        targets.append(_scale_crop_flip(dataset, index, square, rng))
    images = squares.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return _colour(images, rng), targets


def whole_target(dataset: Dataset, index: int, side: int) -> Target:
    """Ground truth of an image that was only resized."""
    item = dataset.items[index]
    scale = np.array([side / item.width, side / item.height] * 2, np.float32)
    return {"boxes": torch.from_numpy(item.boxes * scale), "labels": torch.from_numpy(item.labels)}


def _scale_crop_flip(dataset: Dataset, index: int, out: Tensor, rng: np.random.Generator) -> Target:
    """Fill `out`, uint8 [3, S, S], with a view of image `index`; returns what is to be seen in it.

    Half of the images are scaled by s in [0.75, 1.5], uniform in log s, and cropped or padded at a random place.
    """
    side = out.shape[-1]
    # Enough pixels for the closest view, decoded once.
    source_side = ceil(side * MAX_SCALE)
    source = dataset.square(index, source_side)
    scale = exp(rng.uniform(log(MIN_SCALE), log(MAX_SCALE))) if rng.random() < RESCALED else 1.0
    scaled = round(side * scale)
    left, top = (int(v) for v in np.floor(rng.random(2) * (abs(scaled - side) + 1)))
    if scaled >= side:
        # the window in source pixels; rounded, and the boxes follow the rounded one
        x, y = (round(v * source_side / scaled) for v in (left, top))
        window = min(round(side * source_side / scaled), source_side - max(x, y))
        out.copy_(_resize(source[:, y : y + window, x : x + window], side))
        zoom, shift = side / window, np.array([-x, -y] * 2) * (side / window)
    else:
        out.fill_(CANVAS)
        out[:, top : top + scaled, left : left + scaled] = _resize(source, scaled)
        zoom, shift = scaled / source_side, np.array([left, top] * 2)
    item = dataset.items[index]
    to_source = np.array([source_side / item.width, source_side / item.height] * 2)
    boxes = item.boxes * to_source * zoom + shift
    if rng.random() < 0.5:
        out.copy_(out.flip(-1))
        boxes = np.stack([side - boxes[:, 2], boxes[:, 1], side - boxes[:, 0], boxes[:, 3]], axis=1)
    return _visible(boxes, item.labels, side)


def _resize(pixels: Tensor, side: int) -> Tensor:
    resized: Tensor = interpolate(
        pixels[None], size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return resized


def _visible(boxes: NDArray[np.float64], labels: NDArray[np.int64], side: int) -> Target:
    """Clip to the picture; leave out what is hardly in it, which would teach noise."""
    clipped = boxes.clip(0, side)
    extent = clipped[:, 2:] - clipped[:, :2]
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    keep = (extent.min(axis=1, initial=np.inf) >= MIN_SIDE_PX) & (extent.prod(axis=1) >= MIN_VISIBLE * whole)
    return {
        "boxes": torch.from_numpy(clipped[keep].astype(np.float32)),
        "labels": torch.from_numpy(labels[keep]),
    }


def _colour(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and a colour cast, drawn per image. In place, [N, 3, S, S] in 0..1."""

    def factor(strength: float, channels: int = 1) -> Tensor:
        drawn = rng.uniform(1 - strength, 1 + strength, (len(images), channels, 1, 1))
        return torch.from_numpy(drawn.astype(np.float32))

    grey = images.mean(dim=1, keepdim=True)
    # x -> grey + s(x - grey), then middle + c(x - middle), then b·x, folded into two passes over the pixels
    saturation, contrast = factor(SATURATION), factor(CONTRAST)
    gain = factor(BRIGHTNESS) * factor(COLOUR_SHIFT, 3)
    middle = grey.mean(dim=(2, 3), keepdim=True)
    images.mul_(saturation * contrast * gain)
    images.add_((grey * (contrast * (1 - saturation)) + middle * (1 - contrast)) * gain)
    return images.clamp_(0, 1)
