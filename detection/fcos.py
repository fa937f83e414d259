"""The small default detector: FCOS over ShuffleNetV2 x0.5 with a light feature pyramid, 0.21 M parameters.

    image [N, 3, S, S]
      -> body      ShuffleNetV2 x0.5, stages 2, 3, 4     48, 96, 192 channels at strides 8, 16, 32
      -> pyramid   1x1 laterals, nearest upsampling, 5x5 depthwise + 1x1 smoothing     64 channels each
      -> heads     two 5x5 depthwise + 1x1 convolutions with GroupNorm, then 3x3        class | box, centre

FCOS: Tian et al. 2019, arXiv 1904.01355. ShuffleNetV2: Ma et al. 2018, arXiv 1807.11164. Depthwise 5x5
pyramid and heads: PicoDet, Yu et al. 2021, arXiv 2111.00902.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import channel_shuffle, interpolate
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import (
    FCOSClassificationHead,
    FCOSHead,
    FCOSRegressionHead,
)
from torchvision.models.shufflenetv2 import InvertedResidual, ShuffleNetV2

STRIDES = (8, 16, 32)
STAGE_CHANNELS = (48, 96, 192)
PYRAMID_CHANNELS = 64
HEAD_CONVS = 2
GROUPS = 8
PRIOR_PROBABILITY = 0.01
# torchvision's box branch ends in a ReLU. With bias 0 a channel can die in the first steps at these learning
# rates, and then it is dead for ever; this starts every box at 1.5 strides to each side.
BOX_BIAS = 1.5


class ChannelsLastResidual(InvertedResidual):  # type: ignore[misc]
    """torchvision's block with torch's own channel shuffle, which keeps the channels last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():  # ONNX has no channel shuffle; torchvision's is made of reshapes
            return super().forward(x)  # type: ignore[no-any-return]
        if self.stride == 1:
            first, second = x.chunk(2, dim=1)
            halves = (first, self.branch2(second))
        else:
            halves = (self.branch1(x), self.branch2(x))
        return channel_shuffle(torch.cat(halves, dim=1), 2)


class ShuffleNetPyramid(nn.Module):
    """Backbone with its feature pyramid: [N, 3, H, W] -> three maps of 64 channels at strides 8, 16, 32."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = PYRAMID_CHANNELS
        body = ShuffleNetV2([4, 8, 4], [24, *STAGE_CHANNELS, 1024], inverted_residual=ChannelsLastResidual)
        del body.conv5, body.fc
        self.body = body
        self.laterals = nn.ModuleList(_conv1x1(channels, PYRAMID_CHANNELS) for channels in STAGE_CHANNELS)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                _depthwise(PYRAMID_CHANNELS), *_conv1x1(PYRAMID_CHANNELS, PYRAMID_CHANNELS), nn.ReLU(True)
            )
            for _ in STAGE_CHANNELS
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.body.maxpool(self.body.conv1(x))
        stages: list[Tensor] = []
        for stage in (self.body.stage2, self.body.stage3, self.body.stage4):
            x = stage(x)
            stages.append(x)
        maps: list[Tensor] = []
        for lateral, stage_map in zip(reversed(self.laterals), reversed(stages), strict=True):
            level = lateral(stage_map)
            if maps:
                level = level + interpolate(maps[-1], size=level.shape[-2:], mode="nearest")
            maps.append(level)
        maps.reverse()
        smoothed = (smooth(level) for smooth, level in zip(self.smooth, maps, strict=True))
        return OrderedDict((str(i), level) for i, level in enumerate(smoothed))


def fcos_shufflenet_v2_x0_5(num_classes: int) -> nn.Module:
    """The detector for `num_classes` classes, background not counted. Initialised from torch's generator."""
    channels = PYRAMID_CHANNELS
    # torchvision indexes its class channels by label, so channel 0 stands for the background and stays idle
    head = FCOSHead(channels, 1, num_classes + 1, num_convs=1)
    classification = FCOSClassificationHead(channels, 1, num_classes + 1, num_convs=0)
    classification.conv = _tower()
    classification.cls_logits = _prediction(num_classes + 1)
    nn.init.constant_(classification.cls_logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    regression = FCOSRegressionHead(channels, 1, num_convs=0)
    regression.conv = _tower()
    regression.bbox_reg = _prediction(4)
    nn.init.constant_(regression.bbox_reg.bias, BOX_BIAS)
    regression.bbox_ctrness = _prediction(1)
    head.classification_head = classification
    head.regression_head = regression
    detector: nn.Module = FCOS(
        ShuffleNetPyramid(),
        num_classes + 1,
        anchor_generator=AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * len(STRIDES)),
        head=head,
        # low, because average precision counts the tail of the ranking too
        score_thresh=0.02,
        nms_thresh=0.5,
        detections_per_img=100,
        topk_candidates=300,
    )
    return detector


def _conv1x1(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def _depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)


def _tower() -> nn.Sequential:
    """GroupNorm, not BatchNorm: the tower is shared by levels whose statistics differ."""
    layers: list[nn.Module] = []
    for _ in range(HEAD_CONVS):
        layers += [
            _depthwise(PYRAMID_CHANNELS),
            nn.Conv2d(PYRAMID_CHANNELS, PYRAMID_CHANNELS, 1, bias=False),
            nn.GroupNorm(GROUPS, PYRAMID_CHANNELS),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def _prediction(outputs: int) -> nn.Conv2d:
    """3x3, not 1x1: an update is some tens of steps, and the wider fan-in nearly doubled mAP after 120 steps."""
    conv = nn.Conv2d(PYRAMID_CHANNELS, outputs, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
