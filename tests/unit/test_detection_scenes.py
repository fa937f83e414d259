"""The generated data set: deterministic, exactly annotated, skewed as its docstring says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow comes with the extra: pip install fedqueue[site]")

from PIL import Image

from detection.scenery import CLASSES, paint
from detection.scenes import CAMERAS, Scenes, render

SIZE = (320, 256)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return render(tmp_path_factory.mktemp("scenes"), seed=3, images_per_site=20, test_images=24)


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def class_counts(coco: dict[str, Any]) -> Counter[str]:
    names = {category["id"]: category["name"] for category in coco["categories"]}
    return Counter(names[annotation["category_id"]] for annotation in coco["annotations"])


def files(scenes: Scenes) -> dict[str, Path]:
    return {**scenes.sites, "test": scenes.test}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        render(tmp_path / folder, seed=5, images_per_site=3, test_images=3)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) == 3 * 3 + 3 + 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_another_seed_gives_another_data_set(tmp_path: Path) -> None:
    first = render(tmp_path / "a", seed=1, images_per_site=2, test_images=0)
    second = render(tmp_path / "b", seed=2, images_per_site=2, test_images=0)
    assert first.sites["north"].read_bytes() != second.sites["north"].read_bytes()
    name = "north-0000.jpg"
    assert (first.images / name).read_bytes() != (second.images / name).read_bytes()


def test_more_test_images_do_not_change_the_sites(tmp_path: Path) -> None:
    first = render(tmp_path / "a", seed=1, images_per_site=2, test_images=0)
    second = render(tmp_path / "b", seed=1, images_per_site=2, test_images=3)
    for site in first.sites:
        assert first.sites[site].read_bytes() == second.sites[site].read_bytes()


def test_files_are_coco_and_say_that_they_are_generated(scenes: Scenes) -> None:
    assert set(scenes.sites) == {"north", "harbour", "market"}
    for name, path in files(scenes).items():
        coco = load(path)
        assert coco["info"]["generated"] is True
        assert "generated" in coco["info"]["description"].lower()
        assert [c["name"] for c in coco["categories"]] == list(CLASSES) == list(scenes.classes)
        assert len(coco["images"]) == (24 if name == "test" else 20)
        image_ids = {image["id"] for image in coco["images"]}
        assert len(image_ids) == len(coco["images"])
        assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
        assert {a["image_id"] for a in coco["annotations"]} == image_ids  # no image is empty
        for image in coco["images"]:
            with Image.open(scenes.images / image["file_name"]) as frame:
                assert frame.size == (image["width"], image["height"]) == SIZE


def test_every_frame_carries_the_caption(scenes: Scenes) -> None:
    """In the caption's corner there are white letters on a darkened ground, whatever the camera's light."""
    for path in scenes.sites.values():
        for image in load(path)["images"]:
            with Image.open(scenes.images / image["file_name"]) as frame:
                corner = np.asarray(frame.convert("L").crop((2, 2, 60, 14)))
            assert corner.max() > 215
            assert corner.min() < corner.max() - 90


def test_boxes_lie_inside_their_image(scenes: Scenes) -> None:
    for path in files(scenes).values():
        for annotation in load(path)["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert w >= 1
            assert h >= 1
            assert x >= 0
            assert y >= 0
            assert x + w <= SIZE[0]
            assert y + h <= SIZE[1]
            assert annotation["area"] == w * h


def test_objects_have_the_promised_size(scenes: Scenes) -> None:
    sides = [
        (a["area"] / (SIZE[0] * SIZE[1])) ** 0.5
        for path in files(scenes).values()
        for a in load(path)["annotations"]
    ]
    assert 0.12 < float(np.median(sides)) < 0.18


def test_boxes_are_where_the_objects_are(tmp_path: Path) -> None:
    """A camera's frames differ from the camera's median frame mostly inside of the boxes."""
    scenes = render(tmp_path, seed=4, images_per_site=9, test_images=0)
    coco = load(scenes.sites["north"])
    frames = np.stack(
        [
            np.asarray(Image.open(scenes.images / image["file_name"]).convert("RGB"), dtype=np.float32)
            for image in coco["images"]
        ]
    )
    frames /= frames.mean(axis=(1, 2, 3), keepdims=True)  # the light varies
    change = np.abs(frames - np.median(frames, axis=0)).max(axis=3)[:, 150:]  # the road: little texture
    inside = np.zeros_like(change, dtype=np.bool_)
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        inside[annotation["image_id"] - 1, max(0, y - 150) : max(0, y + h - 150), x : x + w] = True
    assert change[inside].mean() > 4 * change[~inside].mean()


@pytest.mark.parametrize("name", CLASSES)
def test_sprites_are_cropped_to_their_mask(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        sprite = paint(name, (40, 40), rng)
        height, width = sprite.mask.shape
        assert sprite.image.size == (width, height)
        assert sprite.mask[0].any()
        assert sprite.mask[-1].any()
        assert sprite.mask[:, 0].any()
        assert sprite.mask[:, -1].any()


def test_the_smallest_frames_are_annotated_too(tmp_path: Path) -> None:
    """Objects of a few pixels, often hiding each other: still every box is inside and has an area."""
    scenes = render(tmp_path, seed=0, images_per_site=12, test_images=0, size=(64, 64))
    for path in scenes.sites.values():
        for annotation in load(path)["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert 0 <= x < x + w <= 64
            assert 0 <= y < y + h <= 64


def test_cameras_are_skewed_as_documented(scenes: Scenes) -> None:
    for camera in CAMERAS:
        counts = class_counts(load(scenes.sites[camera.name]))
        total = counts.total()
        for name, share in zip(CLASSES, camera.shares, strict=True):
            # quotas, not draws; an object or two may be hidden altogether
            assert abs(counts[name] - share * total) <= 2, (camera.name, name)
    assert class_counts(load(scenes.sites["north"]))["cart"] == 0
    assert class_counts(load(scenes.sites["market"]))["car"] == 0


def test_every_class_is_taught_by_some_camera_and_no_camera_teaches_all() -> None:
    for camera in CAMERAS:
        assert sum(camera.shares) == pytest.approx(1)
        assert min(camera.shares) < 0.05
    for column in zip(*(camera.shares for camera in CAMERAS), strict=True):
        assert max(column) > 0.3


def test_test_set_is_balanced_over_cameras_and_classes(scenes: Scenes) -> None:
    coco = load(scenes.test)
    assert Counter(image["camera"] for image in coco["images"]) == {c.name: 8 for c in CAMERAS}
    counts = class_counts(coco)
    assert max(counts.values()) - min(counts.values()) <= 3
    assert set(counts) == set(CLASSES)


def test_sites_and_test_share_no_image(scenes: Scenes) -> None:
    names = [image["file_name"] for path in files(scenes).values() for image in load(path)["images"]]
    assert len(names) == len(set(names)) == 3 * 20 + 24
    contents = {(scenes.images / name).read_bytes() for name in names}
    assert len(contents) == len(names)


def test_progress_is_told_after_every_image(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    render(
        tmp_path, images_per_site=1, test_images=2, on_image=lambda done, total: seen.append((done, total))
    )
    assert seen == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize(
    "wrong", [{"size": (63, 256)}, {"seed": -1}, {"images_per_site": 0}, {"test_images": -1}]
)
def test_wrong_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|need at least"):
        render(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
