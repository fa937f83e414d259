"""Average precision, prediction and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.dataset import Dataset, load_dataset
from detection.draw import colour_of, contact_sheet, draw, plot_map
from detection.evaluate import VOC_MAP, Found, evaluate, score
from detection.predict import predict
from detection.presets import GENERATED, STREET, Preset
from detection.weights import initial_state
from federation.errors import BadDataset
from federation.jobs import MAP_50, JobSpec, TrainingPlan
from federation.types import MAP

CLASSES = ("cart", "chair", "table")
JOB = JobSpec(id="test", classes=CLASSES, plan=TrainingPlan(image_size=64))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three images; no table anywhere; the third image is empty."""
    folder = tmp_path_factory.mktemp("scored")
    for i in range(3):
        Image.new("RGB", (120, 90), (60, 90, 60 * i)).save(folder / f"{i}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 90} for i in range(3)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 0, "bbox": [10, 10, 30, 20]},
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [60, 40, 20, 40]},
            {"id": 2, "image_id": 1, "category_id": 0, "bbox": [5.5, 7.25, 50, 60]},
            {"id": 3, "image_id": 1, "category_id": 1, "bbox": [70, 10, 40, 20]},
        ],
    }
    (folder / "test.json").write_text(json.dumps(coco))
    return load_dataset(folder / "test.json", folder, CLASSES)


