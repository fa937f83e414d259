"""The input of every built-in detector: one square of `image_size` pixels, whatever torchvision's own sizes are."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class SquareTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Resize to a square, normalise, and stack; boxes of the output are scaled back by the parent.

    torchvision's own transform resamples even what has the right size, image by image.
    """

    def __init__(self, side: int, mean: list[float], std: list[float]) -> None:
        super().__init__(side, side, mean, std, fixed_size=(side, side))
        self.side = side

    def forward(
        self, images: list[Tensor] | Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        square = (self.side, self.side)
        if isinstance(images, Tensor) and images.shape[-2:] == square:
            batch, resized = images, targets
        else:
            pairs = [
                self.resize(image, dict(targets[i]) if targets is not None else None)
                for i, image in enumerate(images)
            ]
            batch = torch.stack([image for image, _ in pairs])
            resized = [target for _, target in pairs] if targets is not None else None
        mean = batch.new_tensor(self.image_mean).view(1, 3, 1, 1)
        std = batch.new_tensor(self.image_std).view(1, 3, 1, 1)
        # depthwise convolutions are several times faster on the CPU with channels last
        batch = ((batch - mean) / std).contiguous(memory_format=torch.channels_last)
        return ImageList(batch, [square] * len(batch)), resized
