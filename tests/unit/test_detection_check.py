"""What `check` says about a data set as a whole, its statistics, and the sheet for the eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.check import check, classes_of
from detection.dataset import checked_items, load_dataset, read_square
from detection.draw import annotation_sheet, colour_of, evenly
from detection.frames import read_image
from detection.statistics import describe
from federation.errors import BadDataset

CLASSES = ("chair", "table")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(100, 100), (200, 100), (100, 100)], start=1):
        Image.new("RGB", size, (60 * number, 90, 120)).save(tmp_path / f"images/{number}.png")
    write(tmp_path, document())
    return tmp_path


def document() -> dict[str, Any]:
    return {
        "images": [
            {"id": 1, "file_name": "1.png", "width": 100, "height": 100, "device": 4},
            {"id": 2, "file_name": "2.png", "width": 200, "height": 100, "device": 4},
            {"id": 3, "file_name": "3.png", "width": 100, "height": 100, "device": 5},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 16, 16]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [40, 10, 32, 32]},
            {"id": 3, "image_id": 2, "category_id": 1, "bbox": [2, 1, 192, 96]},
            {"id": 4, "image_id": 2, "category_id": 2, "bbox": [20, 20, 50, 50]},
        ],
        "categories": [{"id": 1, "name": "chair"}, {"id": 2, "name": "table"}],
    }


def write(folder: Path, coco: dict[str, Any]) -> None:
    (folder / "site.json").write_text(json.dumps(coco))


def test_statistics(folder: Path) -> None:
    checked = check(folder)
    statistics = describe(checked.pictures, checked.classes)
    assert (statistics.images, statistics.empty_images, statistics.boxes) == (3, 1, 4)
    assert {name: (c.boxes, c.images) for name, c in statistics.classes.items()} == {
        "chair": (3, 2),
        "table": (1, 1),
    }
    assert statistics.classes["chair"].median_px == 32
    assert statistics.image_sizes == {(100, 100): 2, (200, 100): 1}
    # 16 is below COCO's 32, 32 is the first medium one, √(192·96) = 135.8 is large
    assert statistics.sizes == {"small": 0.25, "medium": 0.5, "large": 0.25}
    assert statistics.side_px[0] == 16
    assert statistics.side_px[2] == pytest.approx((32 + 50) / 2)
    assert statistics.side_px[-1] == pytest.approx((192 * 96) ** 0.5)
    assert statistics.side_share[0] == 0.16
    assert statistics.side_share[-1] == pytest.approx(0.96)
    assert statistics.fields == {"device": 2}
    nothing = describe([], CLASSES)
    assert (nothing.boxes, nothing.side_px) == (0, ())


def test_a_class_that_the_site_lacks_is_a_note_and_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load_dataset(folder / "site.json", None, ("chair", "cart", "table"))
    assert "no boxes of cart: this data set cannot teach them" in caplog.text
    assert dataset.boxes_per_class() == {"chair": 3, "cart": 0, "table": 1}


def test_an_unknown_class_is_a_defect_that_names_the_likely_one(folder: Path) -> None:
    checked = check(folder, classes=("Chair", "table"))
    assert len(checked.defects) == 3
    assert {defect.kind for defect in checked.defects} == {"unknown class"}
    assert "annotation 1 (1.png): class 'chair' is not one of the job's (is 'Chair' meant?)" in str(
        checked.defects[0]
    )
    assert "meant" not in str(check(folder, classes=("lamp", "table")).defects[0])


def test_classes_that_are_meant_for_other_jobs_are_left_out(folder: Path) -> None:
    checked = check(folder, classes=("table",), others=("chair", "table", "lamp"))
    assert checked.defects == ()
    assert "3 boxes of classes that the job does not have are left out" in checked.notes
    assert {box.name for picture in checked.pictures for box in picture.boxes} == {"table"}
    assert len(checked.pictures) == len(check(folder, classes=("chair", "table")).pictures)


def test_a_class_that_differs_in_capitals_alone_is_meant_for_this_job(folder: Path) -> None:
    checked = check(folder, classes=("Chair", "table"), others=("chair", "table"))
    assert {defect.kind for defect in checked.defects} == {"unknown class"}


def test_the_classes_of_a_data_set_are_those_of_its_boxes(folder: Path) -> None:
    assert classes_of(folder) == {"chair", "table"}
    for image in (folder / "images").iterdir():
        image.unlink()
    assert classes_of(folder, folder / "images") == {"chair", "table"}, "no image is looked at"


def test_files_that_are_not_listed_are_a_note(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "images/extra.jpg")
    (folder / "images/.hidden.jpg").write_bytes(b"x")
    checked = check(folder)
    assert checked.defects == ()
    assert checked.notes == ("1 image files have no annotations and are not used: extra.jpg",)


def test_the_same_image_under_two_names(folder: Path) -> None:
    (folder / "images/3.png").write_bytes((folder / "images/1.png").read_bytes())
    (note,) = check(folder).notes
    assert "contradict each other: 3.png = 1.png" in note
    coco = document()
    coco["annotations"] += [
        {"id": 8, "image_id": 3, "category_id": 1, "bbox": [40, 10, 32, 32]},
        {"id": 9, "image_id": 3, "category_id": 1, "bbox": [10, 10, 16, 16]},
    ]
    write(folder, coco)
    (note,) = check(folder).notes
    assert note == "1 images are there twice, byte for byte: 3.png = 1.png"


def test_the_same_file_listed_twice_is_a_defect(folder: Path) -> None:
    coco = document()
    coco["images"][2]["file_name"] = "1.png"
    write(folder, coco)
    (defect,) = check(folder).defects
    assert defect.kind == "duplicate image"
    assert "image 3: 1.png is listed twice" in str(defect)


def test_the_same_box_twice_is_a_note(folder: Path) -> None:
    coco = document()
    coco["annotations"].append({**coco["annotations"][0], "id": 7})
    write(folder, coco)
    assert check(folder).notes == ("1 boxes are there twice, with the same class and corners",)


@pytest.mark.parametrize("format", ["JPEG", "MPO"])
def test_images_that_exif_turns_are_a_note(folder: Path, format: str) -> None:
    """MPO, a JPEG with a second picture behind it, is what some phones and stereo cameras write as .jpg."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (100, 100), (1, 2, 3))
    more: dict[str, Any] = {"save_all": True, "append_images": [image]} if format == "MPO" else {}
    image.save(folder / "images/3.jpg", format=format, exif=exif, **more)
    coco = document()
    coco["images"][2]["file_name"] = "3.jpg"
    write(folder, coco)
    (folder / "images/3.png").unlink()
    (note,) = check(folder).notes
    assert note.startswith("1 images are turned by EXIF")
    assert note.endswith("3.jpg")


