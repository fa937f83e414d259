"""The settings of a site's data reach the data set, whatever its format."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.weights import initial_state
from federation.errors import BadDataset, BadSettings
from federation.jobs import JobSpec, TrainingPlan
from federation.settings import Settings
from producers.detection_trainer import DetectionTrainer
from producers.trainer import KnowsImages
from tasks import evaluate

SPEC = JobSpec(id="street", classes=("table", "chair", "lamp"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """YOLO data, and beside them a JSON file: the folder alone could be two things."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("chair\ntable\n")
    (tmp_path / "export.json").write_text("[]")
    for i in range(3):
        Image.new("RGB", (40, 20), (60 * i, 1, 2)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"labels/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.5 0.5\n")
    return tmp_path


def test_a_site_trains_from_any_format(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = Settings(
        site_annotations=folder,
        site_format="yolo",
        site_state=folder / "state",
        site_cache_bytes=3 * 8 * 8,
        site_disk_cache_bytes=10**6,
    )
    trainer = DetectionTrainer.from_settings(settings)
    trainer.prepare(SPEC)
    dataset = trainer._dataset
    assert dataset is not None
    # numbers of the file are 0 chair, 1 table; labels of the job 1 table, 2 chair
    assert [item.labels.tolist() for item in dataset.items] == [[2], [1], [2]]
    assert dataset.items[0].boxes.tolist() == [[10, 5, 30, 15]]
    assert "no boxes of lamp" in caplog.text
    assert isinstance(trainer, KnowsImages)
    assert trainer.image_bytes == sum(path.stat().st_size for path in (folder / "images").iterdir())
    for index in range(3):
        dataset.square(index, 8)
    assert dataset.cache.used_bytes == 3 * 8 * 8
    assert len(list((folder / "state/.decoded").rglob("*.npy"))) == 3


def test_trainers_of_several_jobs_share_the_caches_and_nothing_else(folder: Path) -> None:
    settings = Settings(
        site_annotations=folder,
        site_format="yolo",
        site_state=folder / "state",
        site_cache_bytes=2 * 3 * 8 * 8,
        site_disk_cache_bytes=10**6,
        site_classes=("chair", "table"),
    )
    detection = DetectionTrainer.from_settings(settings)
    assert detection.classes() == {"chair", "table"}
    both, chairs = detection.for_job(SPEC), detection.for_job(SPEC)
    both.prepare(SPEC)
    chairs.prepare(JobSpec(id="chairs", classes=("chair",)))
    assert both._dataset is not None
    assert chairs._dataset is not None
    assert [item.labels.tolist() for item in both._dataset.items] == [[2], [1], [2]]
    assert [item.labels.tolist() for item in chairs._dataset.items] == [[1], [], [1]]
    assert (both.num_images, chairs.num_images, detection.num_images) == (3, 3, 0)
    for index in range(3):
        chairs._dataset.square(index, 8)
    both._dataset.square(2, 8)
    assert both._dataset.cache is chairs._dataset.cache
    assert both._dataset.cache.used_bytes == 2 * 3 * 8 * 8, "one bound for both"
    assert both._dataset.disk is chairs._dataset.disk


def test_nothing_is_written_to_disk_unless_it_is_wanted(folder: Path) -> None:
    settings = Settings(site_annotations=folder, site_format="yolo", site_state=folder / "state")
    trainer = DetectionTrainer.from_settings(settings)
    trainer.prepare(SPEC)
    assert trainer._dataset is not None
    trainer._dataset.square(0, 8)
    assert trainer._dataset.cache.limit_bytes == 512 << 20
    assert not (folder / "state").exists()


def test_an_ambiguous_folder_stops_the_site_before_it_trains(folder: Path) -> None:
    trainer = DetectionTrainer.from_settings(Settings(site_annotations=folder))
    with pytest.raises(BadDataset, match=r"could be several data sets: street .*; yolo"):
        trainer.prepare(SPEC)


def test_a_site_without_data_is_told_the_settings() -> None:
    with pytest.raises(BadSettings, match="FEDQUEUE_SITE_ANNOTATIONS"):
        DetectionTrainer.from_settings(Settings())


def test_the_held_out_set_may_have_any_format_too(folder: Path) -> None:
    dataset = evaluate._load(folder, None, "yolo", SPEC.classes)
    assert dataset.boxes_per_class() == {"table": 1, "chair": 2, "lamp": 0}


@pytest.mark.parametrize("policy", ["fresh", "kept"])
def test_the_optimiser_is_kept_from_update_to_update_if_the_plan_says_so(folder: Path, policy: str) -> None:
    spec = SPEC.model_copy(
        update={
            "plan": TrainingPlan(
                image_size=64, batch_size=1, local_steps=1, optimizer_state=policy, learning_rate=1e-3
            )
        }
    )
    trainer = DetectionTrainer.from_settings(Settings(site_annotations=folder, site_format="yolo"))
    trainer.prepare(spec)
    weights = initial_state(spec)

    def train() -> bytes:
        trained = trainer.train(spec, weights, base_version=0, seed=1, on_progress=lambda progress: None)
        return b"".join(np.ascontiguousarray(array).tobytes() for array in trained.weights.values())

    assert (train() == train()) == (policy == "fresh")
