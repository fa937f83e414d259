"""Average precision of a model on labelled images: by COCO's rules and COCO's own code (pycocotools), and by VOC2010's.

mAP@0.5             COCO: 101 recalls, IoU 0.5, a detection may take the best box that is still free
mAP@[.5:.95]        COCO: the mean over the IoUs 0.50, 0.55 … 0.95
VOC2010 mAP@0.5     detection/voc.py: all recalls, a second detection of an object is false
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detection import voc
from detection.dataset import Dataset
from detection.weights import load_state, module_for
from federation.errors import BadDataset
from federation.jobs import MAP_50, JobSpec
from federation.types import MAP

VOC_MAP = "VOC2010 mAP@0.5"
BATCH = 16


@dataclass(frozen=True, eq=False)
class Found:
    """Detections in one image, best first."""

    boxes: NDArray[np.float32]  # [N, 4] xyxy, pixels of the file
    labels: NDArray[np.int64]  # [N], 1..C
    scores: NDArray[np.float32]  # [N], 0..1


@dataclass(frozen=True)
class Evaluated:
    """`per_class`: by measure, the AP of each class that occurs. `metrics`: the mean of each measure."""

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    num_images: int


def evaluate(
    spec: JobSpec,
    weights: Mapping[str, NDArray[np.generic]],
    dataset: Dataset,
    on_image: Callable[[int], None] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Evaluated:
    """Detect on `device` in every image of `dataset` with the full state `weights` and score the result.

    `on_image` is told how many images are done. Raises BadPayload if the weights are not this architecture's,
    BadDataset if the data set was read for other classes.
    """
    if tuple(dataset.classes) != tuple(spec.classes):
        raise BadDataset(f"the data set was read for classes {dataset.classes}, the job has {spec.classes}")
    module = module_for(spec)
    load_state(module, weights)
    found: list[Found] = []
    for one in detect(module.to(device), dataset, spec.plan.image_size, device):
        found.append(one)
        if on_image is not None:
            on_image(len(found))
    return score(dataset, found)


def detect(
    module: nn.Module, dataset: Dataset, side: int, device: torch.device | str = "cpu"
) -> Iterator[Found]:
    """What `module`, which is on `device`, finds in each image of `dataset`, in order."""
    module.eval()
    for first in range(0, dataset.num_examples, BATCH):
        indices = range(first, min(first + BATCH, dataset.num_examples))
        with torch.inference_mode():
            images = torch.stack([dataset.square(i, side) for i in indices])
            results = module(images.to(device).float().div_(255))
        for index, result in zip(indices, results, strict=True):
            item = dataset.items[index]
            here = {name: value.cpu() for name, value in result.items()}
            yield to_pixels(here, item.width / side, item.height / side)


def to_pixels(result: Mapping[str, torch.Tensor], scale_x: float, scale_y: float) -> Found:
    """One image's detections from the detector's square into the pixels of the file."""
    order = result["scores"].argsort(descending=True, stable=True)
    scale = np.array([scale_x, scale_y] * 2, np.float32)
    return Found(
        boxes=result["boxes"][order].numpy() * scale,
        labels=result["labels"][order].numpy(),
        scores=result["scores"][order].numpy(),
    )


def score(dataset: Dataset, found: list[Found]) -> Evaluated:
    """Average precision of `found`, one entry per image of `dataset` and in its order.

    Classes without ground truth in `dataset` are left out, as COCO does. Raises BadDataset if that leaves none.
    """
    if not dataset.num_boxes:
        raise BadDataset("no image has a box, so there is nothing that detections could be compared with")
    per_class = {**_coco(dataset, found), VOC_MAP: _voc(dataset, found)}
    return Evaluated(
        metrics={name: float(np.mean([*table.values()])) for name, table in per_class.items()},
        per_class=per_class,
        num_images=dataset.num_examples,
    )


def _present(dataset: Dataset) -> dict[str, int]:
    """The classes that occur, with their labels."""
    counts = dataset.boxes_per_class()
    return {name: label for label, name in enumerate(dataset.classes, start=1) if counts[name]}


def _voc(dataset: Dataset, found: list[Found]) -> dict[str, float]:
    return {
        name: voc.average_precision(
            [item.boxes[item.labels == label] for item in dataset.items],
            [one.boxes[one.labels == label] for one in found],
            [one.scores[one.labels == label] for one in found],
        )
        for name, label in _present(dataset).items()
    }


def _coco(dataset: Dataset, found: list[Found]) -> dict[str, dict[str, float]]:
    present = _present(dataset)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = _ground_truth(dataset)
        truth.createIndex()
        rows = _rows(found)
        if not len(rows):
            return {MAP_50: dict.fromkeys(present, 0.0), MAP: dict.fromkeys(present, 0.0)}
        run = COCOeval(truth, truth.loadRes(rows), "bbox")
        run.evaluate()
        run.accumulate()
    # [10 thresholds, 101 recalls, K classes, areas, detections]; the first area is "all", the last count 100
    precision = run.eval["precision"][:, :, :, 0, -1]
    labels = {label: k for k, label in enumerate(run.params.catIds)}
    tables = {name: precision[:, :, labels[label]] for name, label in present.items()}
    return {
        MAP_50: {name: float(table[0].mean()) for name, table in tables.items()},
        MAP: {name: float(table.mean()) for name, table in tables.items()},
    }


def _ground_truth(dataset: Dataset) -> dict[str, list[dict[str, object]]]:
    annotations: list[dict[str, object]] = []
    for image_id, item in enumerate(dataset.items, start=1):
        for box, label in zip(item.boxes.tolist(), item.labels.tolist(), strict=True):
            x0, y0, x1, y1 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    return {
        "info": [],
        "images": [
            {"id": i, "width": it.width, "height": it.height} for i, it in enumerate(dataset.items, 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(dataset.classes, start=1)],
        "annotations": annotations,
    }


def _rows(found: list[Found]) -> NDArray[np.float64]:
    """[M, 7]: image id, x, y, width, height, score, class."""
    tables = [np.zeros((0, 7))]
    for image_id, one in enumerate(found, start=1):
        table = np.empty((len(one.scores), 7))
        table[:, 0] = image_id
        table[:, 1:3] = one.boxes[:, :2]
        table[:, 3:5] = one.boxes[:, 2:] - one.boxes[:, :2]
        table[:, 5] = one.scores
        table[:, 6] = one.labels
        tables.append(table)
    return np.concatenate(tables)
