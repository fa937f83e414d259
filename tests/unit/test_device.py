"""The setting `device` beyond training: evaluation at the server and at sites, and predict.

Torch's `meta` stands for a GPU here: a tensor that was left behind on the CPU is noticed there as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from broker.sqlite import SqliteBroker
from detection.dataset import Dataset, load_dataset
from detection.evaluate import evaluate
from detection.predict import Detector
from detection.weights import initial_state
from federation.errors import BadSettings
from federation.jobs import EvaluationPolicy, JobSpec, TrainingPlan
from federation.settings import Settings
from producers.detection_trainer import DetectionTrainer
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.context import Context
from tasks.evaluate import evaluate as evaluate_centrally
from tasks.jobs import create

SPEC = JobSpec(
    id="toy", classes=("a",), plan=TrainingPlan(image_size=64), evaluation=EvaluationPolicy(every=1)
)


class FarAway(nn.Module):
    """Finds nothing, on the device that it was moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        assert self.weight.is_meta
        assert images.is_meta
        self.batches.append(len(images))
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        return [{**empty, "scores": torch.zeros(0)} for _ in images]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    images = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8 + i} for i in range(6)]
    for image in images:
        Image.new("RGB", (8, 8 + int(str(image["id"])))).save(tmp_path / str(image["file_name"]))
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(6)]
    coco = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco))
    return path


@pytest.fixture
def dataset(annotations: Path) -> Dataset:
    return load_dataset(annotations, annotations.parent, SPEC.classes)


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> FarAway:
    """cuda:1 is there, and every model is this one."""
    module = FarAway()
    monkeypatch.setattr("detection.evaluate.module_for", lambda spec: module)
    monkeypatch.setattr("detection.evaluate.load_state", lambda module, weights: None)
    for where in ("detection.threads", "producers.detection_trainer"):
        monkeypatch.setattr(f"{where}.pick_device", {"cuda:1": "meta"}.__getitem__)
    return module


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def server(tmp_path: Path, **settings: Any) -> Context:
    """With job `toy` at version 0."""
    broker = SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20)
    context = Context(Settings(**settings), MemoryStore(), broker, lambda name, arguments: None)
    model = save_model(context.store, SPEC.id, from_arrays(initial_state(SPEC)))
    create(context, SPEC, model, model)
    return context


def test_model_and_images_go_to_the_device(dataset: Dataset, far_away: FarAway) -> None:
    assert evaluate(SPEC, {}, dataset, device="meta").num_images == sum(far_away.batches) == 6


def test_the_server_measures_on_its_device(annotations: Path, far_away: FarAway, tmp_path: Path) -> None:
    context = server(tmp_path, device="cuda:1", eval_annotations=annotations, eval_images=annotations.parent)
    evaluation = evaluate_centrally(context, SPEC.id, 0)
    context.broker.close()
    assert evaluation is not None
    assert evaluation.num_images == sum(far_away.batches) == 6


@pytest.mark.usefixtures("no_gpu")
def test_a_server_without_the_device_says_so(annotations: Path, tmp_path: Path) -> None:
    context = server(tmp_path, device="cuda", eval_annotations=annotations)
    with pytest.raises(BadSettings, match="torch finds no CUDA here"):
        evaluate_centrally(context, SPEC.id, 0)
    context.broker.close()


def test_a_site_measures_where_it_trains(annotations: Path, far_away: FarAway) -> None:
    trainer = DetectionTrainer.from_settings(Settings(device="cuda:1", site_annotations=annotations))
    trainer._validation = load_dataset(annotations, annotations.parent, SPEC.classes)
    assert trainer.evaluate(SPEC, {}, lambda done: None).num_images == sum(far_away.batches) == 6


@pytest.mark.usefixtures("no_gpu")
def test_predict_takes_the_same_names_and_says_the_same() -> None:
    weights = initial_state(SPEC)
    assert {Detector(SPEC, weights, name).device.type for name in ("auto", "cpu")} == {"cpu"}
    with pytest.raises(BadSettings, match="torch finds no CUDA here"):
        Detector(SPEC, weights, "cuda:1")
