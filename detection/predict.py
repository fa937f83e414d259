"""Detection in image files: what a site does with a finished model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from detection.dataset import read_square
from detection.evaluate import BATCH, Found, to_pixels
from detection.weights import load_state, module_for
from federation.errors import BadDataset
from federation.jobs import JobSpec


def predict(
    spec: JobSpec,
    weights: Mapping[str, NDArray[np.generic]],
    image_paths: Sequence[Path],
    score_threshold: float = 0.35,
) -> list[Found]:
    """Objects of at least `score_threshold` (0..1) in each image, boxes in pixels of the file, best first.

    `weights` is a full state. Raises BadDataset for a file that is missing or no image, BadPayload if the
    weights are not this architecture's.
    """
    module = module_for(spec)
    load_state(module, weights)
    module.eval()
    side = spec.plan.image_size
    found: list[Found] = []
    for first in range(0, len(image_paths), BATCH):
        paths = image_paths[first : first + BATCH]
        squares = torch.stack([read_square(path, side) for path in paths])
        with torch.inference_mode():
            results = module(squares.float().div_(255))
        for path, result in zip(paths, results, strict=True):
            width, height = _size(path)
            one = to_pixels(result, width / side, height / side)
            keep = one.scores >= score_threshold
            found.append(Found(one.boxes[keep], one.labels[keep], one.scores[keep]))
    return found


def _size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as exc:
        raise BadDataset(f"{path}: cannot be read as an image ({exc}): replace the file") from exc
