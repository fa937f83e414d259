"""A model that works passes the smoke test; one that overflows, does not fit or breaks the convention does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detection.registry import DEFAULT_ARCH
from detection.smoke import smoke_test
from detection.weights import Arrays, initial_state, state
from federation import plugins
from federation.errors import BadJob, BadPayload
from federation.jobs import JobSpec, TrainingPlan
from producers.deployed import MODEL
from producers.postcheck import CheckFailed, check_model
from tests.factories import job_spec, payload_of, toy_arrays

SPEC = JobSpec(id="street", classes=("car", "dog"), plan=TrainingPlan(image_size=64))


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return initial_state(SPEC)


def test_a_detector_finds_what_it_finds_in_noise(weights: Arrays) -> None:
    assert SPEC.arch == DEFAULT_ARCH
    assert smoke_test(SPEC, weights) >= 0


def test_numbers_that_overflow_inside_are_seen_though_the_detector_would_only_find_nothing(
    weights: Arrays,
) -> None:
    large = {name: array * np.float32(1e18) if array.ndim == 4 else array for name, array in weights.items()}
    assert all(np.isfinite(array).all() for array in large.values())
    with pytest.raises(BadPayload, match=r"layer .* into NaN or infinity"):
        smoke_test(SPEC, large)


def test_weights_that_do_not_fit_are_named(weights: Arrays) -> None:
    missing = dict(weights)
    name, _ = missing.popitem()
    with pytest.raises(BadPayload, match=name):
        smoke_test(SPEC, missing)


class Strange(nn.Module):
    """Keeps the convention only if it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Conv2d(3, 1, 1)

    def forward(self, images: Tensor) -> object:
        boxes = torch.zeros(1, 4) + (float("nan") if self.kind == "nan" else 0)
        found = [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "scores": torch.ones(1)}]
        if self.kind == "raises":
            raise KeyError("feature")
        return found[0] if self.kind == "no list" else found


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("nan", BadPayload, "boxes that are not finite"),
        ("no list", BadJob, "one dict per image"),
        ("raises", BadPayload, "KeyError"),
    ],
)
def test_an_architecture_of_ones_own_is_run_too(
    monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(plugins, "find", lambda group, name: lambda classes, side: Strange(kind))
    spec = SPEC.model_copy(update={"arch": "strange"})
    with pytest.raises(error, match=words):
        smoke_test(spec, state(Strange(kind)))


def test_the_check_of_a_deployed_file(tmp_path: Path, weights: Arrays) -> None:
    (tmp_path / MODEL).write_bytes(payload_of(dict(weights)))
    assert "detections, all finite" in check_model(tmp_path, SPEC)
    with pytest.raises(CheckFailed, match=r"not part of this architecture|is missing"):
        check_model(tmp_path, SPEC.model_copy(update={"arch": "ssdlite320_mobilenet_v3_large"}))
    (tmp_path / MODEL).write_bytes((tmp_path / MODEL).read_bytes()[:-1])
    with pytest.raises(CheckFailed, match="data"):
        check_model(tmp_path, SPEC)


def test_what_is_not_known_here_is_not_run_and_its_numbers_are_judged(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(payload_of(toy_arrays(1.0)))
    assert "toy is not known here" in check_model(tmp_path, job_spec())