def test_good_boxes_beside_a_bad_one_are_still_shown(folder: Path) -> None:
    coco = document()
    coco["annotations"][0]["bbox"] = [90, 90, 30, 30]
    write(folder, coco)
    checked = check(folder)
    assert [defect.kind for defect in checked.defects] == ["box outside"]
    assert len(checked.pictures[0].boxes) == 1
    with pytest.raises(BadDataset, match="1 defects"):
        checked.require()


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    check(folder, on_picture=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_content_that_is_known_is_not_decoded_again(folder: Path) -> None:
    file = folder / "images/2.png"
    file.write_bytes(file.read_bytes()[:-30])
    assert [defect.kind for defect in check(folder).defects] == ["unreadable image"]
    assert check(folder, known=lambda sha256: True).defects == ()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_picture_of_more_than_8_bits_is_not_cut_off_in_silence(folder: Path, dtype: type) -> None:
    values = np.linspace(0, 4095, 100 * 100).reshape(100, 100).astype(dtype)
    Image.fromarray(values).save(folder / "images/1.png", format="TIFF")
    (defect,) = check(folder).defects
    assert defect.kind == "unreadable image"
    assert "more than 8 bits a pixel" in str(defect)
    for read in (read_image, lambda path: read_square(path, 32)):
        with pytest.raises(BadDataset, match="8-bit picture"):
            read(folder / "images/1.png")


def test_a_program_for_ghostscript_is_no_image_whatever_it_is_called(folder: Path) -> None:
    file = folder / "images/1.png"
    Image.open(file).save(file, format="EPS")
    (defect,) = check(folder).defects
    assert defect.kind == "unreadable image"
    assert "Ghostscript" not in str(defect), "nobody looked for it"
    with pytest.raises(BadDataset, match="cannot identify"):
        read_image(file)


def test_the_sheet_shows_the_boxes_in_their_colours(folder: Path) -> None:
    checked = check(folder)
    for name in ("a.png", "b.png"):
        annotation_sheet(checked_items(checked), CLASSES, folder / name, title="Site", columns=2, width=200)
    with Image.open(folder / "a.png") as sheet:
        pixels = np.array(sheet.convert("RGB"))
    assert pixels.shape[1] == 2 * 24 + 2 * 200 + 12
    # the first tile is image 1 at twice its size, with the box (40, 10, 72, 42); its left edge, in the middle
    left, top = 24, 84
    expected = tuple(int(colour_of(1)[i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(pixels[top + 2 * 30, left + 2 * 40]) == expected
    assert tuple(pixels[top + 2 * 30, left + 2 * 56]) == (60, 90, 120), "boxes are not filled"
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()


def test_a_legend_that_is_too_long_ends_at_the_edge(folder: Path) -> None:
    names = (*CLASSES, *(f"a class with a long name {i}" for i in range(40)))
    annotation_sheet(checked_items(check(folder)), names, folder / "a.png", columns=1, width=200)
    with Image.open(folder / "a.png") as sheet:
        assert sheet.width == 248


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(0, 5, []), (1, 5, [0]), (3, 5, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (765, 3, [0, 382, 764])],
)
def test_evenly(count: int, wanted: int, expected: list[int]) -> None:
    assert evenly(count, wanted) == expected


def test_an_odd_exif_header_is_no_reason_to_refuse_an_image(folder: Path) -> None:
    coco = document()
    coco["images"][2]["file_name"] = "3.jpg"
    write(folder, coco)
    (folder / "images/3.png").unlink()
    Image.new("RGB", (100, 100)).save(folder / "images/3.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert check(folder).defects == ()
