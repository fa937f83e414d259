"""Reading COCO files: what is accepted, and that every defect is found and named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.cache import MemoryCache
from detection.dataset import Dataset, load_dataset, read_square
from federation.errors import BadDataset

CLASSES = ("chair", "table")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for i in (1, 2):
        Image.new("RGB", (80, 60), (40 * i, 90, 120)).save(images / f"{i}.jpg")
    return tmp_path


def document() -> dict[str, Any]:
    """Two images; categories numbered unlike the job's labels, as every tool does in its own way."""
    return {
        "images": [
            {"id": 1, "file_name": "1.jpg", "width": 80, "height": 60},
            {"id": 2, "file_name": "2.jpg", "width": 80, "height": 60},
        ],
        "annotations": [
            {"id": 10, "image_id": 1, "category_id": 5, "bbox": [10, 10, 20, 30]},
            {"id": 11, "image_id": 1, "category_id": 0, "bbox": [0.5, 2, 8, 8.25]},
        ],
        "categories": [{"id": 0, "name": "table"}, {"id": 5, "name": "chair"}],
    }


def load(folder: Path, coco: dict[str, Any], classes: tuple[str, ...] = CLASSES, **options: int) -> Dataset:
    file = folder / "site.json"
    file.write_text(json.dumps(coco))
    return load_dataset(file, folder / "images", classes, **options)


def test_reads_boxes_and_labels_by_class_name(folder: Path) -> None:
    dataset = load(folder, document())
    first, second = dataset.items
    np.testing.assert_array_equal(first.boxes, np.array([[10, 10, 30, 40], [0.5, 2, 8.5, 10.25]], np.float32))
    assert first.labels.tolist() == [1, 2]
    assert first.boxes.dtype == np.float32
    assert first.labels.dtype == np.int64
    assert second.boxes.shape == (0, 4)
    assert (first.width, first.height) == (80, 60)
    assert dataset.num_examples == 2
    assert dataset.num_boxes == 2
    assert dataset.image_bytes == sum(f.stat().st_size for f in (folder / "images").iterdir())


def test_label_follows_the_order_of_the_job_not_of_the_file(folder: Path) -> None:
    assert load(folder, document(), ("table", "chair")).items[0].labels.tolist() == [2, 1]
    assert load(folder, document(), ("table", "chair", "cart")).boxes_per_class() == {
        "table": 1,
        "chair": 1,
        "cart": 0,
    }


def test_rounding_of_one_pixel_is_clipped(folder: Path) -> None:
    coco = document()
    coco["annotations"] = [{"id": 1, "image_id": 2, "category_id": 5, "bbox": [-1, -0.5, 82, 61]}]
    assert load(folder, coco).items[1].boxes.tolist() == [[0, 0, 80, 60]]


def edit(key: str, index: int, **fields: Any) -> Callable[[dict[str, Any], Path], None]:
    def change(coco: dict[str, Any], folder: Path) -> None:
        coco[key][index].update(fields)

    return change


def remove_image(coco: dict[str, Any], folder: Path) -> None:
    (folder / "images/2.jpg").unlink()


def truncate_image(coco: dict[str, Any], folder: Path) -> None:
    file = folder / "images/2.jpg"
    file.write_bytes(file.read_bytes()[:-200])


def not_an_image(coco: dict[str, Any], folder: Path) -> None:
    (folder / "images/2.jpg").write_text("hello")


def no_images(coco: dict[str, Any], folder: Path) -> None:
    coco["images"], coco["annotations"] = [], []


def no_boxes(coco: dict[str, Any], folder: Path) -> None:
    coco["annotations"] = []


