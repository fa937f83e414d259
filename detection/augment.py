"""Batches for training: uint8 squares in, augmented float images and boxes out.

Pixels and boxes are moved together by torchvision.transforms.v2; the plan's `Augmentation` says how much.
What is done to each image is drawn from the generator that the caller passes, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torch's own name for it)

from detection.dataset import Dataset
from federation.jobs import Augmentation

MIN_VISIBLE = 0.3
"""A box is kept if at least this share of its area is still in the picture; less of it would teach noise."""
MIN_SIDE_PX = 2.0
CANVAS = 114
"""Grey around an image that was made smaller; near the mean of photographs."""

Target = dict[str, Tensor]
"""`boxes` float32 [N, 4] xyxy in pixels of the square, `labels` int64 [N]."""


def batch(
    dataset: Dataset, indices: Sequence[int], side: int, rng: np.random.Generator, policy: Augmentation
) -> tuple[Tensor, list[Target]]:
    """Images float32 [N, 3, side, side] in 0..1 and their targets."""
    if policy.moves:
        pairs = [_view(dataset, i, side, rng, policy) for i in indices]
    else:
        pairs = [(dataset.square(i, side), whole_target(dataset, i, side)) for i in indices]
    # the colour kernels are several times faster with the channels first
    squares = torch.stack([square for square, _ in pairs])
    images = squares.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if policy.colours:
        images = torch.stack([_colour(image, rng, policy) for image in images])
    return images, [target for _, target in pairs]


def decoded_side(side: int, policy: Augmentation) -> int:
    """At which side images are decoded, once: enough pixels for the closest view."""
    return ceil(side * policy.max_scale) if policy.rescale else side


def whole_target(dataset: Dataset, index: int, side: int) -> Target:
    """Ground truth of an image that was only resized."""
    item = dataset.items[index]
    scale = np.array([side / item.width, side / item.height] * 2, np.float32)
    return {"boxes": torch.from_numpy(item.boxes * scale), "labels": torch.from_numpy(item.labels)}


def _view(
    dataset: Dataset, index: int, side: int, rng: np.random.Generator, policy: Augmentation
) -> tuple[Tensor, Target]:
    """A view of image `index`, uint8 [3, side, side], and what is to be seen in it.

    A share of the images is scaled by s in [min_scale, max_scale], uniform in log s, and cropped or padded at a
    random place.
    """
    source_side = decoded_side(side, policy)
    image = tv_tensors.Image(dataset.square(index, source_side))
    truth = whole_target(dataset, index, source_side)
    boxes = tv_tensors.BoundingBoxes(truth["boxes"], format="XYXY", canvas_size=(source_side, source_side))
    scale = 1.0
    if rng.random() < policy.rescale:
        scale = exp(rng.uniform(log(policy.min_scale), log(policy.max_scale)))
    scaled = round(side * scale)
    left, top = (int(v) for v in np.floor(rng.random(2) * (abs(scaled - side) + 1)))
    if scaled >= side:
        # the window in source pixels
        x, y = (round(v * source_side / scaled) for v in (left, top))
        window = min(round(side * source_side / scaled), source_side - max(x, y))
        image, boxes = (F.resized_crop(v, y, x, window, window, [side, side]) for v in (image, boxes))
        zoom = side / window
    else:
        around = [left, top, side - scaled - left, side - scaled - top]
        image, boxes = (F.pad(F.resize(v, [scaled, scaled]), around, fill=CANVAS) for v in (image, boxes))
        zoom = scaled / source_side
    if rng.random() < policy.flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    boxes = F.clamp_bounding_boxes(boxes)
    visible = _area(boxes) >= MIN_VISIBLE * zoom**2 * _area(truth["boxes"])
    _, whole = F.sanitize_bounding_boxes(boxes, min_size=MIN_SIDE_PX)
    keep = visible & whole
    return image.as_subclass(Tensor), {
        "boxes": boxes.as_subclass(Tensor)[keep],
        "labels": truth["labels"][keep],
    }


def _area(boxes: Tensor) -> Tensor:
    """Areas of [N, 4] xyxy."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _colour(image: Tensor, rng: np.random.Generator, policy: Augmentation) -> Tensor:
    """Saturation, contrast, brightness and for a share of the images hue. [3, S, S] in 0..1."""

    def factor(strength: float) -> float:
        return float(rng.uniform(1 - strength, 1 + strength))

    image = F.adjust_saturation(image, factor(policy.saturation))
    image = F.adjust_contrast(image, factor(policy.contrast))
    image = F.adjust_brightness(image, factor(policy.brightness))
    if rng.random() < policy.hue_share:
        image = F.adjust_hue(image, float(rng.uniform(-policy.hue, policy.hue)))
    return image
