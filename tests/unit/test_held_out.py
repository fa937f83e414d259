"""A site's validation images: never trained on, and the same ones whatever else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from detection.dataset import Dataset, load_dataset
from detection.held_out import hold_out, require_apart
from detection.weights import initial_state
from federation.errors import BadDataset, BadSettings
from federation.jobs import JobSpec, TrainingPlan
from federation.settings import Settings
from producers.detection_trainer import DetectionTrainer
from producers.evaluation import Evaluator
from producers.validation import Validation

CLASSES = ("cart", "chair")
JOB = JobSpec(id="test", classes=CLASSES, plan=TrainingPlan(image_size=64))


def write(folder: Path, colours: range, boxes: bool = True, prefix: str = "") -> Path:
    """A data set of one image per colour, each with one box."""
    folder.mkdir(exist_ok=True)
    names = {i: f"{prefix}{i}.png" for i in colours}
    for i, name in names.items():
        Image.new("RGB", (96, 64), (i * 3 % 256, i * 7 % 256, i)).save(folder / name)
    coco = {
        "images": [{"id": i, "file_name": name, "width": 96, "height": 64} for i, name in names.items()],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i % 2, "bbox": [5, 5, 30, 20]}
            for i in (colours if boxes else colours[:1])
        ],
    }
    path = folder / f"{prefix}coco.json"
    path.write_text(json.dumps(coco))
    return path


def read(annotations: Path) -> Dataset:
    return load_dataset(annotations, annotations.parent, CLASSES)


def names(dataset: Dataset | None) -> set[str]:
    return set() if dataset is None else {item.path.name for item in dataset.items}


def test_both_parts_together_are_the_whole_and_share_nothing(tmp_path: Path) -> None:
    whole = read(write(tmp_path / "a", range(60)))
    training, validation = hold_out(whole, 0.3)
    assert validation is not None
    assert names(training) | names(validation) == names(whole)
    assert not names(training) & names(validation)
    assert 9 <= validation.num_examples <= 27  # about 18
    assert training.image_bytes + validation.image_bytes == whole.image_bytes
    index = next(i for i, item in enumerate(validation.items) if item.path != whole.items[i].path)
    whole.square(index, 32)
    assert not validation.square(index, 32).equal(whole.square(index, 32)), "each part decodes its own images"
    require_apart(training, validation)


def test_an_image_stays_on_its_side_when_others_come_and_files_are_renamed(tmp_path: Path) -> None:
    few = hold_out(read(write(tmp_path / "a", range(30))), 0.3)[1]
    more = hold_out(read(write(tmp_path / "b", range(60))), 0.3)[1]
    renamed = hold_out(read(write(tmp_path / "c", range(30), prefix="x")), 0.3)[1]
    assert names(few) == {name for name in names(more) if int(name.removesuffix(".png")) < 30}
    assert {f"x{name}" for name in names(few)} == names(renamed)


def test_too_little_to_measure_with_and_too_little_to_train_on(tmp_path: Path) -> None:
    one = read(write(tmp_path / "a", range(1)))
    training, validation = hold_out(one, 1e-9)
    assert (training.num_examples, validation) == (1, None)
    with pytest.raises(BadDataset, match="lower site_eval_fraction"):
        hold_out(one, 0.999999)


def test_an_image_in_both_sets_is_named(tmp_path: Path) -> None:
    training = read(write(tmp_path / "a", range(3)))
    require_apart(training, read(write(tmp_path / "b", range(3, 6))))
    write(tmp_path / "c", range(6, 9))
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "c" / "7.png")  # under another name
    with pytest.raises(BadDataset, match=r"1 images are trained on and validated with: .*7\.png"):
        require_apart(training, read(tmp_path / "c" / "coco.json"))


def test_the_trainer_measures_what_it_does_not_train_on(tmp_path: Path) -> None:
    annotations = write(tmp_path / "a", range(24))
    settings = Settings(site_annotations=annotations, site_images=annotations.parent, site_eval_fraction=0.3)
    trainer = DetectionTrainer.from_settings(settings)
    assert isinstance(trainer, Evaluator)
    assert trainer.num_validation_images == 0, "before prepare()"
    trainer.prepare(JOB)
    assert trainer._dataset is not None
    assert trainer._dataset.num_examples + trainer.num_validation_images == 24
    done: list[int] = []
    result = trainer.evaluate(JOB, initial_state(JOB), done.append)
    assert done == list(range(1, trainer.num_validation_images + 1))
    assert result.num_images == trainer.num_validation_images > 0
    assert result.metrics.keys() == {"mAP@0.5", "mAP@[.5:.95]", "VOC2010 mAP@0.5"} == result.per_class.keys()


def test_files_of_their_own(tmp_path: Path) -> None:
    training = read(write(tmp_path / "a", range(5)))
    other = write(tmp_path / "b", range(5, 8))
    same, validation = Validation(other, other.parent).apart(training, CLASSES)
    assert same is training
    assert names(validation) == {"5.png", "6.png", "7.png"}
    assert Validation().apart(training, CLASSES) == (training, None)


@pytest.mark.parametrize("own_files", [False, True])
def test_training_and_validation_images_share_the_bound_on_memory(tmp_path: Path, own_files: bool) -> None:
    one = 3 * 32 * 32
    settings = Settings(
        site_annotations=write(tmp_path / "a", range(30)),
        site_eval_annotations=write(tmp_path / "b", range(30, 60)) if own_files else None,
        site_eval_fraction=0 if own_files else 0.5,
        site_cache_bytes=4 * one,
    )
    trainer = DetectionTrainer.from_settings(settings)
    trainer.prepare(JOB)
    parts = [trainer._dataset, trainer._validation]
    kept = 0
    for part in parts:
        assert part is not None
        assert part.num_examples > 4
        for index in range(part.num_examples):
            part.square(index, 32)
        kept += sum(part.square(index, 32) is part.square(index, 32) for index in range(part.num_examples))
    assert kept == 4


def test_settings_that_contradict_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQUEUE_SITE_EVAL_IMAGES", "x")
    with pytest.raises(BadSettings, match="site_eval_annotations"):
        Settings.load()
    monkeypatch.setenv("FEDQUEUE_SITE_EVAL_ANNOTATIONS", "x")
    assert Settings.load().site_eval_images == Path("x")
    monkeypatch.setenv("FEDQUEUE_SITE_EVAL_FRACTION", "0.1")
    with pytest.raises(BadSettings, match="not both"):
        Settings.load()
