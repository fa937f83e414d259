"""A version as an ONNX file, for whatever runs beside a camera: https://onnx.ai. docs/export.md is for its users.

    image   float32 [1, 3, S, S]   RGB, 0..1, S = the job's image_size
    boxes   float32 [N, 4]         xyxy in pixels of that square, best first
    labels  int64 [N]              1..C
    scores  float32 [N]            0..1

Everything else is inside: normalisation, anchors, the choice of boxes, non-maximum suppression. The file says in
its metadata which job and version it is, and what the classes are called. Nothing is written that was not
compared with the detector itself, in onnxruntime. docs/adr/0011 says why it is torch's older exporter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.weights import load_state, module_for
from federation.errors import BadJob, BadSettings
from federation.jobs import JobSpec

OPSET = 17
TOLERANCE = 1e-3
"""Of a score, and of a box's corner in units of the image side."""
OUTPUTS = ("boxes", "labels", "scores")
Detections = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Exported:
    """`difference`: the largest between detector and file, of scores and of corners in units of the side."""

    data: bytes
    detections: int
    difference: float


def export_onnx(
    spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str], *, images: int = 3
) -> Exported:
    """The detector with the full state `weights`, compared with itself in onnxruntime on `images` images of noise.

    `metadata` is stored beside arch, image_size and classes. Raises BadJob if the architecture cannot be exported
    or the file does not do the same, BadSettings if onnx or onnxruntime is not installed.
    """
    onnx, onnxruntime = _libraries()
    module = module_for(spec)
    load_state(module, weights)
    detector = _OneImage(module.eval()).eval()
    side = spec.plan.image_size
    batch = noise(images, side)
    plain = _to_onnx(spec.arch, detector, batch[:1])
    model = onnx.load_from_string(plain)
    contract = {
        "arch": spec.arch,
        "image_size": str(side),
        "classes": json.dumps(list(spec.classes), ensure_ascii=False),
    }
    onnx.helper.set_model_props(model, {**contract, **metadata})
    model.doc_string = str(__doc__)
    data: bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    worst, count = 0.0, 0
    for i in range(images):
        image = batch[i : i + 1]
        with torch.inference_mode():
            boxes, labels, scores = (tensor.numpy() for tensor in detector(image))
        expected = boxes / side, labels, scores
        boxes, labels, scores = session.run(list(OUTPUTS), {"image": image.numpy()})
        worst = max(worst, difference(expected, (boxes / side, labels, scores)))
        count += len(scores)
    if not worst <= TOLERANCE:
        raise BadJob(
            f"{spec.arch} was exported, but what the file detects differs from the detector by {worst:.2g} "
            f"(allowed: {TOLERANCE:g}): it is not written. A version that is hardly trained, whose scores are all "
            "alike, may do so; else this architecture cannot be exported"
        )
    return Exported(data, count, worst)


def difference(one: Detections, other: Detections) -> float:
    """Largest difference of a score or a corner between the same detections; infinite if they are not the same.

    Each detection is compared with the most similar of its label, because equal scores have no order.
    """
    if len(one[2]) != len(other[2]):
        return float("inf")
    worst = 0.0
    free = np.ones(len(other[2]), bool)
    for box, label, score in zip(*one, strict=True):
        apart = np.maximum(np.abs(other[0] - box).max(axis=1), np.abs(other[2] - score))
        apart[~free | (other[1] != label)] = np.inf
        nearest = int(apart.argmin())
        free[nearest] = False
        worst = max(worst, float(apart[nearest]))
    return worst


class _OneImage(nn.Module):
    """[1, 3, S, S] -> boxes, labels, scores of that image, without the dicts."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = self.detector(image)
        return found["boxes"], found["labels"], found["scores"]


def _to_onnx(arch: str, detector: nn.Module, image: Tensor) -> bytes:
    try:
        # the older exporter says on every call that it is the older one, and tracing warns of each branch
        with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.onnx"
            torch.onnx.export(
                detector,
                (image,),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(OUTPUTS),
                dynamic_axes={name: {0: "N"} for name in OUTPUTS},
            )
            return path.read_bytes()
    except Exception as exc:  # any operator may be one that ONNX does not have
        reason = next(iter(str(exc).splitlines()), "")
        raise BadJob(f"{arch} cannot be exported to ONNX: {type(exc).__name__}: {reason}") from exc


def noise(count: int, side: int) -> Tensor:
    """[count, 3, side, side]: coarse and fine noise, bright and dark."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    fine = torch.rand(count, 3, side, side, generator=generator)
    return 0.7 * smooth + 0.3 * fine


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as exc:
        raise BadSettings(f"{exc}: install what the export needs, pip install 'fedqueue[export]'") from exc
    return onnx, onnxruntime
