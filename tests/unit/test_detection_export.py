"""ONNX files do in onnxruntime what the detector does in torch, or are not written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from cli.main import app
from detection.export import TOLERANCE, difference, export_onnx, noise
from detection.registry import DEFAULT_ARCH
from detection.threads import use_threads
from detection.weights import Arrays, load_state, module_for, state
from federation import plugins
from federation.errors import BadJob, BadSettings
from federation.jobs import Job, JobSpec, ModelRef, TrainingPlan
from federation.types import Head, ModelVersion
from storage.folder import FolderStore
from storage.jobs import save_job
from storage.log import VersionLog
from storage.models import save_model
from storage.tensors import from_arrays

ROOT = Path(__file__).resolve().parents[2]
SIDE = 64
CLASSES = ("cart", "chair", "Tür")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    use_threads(1)


def spec(arch: str = DEFAULT_ARCH) -> JobSpec:
    return JobSpec(id="street", classes=CLASSES, arch=arch, plan=TrainingPlan(image_size=SIDE))


def lively(job: JobSpec) -> Arrays:
    """Weights whose detections differ from image to image: statistics from images, then a few steps of training."""
    module = module_for(job).train()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5
    images = noise(2, SIDE)
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 40, 40]]) + i, "labels": torch.tensor([1 + i % 3])} for i in range(2)
    ]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        torch.stack(list(module(images, targets).values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return state(module)


@pytest.mark.parametrize(
    "arch", [DEFAULT_ARCH, "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]
)
def test_an_exported_detector_finds_the_same(arch: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = lively(spec(arch))
    exported = export_onnx(spec(arch), weights, {"job": "street", "version": "3", "sha256": "abc"})
    assert exported.detections > 0
    assert exported.difference <= TOLERANCE
    model = onnx.load_from_string(exported.data)
    onnx.checker.check_model(model)
    (image,) = model.graph.input
    assert image.name == "image"
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [1, 3, SIDE, SIDE]
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["job"] == "street"
    assert properties["version"] == "3"
    assert properties["sha256"] == "abc"
    assert json.loads(properties["classes"]) == list(CLASSES)
    assert properties["image_size"] == str(SIDE)
    # once more by hand, on an image that the export did not see
    session = onnxruntime.InferenceSession(exported.data, providers=["CPUExecutionProvider"])
    module = module_for(spec(arch)).eval()
    load_state(module, weights)
    picture = noise(5, SIDE)[4:] ** 2
    with torch.inference_mode():
        (found,) = module(picture)
    boxes, labels, scores = session.run(["boxes", "labels", "scores"], {"image": picture.numpy()})
    assert len(scores) == len(found["scores"]) > 0
    mine = tuple(found[name].numpy() for name in ("boxes", "labels", "scores"))
    assert difference((mine[0] / SIDE, mine[1], mine[2]), (boxes / SIDE, labels, scores)) <= TOLERANCE
    assert boxes.dtype == scores.dtype == np.float32
    assert labels.dtype == np.int64


def found(*scores: float, label: int = 1, shift: float = 0.0) -> Any:
    count = len(scores)
    boxes = np.array([[0.1 * i + shift, 0.1, 0.1 * i + 0.3, 0.4] for i in range(count)], np.float32).reshape(
        -1, 4
    )
    return boxes, np.full(count, label), np.array(scores, np.float32)


def test_difference_of_detections() -> None:
    assert difference(found(0.9, 0.5), found(0.9, 0.5)) == 0
    assert difference(found(0.9, 0.5), found(0.9, 0.4)) == pytest.approx(0.1)
    assert difference(found(0.9, 0.5), found(0.9, 0.5, shift=0.02)) == pytest.approx(0.02)
    assert difference(found(0.9), found(0.9, 0.5)) == np.inf
    assert difference(found(0.9), found(0.9, label=2)) == np.inf
    assert difference(found(), found()) == 0
    boxes, labels, scores = found(0.5, 0.5)
    assert difference((boxes, labels, scores), (boxes[::-1], labels, scores)) == 0, (
        "equal scores have no order"
    )
    same = (np.repeat(boxes[:1], 2, 0), labels, scores)
    assert difference(same, (boxes, labels, scores)) == pytest.approx(0.1), "each counts once"


class Unfaithful(nn.Module):
    """Finds one box, and another one while it is exported; or cannot be exported at all."""

    def __init__(self, num_classes: int, image_size: int, hopeless: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.hopeless = hopeless

    def forward(self, images: torch.Tensor, targets: Any = None) -> Any:
        if self.hopeless:
            images = torch.linalg.matrix_exp(images)
        score = self.weight * images.mean() * (0.5 if torch.onnx.is_in_onnx_export() else 1)
        return [{"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.int64), "scores": score}]


def hopeless(num_classes: int, image_size: int) -> nn.Module:
    return Unfaithful(num_classes, image_size, hopeless=True)


@pytest.fixture
def company() -> Iterator[str]:
    module = __name__
    plugins.allow([f"{module}:Unfaithful", f"{module}:hopeless"])
    yield module
    plugins.allow(())


def test_a_file_that_does_something_else_is_not_written(company: str) -> None:
    weights: Arrays = {"weight": np.ones(1, np.float32)}
    with pytest.raises(BadJob, match=f"{company}:Unfaithful was exported, but .* differs"):
        export_onnx(spec(f"{company}:Unfaithful"), weights, {})
    with pytest.raises(BadJob, match=f"{company}:hopeless cannot be exported to ONNX"):
        export_onnx(spec(f"{company}:hopeless"), weights, {})


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BadSettings, match=r"fedqueue\[export\]"):
        export_onnx(spec(), {}, {})


def store_version(folder: Path, weights: Arrays) -> ModelRef:
    """Version 0 of job street."""
    store = FolderStore(folder)
    ref = save_model(store, "street", from_arrays(weights))
    save_job(store, Job(spec=spec(), initial=ref, max_update_bytes=1 << 21, created_at=datetime.now(UTC)))
    VersionLog(store, "street").create(Head(current=ModelVersion(version=0, model=ref)))
    return ref


def test_a_comparison_of_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = lively(spec())
    weights["head.classification_head.cls_logits.bias"][:] = -100
    weights["head.classification_head.cls_logits.weight"][:] = 0
    store_version(tmp_path / "store", weights)
    command = ["model", "export", "--job", "street", "--store-url", f"file:{tmp_path / 'store'}", "--onnx"]
    result = CliRunner().invoke(app, [*command, "street.onnx"])
    assert result.exit_code == 0, result.output
    assert "the same 0 detections" in result.output
    assert "finds nothing" in result.output


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ref = store_version(tmp_path / "store", lively(spec()))
    command = ["model", "export", "--job", "street", "--store-url", f"file:{tmp_path / 'store'}", "--onnx"]
    result = CliRunner().invoke(app, [*command, "out/street.onnx"])
    assert result.exit_code == 0, result.output
    assert "version 0" in result.output
    assert "finds nothing" not in result.output
    properties = {p.key: p.value for p in onnx.load(tmp_path / "out" / "street.onnx").metadata_props}
    assert (properties["job"], properties["version"], properties["sha256"]) == ("street", "0", ref.sha256)
    # the program of docs/export.md, with every score shown
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    Image.effect_noise((120, 90), 80).convert("RGB").save("frame.jpg")
    (tmp_path / "out" / "street.onnx").rename("street.onnx")
    shown = subprocess.run(
        [sys.executable, "-c", code.replace("0.35", "0.0")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.splitlines()
    assert shown
    assert all(re.match(rf"({'|'.join(CLASSES)}) 0\.\d\d \[", line) for line in shown)
    for wrong, error in (("newest", "latest"), ("7", "7"), ("best", "measured")):
        result = CliRunner().invoke(app, [*command, "other.onnx", "--version", wrong])
        assert result.exit_code == 1
        assert error in result.output
    assert not (tmp_path / "other.onnx").exists()