DEFECTS: dict[str, tuple[Callable[[dict[str, Any], Path], None], tuple[str, ...]]] = {
    "missing image": (remove_image, ("image 2", "2.jpg", "no such file")),
    "truncated image": (truncate_image, ("image 2", "2.jpg", "cannot be read as an image")),
    "not an image": (not_an_image, ("image 2", "2.jpg", "cannot be read as an image")),
    "other size": (edit("images", 1, width=81), ("image 2", "2.jpg", "80x60", "81x60")),
    "size no number": (edit("images", 1, width="80"), ("image 2", "width")),
    "path out of the folder": (edit("images", 1, file_name="../2.jpg"), ("image 2", "../2.jpg")),
    "absolute path": (edit("images", 1, file_name="/2.jpg"), ("image 2", "inside the image folder")),
    "outside on the right": (
        edit("annotations", 0, bbox=[70, 0, 12, 5]),
        ("annotation 10", "1.jpg", "outside"),
    ),
    "outside above": (edit("annotations", 0, bbox=[0, -2, 12, 5]), ("annotation 10", "outside")),
    "wholly in the rounding": (edit("annotations", 0, bbox=[80, 0, 1, 5]), ("annotation 10", "no area")),
    "no area": (edit("annotations", 1, bbox=[5, 5, 0, 5]), ("annotation 11", "no area")),
    "negative height": (edit("annotations", 1, bbox=[5, 5, 5, -5]), ("annotation 11", "no area")),
    "three numbers": (edit("annotations", 1, bbox=[5, 5, 5]), ("annotation 11", "four finite numbers")),
    "not finite": (edit("annotations", 1, bbox=[5, 5, 5, float("nan")]), ("annotation 11", "four finite")),
    "no box": (edit("annotations", 1, bbox=None), ("annotation 11", "four finite numbers")),
    "unknown class": (edit("categories", 0, name="sofa"), ("annotation 11", "1.jpg", "'sofa'")),
    "unknown category": (edit("annotations", 1, category_id=9), ("annotation 11", "category_id 9")),
    "unknown image": (edit("annotations", 1, image_id=9), ("annotation 11", "image_id 9")),
    "image id twice": (edit("images", 1, id=1), ("image id 1 is there twice",)),
    "annotation id twice": (edit("annotations", 1, id=10), ("annotation id 10 is there twice",)),
    "category id twice": (edit("categories", 1, id=0), ("category id 0 is there twice",)),
    "id no number": (edit("annotations", 1, id="x"), ("annotations[1]", "'x'")),
    "no images": (no_images, ("lists no images",)),
    "no boxes": (no_boxes, ("holds no boxes",)),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_is_named(folder: Path, name: str) -> None:
    change, expected = DEFECTS[name]
    coco = document()
    change(coco, folder)
    with pytest.raises(BadDataset) as caught:
        load(folder, coco)
    assert caught.value.reason == "bad-dataset"
    for text in ("site.json", *expected):
        assert text in str(caught.value)


def test_all_defects_are_reported_at_once(folder: Path) -> None:
    coco = document()
    for name in ("missing image", "unknown class", "outside on the right"):
        DEFECTS[name][0](coco, folder)
    with pytest.raises(BadDataset, match="3 defects") as caught:
        load(folder, coco)
    for text in ("no such file", "annotation 11", "annotation 10"):
        assert text in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_flood_of_defects_is_cut(folder: Path) -> None:
    coco = document()
    coco["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": [0, 0, 0, 0]} for i in range(500)
    ]
    with pytest.raises(BadDataset, match="500 defects") as caught:
        load(folder, coco)
    assert "and 450 more" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is not JSON"), ("[3]", "Federated Street"), ('{"images": 3}', "'images' must be a list")],
)
def test_what_is_not_a_coco_file(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "site.json"
    file.write_text(text)
    with pytest.raises(BadDataset, match=expected):
        load_dataset(file, tmp_path, CLASSES)


def test_annotation_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"site\.json: cannot be read"):
        load_dataset(tmp_path / "site.json", tmp_path, CLASSES)


def test_cache_keeps_what_fits_and_no_more(folder: Path) -> None:
    side = 16
    dataset = load(folder, document(), cache=MemoryCache(3 * side * side))
    first = dataset.square(0, side)
    assert first.shape == (3, side, side)
    assert first.dtype == torch.uint8
    assert abs(int(first[0].float().mean()) - 40) <= 3, "the red of the image itself"
    assert dataset.square(0, side) is first
    second = dataset.square(1, side)
    assert dataset.square(1, side) is not second, "the bound is reached: decoded anew"
    assert torch.equal(dataset.square(1, side), second)
    assert dataset.cache.used_bytes == 3 * side * side


def test_grey_and_transparent_files_are_read_as_colour(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (20, 20)).save(tmp_path / f"{mode}.png")
        assert read_square(tmp_path / f"{mode}.png", 8).shape == (3, 8, 8)
