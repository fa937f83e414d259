"""Detectors by name. Every one keeps torchvision's convention of calling a detector:

    module.train(); losses = module(images, targets)    dict of scalar losses
    module.eval();  found = module(images)              one dict of boxes, labels, scores per image

`images` are float tensors [3, H, W] in 0..1 of any size (or one stacked batch [N, 3, S, S], which skips a
copy); boxes are [M, 4] xyxy in pixels of their own image; labels are 1..C, 0 is background. Inside, every
image is `image_size` x `image_size`.

Nothing is ever downloaded: weights come from `initial` or from the seed. docs/adr/0006 says why the default
is what it is.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection.fcos import fcos_shufflenet_v2_x0_5
from federation.errors import BadJob

log = logging.getLogger(__name__)

DEFAULT_ARCH = "fcos_shufflenet_v2_x0_5"


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


def _ssdlite320(num_classes: int) -> nn.Module:
    module: nn.Module = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes + 1
    )
    # The usual boxes start at 20 % of the image side, where a street camera's objects are 10 %.
    module.anchor_generator = DefaultBoxGenerator(
        [[2, 3] for _ in range(6)], scales=[0.06, 0.12, 0.24, 0.4, 0.6, 0.8, 0.95]
    )
    return module


def _fasterrcnn320(num_classes: int) -> nn.Module:
    module: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes + 1
    )
    return module


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    DEFAULT_ARCH: fcos_shufflenet_v2_x0_5,
    "ssdlite320_mobilenet_v3_large": _ssdlite320,
    "fasterrcnn_mobilenet_v3_large_320_fpn": _fasterrcnn320,
}
ARCHS: tuple[str, ...] = tuple(_BUILDERS)


@dataclass(frozen=True)
class BackboneMatch:
    """What of a pretrained file fitted: names in the module, and names in the file that found no place."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def build(
    arch: str, num_classes: int, image_size: int, initial: Path | None = None, *, seed: int = 0
) -> nn.Module:
    """A detector of `num_classes` classes (background not counted), the same for the same seed.

    `initial`: a pretrained backbone (`load_backbone`). Raises BadJob for an unknown architecture.
    """
    if arch not in _BUILDERS:
        raise BadJob(f"unknown architecture {arch!r}: use one of {', '.join(ARCHS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _BUILDERS[arch](num_classes)
    transform: Any = module.transform
    module.transform = SquareTransform(image_size, list(transform.image_mean), list(transform.image_std))
    if initial is not None:
        match = load_backbone(module, initial)
        log.info(
            "%s: %d tensors of the backbone loaded, %d kept from the seed, %d of the file unused",
            initial.name,
            len(match.loaded),
            len(match.missing),
            len(match.unused),
        )
    return module.to(memory_format=torch.channels_last)


def load_backbone(module: nn.Module, path: Path) -> BackboneMatch:
    """Copy the tensors of a .pth file into `module.backbone` where name and shape agree.

    Names may carry the prefix "backbone.", "backbone.body." or none. Read with weights_only, so a hostile
    file cannot run code. Raises BadJob if it cannot be read or nothing of it fits.
    """
    # torch's older format is a bare pickle, whose reader fails in any way on a file that is none
    if not zipfile.is_zipfile(path):
        raise BadJob(f"{path}: not a weights file: there must be a .pth archive as torch.save writes it")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError) as exc:
        raise BadJob(f"{path}: not a weights file that torch can load safely: {exc}") from exc
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise BadJob(f"{path}: must hold a state dict, names to tensors")
    backbone: nn.Module = module.get_submodule("backbone")
    own = backbone.state_dict()
    loaded: dict[str, Tensor] = {}
    unused: list[str] = []
    for name, value in stored.items():
        bare = name.removeprefix("backbone.").removeprefix("body.")
        target = next((key for key in (bare, f"body.{bare}") if key in own), None)
        if target is not None and own[target].shape == value.shape:
            loaded[target] = value
        else:
            unused.append(name)
    if not loaded:
        raise BadJob(f"{path}: no tensor fits the backbone of this architecture")
    backbone.load_state_dict(loaded, strict=False)
    # a file may leave the counters out, and a counter is no weight
    missing = [key for key in own if key not in loaded and not key.endswith("num_batches_tracked")]
    return BackboneMatch(tuple(loaded), tuple(missing), tuple(unused))