def nothing() -> Found:
    return Found(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


def truth(dataset: Dataset) -> list[Found]:
    return [
        Found(item.boxes, item.labels, np.linspace(0.9, 0.8, len(item.labels), dtype=np.float32))
        for item in dataset.items
    ]


def test_perfect_detections_reach_one(dataset: Dataset) -> None:
    result = score(dataset, truth(dataset))
    assert result.metrics == {MAP_50: 1.0, MAP: 1.0, VOC_MAP: 1.0}
    assert result.per_class == {name: {"cart": 1.0, "chair": 1.0} for name in result.metrics}
    assert result.num_images == 3


def test_no_detections_are_zero(dataset: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    result = score(dataset, [nothing()] * 3)
    assert result.metrics == {MAP_50: 0.0, MAP: 0.0, VOC_MAP: 0.0}
    assert result.per_class == {name: {"cart": 0.0, "chair": 0.0} for name in result.metrics}
    score(dataset, truth(dataset))
    assert capfd.readouterr().out == ""


def test_one_class_missed_halves_the_mean(dataset: Dataset) -> None:
    found = []
    for one in truth(dataset):
        keep = one.labels == 1
        found.append(Found(one.boxes[keep], one.labels[keep], one.scores[keep]))
    result = score(dataset, found)
    assert result.metrics == {MAP_50: 0.5, MAP: 0.5, VOC_MAP: 0.5}
    assert result.per_class == {name: {"cart": 1.0, "chair": 0.0} for name in result.metrics}


def test_the_wrong_label_and_the_wrong_place_are_no_hits(dataset: Dataset) -> None:
    swapped = [Found(o.boxes, 3 - o.labels, o.scores) for o in truth(dataset)]
    assert score(dataset, swapped).metrics[MAP_50] == 0.0
    moved = [Found(o.boxes + np.float32(25), o.labels, o.scores) for o in truth(dataset)]
    assert score(dataset, moved).metrics[MAP_50] == 0.0


def test_iou_thresholds(dataset: Dataset) -> None:
    """A box of 84 % of the width has IoU 0.84: a hit at .5 to .8, a miss at .85 and above."""
    narrow = []
    for one in truth(dataset):
        boxes = one.boxes.copy()
        boxes[:, 2] = boxes[:, 0] + np.float32(0.84) * (boxes[:, 2] - boxes[:, 0])
        narrow.append(Found(boxes, one.labels, one.scores))
    result = score(dataset, narrow)
    assert result.metrics == {MAP_50: 1.0, MAP: pytest.approx(0.7), VOC_MAP: 1.0}


def test_false_alarms_above_the_truth_cost_precision(dataset: Dataset) -> None:
    """COCO interpolates at 101 recalls: hit at rank 2 of 3 and 3 of 3 gives 2/3 everywhere."""
    one, other, _ = truth(dataset)
    false_alarm = Found(np.array([[0, 70, 10, 80]], np.float32), np.array([1]), np.array([0.99], np.float32))
    carts = [Found(o.boxes[:1], o.labels[:1], o.scores[:1]) for o in (one, other)]
    result = score(dataset, [*carts, false_alarm])
    assert {name: table["cart"] for name, table in result.per_class.items()} == {
        MAP_50: pytest.approx(2 / 3),
        MAP: pytest.approx(2 / 3),
        VOC_MAP: pytest.approx(2 / 3),
    }


def test_coco_gives_a_second_detection_another_box_and_voc_does_not(dataset: Dataset) -> None:
    """Two overlapping carts; both detections lie nearest to the first."""
    item = replace(
        dataset.items[0],
        boxes=np.array([[0, 0, 10, 10], [2, 0, 12, 10]], np.float32),
        labels=np.array([1, 1]),
    )
    pair = replace(dataset, items=(item,))
    boxes = np.array([[0, 0, 10, 10], [0.5, 0, 10.5, 10]], np.float32)
    result = score(pair, [Found(boxes, np.array([1, 1]), np.array([0.9, 0.8], np.float32))])
    assert result.metrics[MAP_50] == 1.0
    assert result.metrics[VOC_MAP] == 0.5


def test_without_any_box_there_is_nothing_to_score(dataset: Dataset) -> None:
    with pytest.raises(BadDataset, match="no image has a box"):
        score(replace(dataset, items=dataset.items[2:]), [nothing()])


def test_evaluate_reports_progress_and_handles_an_untrained_model(dataset: Dataset) -> None:
    done: list[int] = []
    result = evaluate(JOB, initial_state(JOB), dataset, done.append)
    assert done == [1, 2, 3]
    assert 0 <= result.metrics[MAP_50] < 0.2
    assert result.per_class.keys() == {MAP_50, MAP, VOC_MAP}
    assert all(table.keys() == {"cart", "chair"} for table in result.per_class.values())


def test_predict_gives_boxes_in_pixels_of_the_file(dataset: Dataset) -> None:
    weights = initial_state(JOB)
    weights["head.classification_head.cls_logits.bias"][2] = 4.0  # sees chairs everywhere
    weights["head.regression_head.bbox_ctrness.bias"][:] = 4.0
    paths = [item.path for item in dataset.items]
    found = predict(JOB, weights, paths, score_threshold=0.5)
    assert len(found) == 3
    for one in found:
        assert len(one.scores) > 0
        assert (one.scores[:-1] >= one.scores[1:]).all()
        assert one.scores.min() >= 0.5
        assert set(one.labels.tolist()) == {2}
        assert one.boxes.max(axis=0)[2] > 64, "scaled beyond the detector's own 64 pixels"
        assert (one.boxes <= np.array([120, 90, 120, 90]) + 1e-3).all()
    assert all(len(one.scores) == 0 for one in predict(JOB, weights, paths, score_threshold=1.0))
    assert predict(JOB, weights, []) == []


def test_predict_names_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"nothing\.jpg"):
        predict(JOB, initial_state(JOB), [tmp_path / "nothing.jpg"])


def test_draw_marks_the_box_in_the_colour_of_its_class(dataset: Dataset) -> None:
    found = truth(dataset)[0]
    with Image.open(dataset.items[0].path) as image:
        plain = draw(image, nothing(), CLASSES, width=240)
        drawn = draw(image, found, CLASSES, dataset.items[0].boxes, width=240)
        many = Found(np.tile(found.boxes[:1], (500, 1)), np.ones(500, np.int64), np.ones(500, np.float32))
        draw(image, many, CLASSES)
    assert drawn.size == plain.size == (240, 180)
    # the chair's right edge: x = 80, y = 60 in the file, twice that in the drawing
    assert "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((160, 120))) == colour_of(2)
    assert drawn.getpixel((100, 170)) == plain.getpixel((100, 170)), "nothing there, nothing drawn"


def test_contact_sheet_and_plot_are_written(dataset: Dataset, tmp_path: Path) -> None:
    sheet, plot = tmp_path / "sheet.png", tmp_path / "map.png"
    contact_sheet(dataset.items, truth(dataset), CLASSES, sheet, title="Three frames", columns=2)
    with Image.open(sheet) as image:
        assert image.width > 2 * 480
        assert image.height > 2 * 360
    plot_map([(60.0, 0.2), (120.0, 0.5)], {"a": 0.3, "b": 0.1}, plot)
    with Image.open(plot) as image:
        assert image.size == (1350, 750)
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 50
    plot_map([], {}, plot)


@pytest.mark.parametrize("preset", [STREET, GENERATED])
def test_presets_make_valid_jobs(preset: Preset) -> None:
    job = JobSpec(id="p", classes=CLASSES, plan=preset.plan, aggregation=preset.aggregation, stop=preset.stop)
    assert JobSpec.from_json(job.to_json()) == job


def test_presets_need_no_torch() -> None:
    code = "import sys, detection.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
