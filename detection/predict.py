"""Detection in pictures: what a site does with a finished model. Pictures stream through, a batch at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from detection.evaluate import BATCH, Found, to_pixels
from detection.frames import Frame, read_image
from detection.threads import is_out_of_memory, pick_device
from detection.weights import load_state, module_for
from federation.errors import BadSettings
from federation.jobs import JobSpec

SCORE = 0.35


class Detector:
    """The job's model with the full state `weights`, ready to detect on `device`.

    Raises BadPayload if the weights are not this architecture's, BadSettings for a device that there is not.
    """

    def __init__(
        self, spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], device: str = "auto"
    ) -> None:
        self.device = torch.device(pick_device(device))
        self.side = spec.plan.image_size
        self._module: nn.Module = module_for(spec)
        load_state(self._module, weights)
        self._module.to(self.device).eval()

    def detect(
        self,
        frames: Iterable[Frame],
        *,
        batch: int = BATCH,
        score_threshold: float = SCORE,
        labels: Collection[int] | None = None,
    ) -> Iterator[tuple[Frame, Found]]:
        """Each frame with its objects of at least `score_threshold` (0..1), boxes in its pixels, best first.

        labels: the only classes wanted, by 1..C. At most `batch` frames are held at a time. What reading
        `frames` raises comes through; raises BadSettings if the device has too little memory.
        """
        waiting = iter(frames)
        while group := list(islice(waiting, batch)):
            squares = torch.stack([_square(frame.image, self.side) for frame in group])
            for frame, result in zip(group, self._run(squares), strict=True):
                found = to_pixels(result, frame.width / self.side, frame.height / self.side)
                keep = found.scores >= score_threshold
                if labels is not None:
                    keep &= np.isin(found.labels, list(labels))
                yield frame, Found(found.boxes[keep], found.labels[keep], found.scores[keep])

    def _run(self, squares: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        try:
            with torch.inference_mode():
                results = self._module(squares.to(self.device).float().div_(255))
                return [{name: value.cpu() for name, value in result.items()} for result in results]
        except (MemoryError, RuntimeError) as exc:
            if not is_out_of_memory(exc):
                raise
            raise BadSettings(
                f"{self.device} has too little memory for {len(squares)} pictures at a time: use a smaller batch"
            ) from exc


def predict(
    spec: JobSpec,
    weights: Mapping[str, NDArray[np.generic]],
    image_paths: Sequence[Path],
    score_threshold: float = SCORE,
) -> list[Found]:
    """Objects of at least `score_threshold` (0..1) in each image file, boxes in its pixels as they are stored.

    `weights` is a full state. Raises BadDataset for a file that is missing or no image, BadPayload if the
    weights are not this architecture's.
    """
    detector = Detector(spec, weights)
    frames = (read_image(path, upright=False, at_least=detector.side) for path in image_paths)
    return [found for _, found in detector.detect(frames, score_threshold=score_threshold)]


def _square(image: Image.Image, side: int) -> torch.Tensor:
    """uint8 [3, side, side], as in training."""
    pixels = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)
