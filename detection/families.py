"""The built-in detectors: torchvision's families, and the small default. docs/architectures.md compares them.

Built for any number of classes and any square input, always without weights: `detection/initial.py` brings
those. So the backbones have trainable BatchNorm, where torchvision's own pretrained detectors have
FrozenBatchNorm2d; what becomes of BatchNorm is the job's norm policy, and `frozen` is what torchvision does.
ssd300_vgg16 has no BatchNorm at all, and the three policies are the same for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum, detection
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

from detection.fcos import fcos_shufflenet_v2_x0_5

Weights = type[WeightsEnum]
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """One architecture.

    build: (num_classes without background, image_size) -> detector, initialised from torch's generator.
    backbone_weights: torchvision's weights of the classifier whose trunk is the backbone.
    from_classifier: name of such a classifier's tensor -> name in the detector.
    weights: torchvision's weights of the whole detector, where it has any.
    """

    build: Callable[[int, int], nn.Module]
    backbone_weights: Weights
    from_classifier: Rename
    weights: Weights | None = None
    min_image_size: int = 64

    def pretrained(self) -> list[WeightsEnum]:
        """torchvision's weights that were made for it, those of the whole detector first."""
        return [member for group in (self.weights, self.backbone_weights) if group for member in group]


def _torchvision(builder: Callable[..., nn.Module], **options: Any) -> Callable[[int, int], nn.Module]:
    def build(num_classes: int, image_size: int) -> nn.Module:
        return builder(weights=None, weights_backbone=None, num_classes=num_classes + 1, **options)

    return build


def _default(num_classes: int, image_size: int) -> nn.Module:
    return fcos_shufflenet_v2_x0_5(num_classes)


def _ssdlite320(num_classes: int, image_size: int) -> nn.Module:
    module = _torchvision(detection.ssdlite320_mobilenet_v3_large)(num_classes, image_size)
    # The usual boxes start at 20 % of the image side, where a street camera's objects are 10 %.
    module.anchor_generator = DefaultBoxGenerator(
        [[2, 3] for _ in range(6)], scales=[0.06, 0.12, 0.24, 0.4, 0.6, 0.8, 0.95]
    )
    return module


def _ssd300(num_classes: int, image_size: int) -> nn.Module:
    module = _torchvision(detection.ssd300_vgg16)(num_classes, image_size)
    if image_size != 300:
        # torchvision's steps are the spacing of the maps' cells at 300 pixels; without, it is computed
        generator: Any = module.anchor_generator
        generator.steps = None
    return module


def _in_body(name: str) -> str:
    """ResNet and ShuffleNet keep their names; MobileNet's layers lie in `features`."""
    return f"backbone.body.{name.removeprefix('features.')}"


def _in_ssd(name: str) -> str:
    """VGG-16 is cut before its fourth pooling, features.23; what follows begins the first extra stage."""
    match = re.fullmatch(r"features\.(\d+)\.(.+)", name)
    if match is None:
        return name
    layer, rest = int(match[1]), match[2]
    return f"backbone.features.{layer}.{rest}" if layer < 23 else f"backbone.extra.0.{layer - 23}.{rest}"


def _in_ssdlite(name: str) -> str:
    """MobileNetV3 is cut inside its block 13, after the expansion."""
    match = re.fullmatch(r"features\.(\d+)\.(.+)", name)
    if match is None:
        return name
    layer, rest = int(match[1]), match[2]
    if layer < 13:
        return f"backbone.features.0.{layer}.{rest}"
    if layer > 13:
        return f"backbone.features.1.{layer - 13}.{rest}"
    expansion, inner = rest.startswith("block.0."), rest.removeprefix("block.")
    return f"backbone.features.0.13.{inner[2:]}" if expansion else f"backbone.features.1.0.{inner}"


DEFAULT_ARCH = "fcos_shufflenet_v2_x0_5"

FAMILIES: dict[str, Family] = {
    DEFAULT_ARCH: Family(_default, models.ShuffleNet_V2_X0_5_Weights, _in_body),
    "ssdlite320_mobilenet_v3_large": Family(
        _ssdlite320,
        models.MobileNet_V3_Large_Weights,
        _in_ssdlite,
        detection.SSDLite320_MobileNet_V3_Large_Weights,
    ),
    "ssd300_vgg16": Family(
        _ssd300, models.VGG16_Weights, _in_ssd, detection.SSD300_VGG16_Weights, min_image_size=268
    ),
    "fcos_resnet50_fpn": Family(
        _torchvision(detection.fcos_resnet50_fpn),
        models.ResNet50_Weights,
        _in_body,
        detection.FCOS_ResNet50_FPN_Weights,
    ),
    "retinanet_resnet50_fpn": Family(
        _torchvision(detection.retinanet_resnet50_fpn),
        models.ResNet50_Weights,
        _in_body,
        detection.RetinaNet_ResNet50_FPN_Weights,
    ),
    "retinanet_resnet50_fpn_v2": Family(
        _torchvision(detection.retinanet_resnet50_fpn_v2),
        models.ResNet50_Weights,
        _in_body,
        detection.RetinaNet_ResNet50_FPN_V2_Weights,
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Family(
        _torchvision(detection.fasterrcnn_mobilenet_v3_large_320_fpn),
        models.MobileNet_V3_Large_Weights,
        _in_body,
        detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": Family(
        _torchvision(detection.fasterrcnn_mobilenet_v3_large_fpn),
        models.MobileNet_V3_Large_Weights,
        _in_body,
        detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    ),
    "fasterrcnn_resnet50_fpn": Family(
        _torchvision(detection.fasterrcnn_resnet50_fpn),
        models.ResNet50_Weights,
        _in_body,
        detection.FasterRCNN_ResNet50_FPN_Weights,
    ),
    "fasterrcnn_resnet50_fpn_v2": Family(
        _torchvision(detection.fasterrcnn_resnet50_fpn_v2),
        models.ResNet50_Weights,
        _in_body,
        detection.FasterRCNN_ResNet50_FPN_V2_Weights,
    ),
}
