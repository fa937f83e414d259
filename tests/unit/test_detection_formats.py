"""Annotation formats: what is written is read again, and what is wrong is named with its file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detection.annotations import Annotations, Box, Picture
from detection.check import Checked, check
from detection.formats import FORMATS, Source, coco, find_images, locate
from federation.errors import BadDataset
from federation.settings import AnnotationFormat

SIZES = {"a.jpg": (640, 480), "gate/b.png": (101, 67), "gate/c.jpg": (3000, 200)}
CLASSES = ("chair", "Gas tank", "stoß")
TOLERANCE_PX = 1e-3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (60 * number, 80, 90)).save(folder / name)
    return folder


@st.composite
def corners(draw: st.DrawFn, width: int, height: int) -> tuple[float, float, float, float]:
    left = draw(st.floats(0, width - 2))
    top = draw(st.floats(0, height - 2))
    return left, top, draw(st.floats(left + 1, width)), draw(st.floats(top + 1, height))


@st.composite
def data_sets(draw: st.DrawFn) -> list[Picture]:
    pictures = []
    for name, (width, height) in SIZES.items():
        boxes = draw(
            st.lists(st.builds(Box, st.sampled_from(CLASSES), corners(width, height)), min_size=0, max_size=4)
        )
        pictures.append(Picture(name, width, height, tuple(boxes), {"device": draw(st.integers(0, 99))}))
    # every class occurs: formats without a list of classes know of no other
    first = Picture("a.jpg", 640, 480, tuple(Box(name, (1, 2, 30, 40)) for name in CLASSES), {"device": 1})
    return [first, *pictures[1:]]


def same_boxes(a: Picture, b: Picture) -> None:
    assert [box.name for box in a.boxes] == [box.name for box in b.boxes]
    for one, other in zip(a.boxes, b.boxes, strict=True):
        assert one.corners == pytest.approx(other.corners, abs=TOLERANCE_PX)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pictures=data_sets())
def test_what_is_written_is_read_again(
    format: str, pictures: list[Picture], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(format)
    written = FORMATS[format].write(pictures, CLASSES, folder)
    checked = check(written, images)
    assert checked.source.format == format
    assert checked.defects == ()
    assert sorted(checked.classes) == sorted(CLASSES)
    read = {picture.name: picture for picture in checked.pictures}
    assert read.keys() == SIZES.keys()
    for picture in pictures:
        found = read[picture.name]
        assert (found.width, found.height) == SIZES[picture.name]
        same_boxes(found, picture)
        if format != "yolo":  # which has no place for it
            assert str(found.fields["device"]) == str(picture.fields["device"])


@pytest.mark.parametrize("format", FORMATS)
def test_fields_of_one_format_do_not_take_the_place_of_anothers_own(
    format: str, images: Path, tmp_path: Path
) -> None:
    fields = {"id": 2, "image_id": "a", "file_name": "a.jpg", "width": 1, "items": 3, "category_id": 1}
    pictures = [
        Picture(name, *SIZES[name], (Box(CLASSES[i], (1, 1, 9, 9)),), {**fields, "id": 3 - i})
        for i, name in enumerate(SIZES)
    ]
    checked = check(FORMATS[format].write(pictures, CLASSES, tmp_path), images).require()
    assert {p.name: [box.name for box in p.boxes] for p in checked.pictures} == {
        name: [CLASSES[i]] for i, name in enumerate(SIZES)
    }


def test_classes_keep_their_order_where_the_format_has_one(images: Path, tmp_path: Path) -> None:
    picture = Picture("a.jpg", 640, 480, (Box("stoß", (1, 1, 9, 9)),))
    for format in ("coco", "yolo"):
        written = FORMATS[format].write([picture], CLASSES, tmp_path / format)
        assert check(written, images).classes == CLASSES


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten(format: str, tmp_path: Path) -> None:
    picture = Picture("a.jpg", 640, 480, (Box("chair", (1, 1, 9, 9)),))
    FORMATS[format].write([picture], CLASSES, tmp_path)
    with pytest.raises(BadDataset, match="is there already"):
        FORMATS[format].write([picture], CLASSES, tmp_path)


@pytest.mark.parametrize("format", ["voc", "yolo", "street"])
def test_two_images_that_would_share_a_label_file_are_refused(format: str, tmp_path: Path) -> None:
    pictures = [Picture(f"1.{suffix}", 10, 10, ()) for suffix in ("jpg", "png")]
    with pytest.raises(BadDataset, match=r"1\.jpg and 1\.png differ in the suffix alone"):
        FORMATS[format].write(pictures, CLASSES, tmp_path)


def test_settings_and_flags_know_the_formats_there_are() -> None:
    assert set(get_args(AnnotationFormat)) == FORMATS.keys()


# --- each format's own example -------------------------------------------------------------------------


def put(folder: Path, files: dict[str, str | tuple[int, int]]) -> Path:
    """Write texts, and an image of its own colour for each size."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            Image.new("RGB", content, (number * 20, 0, 7)).save(path)
    return folder


def boxes(checked: Checked) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    assert checked.defects == ()
    return {
        picture.name: [(box.name, tuple(round(v, 6) for v in box.corners)) for box in picture.boxes]
        for picture in checked.pictures
    }


VOC = """<annotation><folder>JPEGImages</folder><filename>1.jpg</filename>
<size><width>48</width><height>32</height><depth>3</depth></size>
<object><name>chair</name><difficult>1</difficult>
  <bndbox><ymin>21</ymin><xmin>11</xmin><xmax>40</xmax><ymax>30</ymax></bndbox>
  <part><name>leg</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>
</annotation>"""


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    put(tmp_path, {"Annotations/1.xml": VOC, "JPEGImages/1.jpg": (48, 32)})
    assert boxes(check(tmp_path)) == {"1.jpg": [("chair", (10, 20, 40, 30))]}
    # a tool that counts from zero is at most one pixel off, which is clipped
    (tmp_path / "Annotations/1.xml").write_text(VOC.replace(">11<", ">0<"))
    assert boxes(check(tmp_path)) == {"1.jpg": [("chair", (0, 20, 40, 30))]}


def test_yolo_of_ultralytics(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "data.yaml": "path: .\ntrain: images/train\nval: images/val\nnames: {0: chair, 1: table}\n",
            "images/train/1.jpg": (40, 20),
            "images/train/2.jpg": (40, 20),
            "images/val/3.jpg": (40, 20),
            "labels/train/1.txt": "1 0.5 0.5 0.25 0.5\n\n0 0.125 0.25 .25 5e-1\n",
            "labels/val/3.txt": "0 0.5 0.5 1 1",
        },
    )
    first = [("table", (15, 5, 25, 15)), ("chair", (0, 0, 10, 10))]
    expected = {"train/1.jpg": first, "train/2.jpg": [], "val/3.jpg": [("chair", (0, 0, 40, 20))]}
    assert boxes(check(tmp_path)) == expected
    assert boxes(check(tmp_path / "data.yaml")) == {"1.jpg": first, "2.jpg": []}
    assert boxes(check(tmp_path, tmp_path / "images/val")) == {"3.jpg": [("chair", (0, 0, 40, 20))]}
    assert boxes(check(tmp_path / "labels/train")) == {"1.jpg": first, "2.jpg": []}


def test_yolo_of_darknet_has_labels_beside_images(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "obj.names": "chair\ntable\n\n",
            "obj.data": "classes = 2\nnames = data/obj.names\n",
            "train.txt": "data/obj_train_data/1.jpg\n",
            "obj_train_data/1.jpg": (40, 20),
            "obj_train_data/1.txt": "1 0.5 0.5 0.25 0.5",
        },
    )
    assert boxes(check(tmp_path)) == {"obj_train_data/1.jpg": [("table", (15, 5, 25, 15))]}


def test_yolo_of_roboflow(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [chair, table]\n",
            "train/images/1.jpg": (40, 20),
            "train/labels/1.txt": "1 0.5 0.5 0.25 0.5",
        },
    )
    assert boxes(check(tmp_path / "data.yaml")) == {"1.jpg": [("table", (15, 5, 25, 15))]}
    assert boxes(check(tmp_path / "train")) == {"1.jpg": [("table", (15, 5, 25, 15))]}


def test_labels_in_a_folder_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, {"marks/classes.txt": "chair", "marks/1.txt": "0 0.5 0.5 1 1", "frames/1.jpg": (40, 20)})
    expected = {"1.jpg": [("chair", (0, 0, 40, 20))]}
    assert boxes(check(tmp_path / "marks", tmp_path / "frames")) == expected


STREET = [
    {
        "image_id": "000009",
        "device1_id": 3,
        "device2_id": 1,
        "items": [{"class": "chair", "bbox": [10, 5, 30, 20]}],
    }
]


def test_federated_street_takes_the_size_from_the_file(tmp_path: Path) -> None:
    put(tmp_path, {"train_label.json": json.dumps(STREET), "Images/000009.jpg": (48, 32)})
    checked = check(tmp_path / "train_label.json", tmp_path / "Images")
    assert boxes(checked) == {"000009.jpg": [("chair", (10, 5, 30, 20))]}
    assert checked.pictures[0].fields == {"device1_id": 3, "device2_id": 1}
    assert (checked.pictures[0].width, checked.pictures[0].height) == (48, 32)


def test_coco_regions_of_many_objects_are_left_out(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 48, "height": 32, "camera": "north"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 4, "bbox": [0, 0, 48, 32], "iscrowd": 1},
        ],
        "categories": [{"id": 4, "name": "chair"}],
    }
    put(tmp_path, {"x.json": json.dumps(coco), "images/1.jpg": (48, 32)})
    checked = check(tmp_path)
    assert boxes(checked) == {"1.jpg": [("chair", (1, 2, 4, 6))]}
    assert checked.pictures[0].fields == {"camera": "north"}
    assert "1 crowd regions are left out" in checked.notes


# --- bad input -----------------------------------------------------------------------------------------

Files = dict[str, str | tuple[int, int]]
LAUGHING_LISTS = "\n".join(
    ["a0: &a0 [x, y]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)), "names: *a8"]
)
LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'


def voc(old: str, new: str) -> Files:
    assert old in VOC
    return {"Annotations/1.xml": VOC.replace(old, new), "JPEGImages/1.jpg": (48, 32)}


def only(text: str) -> Files:
    return {"Annotations/1.xml": text, "JPEGImages/1.jpg": (48, 32)}


def yolo(line: str, names: str = "names: [chair, table]") -> Files:
    return {"data.yaml": names, "images/1.jpg": (48, 32), "labels/1.txt": line}


def street(**fields: object) -> Files:
    return {"s.json": json.dumps([{**STREET[0], **fields}]), "images/000009.jpg": (48, 32)}


DEFECTS: dict[str, tuple[Files, str, tuple[str, ...]]] = {
    # name: files, kind of the defect, what its text must hold
    "voc: cut off": (only(VOC[:-20]), "unreadable annotations", ("1.xml", "is not XML")),
    "voc: not text": (only("\0\1"), "unreadable annotations", ("is not XML",)),
    "voc: entities": (only(LAUGHS), "unreadable annotations", ("DOCTYPE",)),
    "voc: other XML": (only("<kml/>"), "unreadable annotations", ("<kml>",)),
    "voc: no file name": (voc(">1.jpg<", "><"), "bad entry", ("1.xml", "<filename>")),
    "voc: path out": (voc(">1.jpg<", ">../1.jpg<"), "bad entry", ("../1.jpg",)),
    "voc: no size": (voc("<width>48</width>", ""), "bad entry", ("<size>",)),
    "voc: size of zero": (voc(">48<", ">0<"), "bad entry", ("<size>",)),
    "voc: other size": (voc(">48<", ">49<"), "size mismatch", ("48x32", "49x32")),
    "voc: no box": (voc("bndbox>", "box>"), "not a box", ("1.xml", "object 1", "<bndbox>")),
    "voc: no number": (voc(">11<", ">eleven<"), "not a box", ("object 1",)),
    "voc: not finite": (voc(">11<", ">nan<"), "not a box", ("object 1",)),
    "voc: outside": (voc(">40<", ">60<"), "box outside", ("object 1 (1.jpg)", "48x32")),
    "voc: turned round": (voc(">40<", ">4<"), "box without area", ("object 1",)),
    "voc: no class": (voc("<name>chair</name>", ""), "unknown class", ("object 1", "<name>")),
    "voc: name too long for a file": (voc(">1.jpg<", f">{'a' * 300}.jpg<"), "missing image", ("aaaa",)),
    "voc: no image": ({"Annotations/1.xml": VOC, "JPEGImages/2.jpg": (48, 32)}, "missing image", ("1.jpg",)),
    "yolo: four numbers": (yolo("0 .5 .5 .5"), "not a box", ("1.txt", "line 1", "4 fields")),
    "yolo: outline": (yolo("0 .1 .1 .5 .1 .5 .5"), "not a box", ("line 1", "export boxes")),
    "yolo: text": (yolo("\n0 .5 .5 .5 wide"), "not a box", ("line 2", "wide")),
    "yolo: not finite": (yolo("0 .5 .5 .5 inf"), "not a box", ("line 1",)),
    "yolo: class not listed": (yolo("2 .5 .5 .5 .5"), "unknown class", ("line 1", "class 2", "2 named")),
    "yolo: class by name": (yolo("chair .5 .5 .5 .5"), "unknown class", ("class chair",)),
    "yolo: class below 0": (yolo("-1 .5 .5 .5 .5"), "unknown class", ("class -1",)),
    "yolo: class beyond all": (yolo(f"{'9' * 5000} .5 .5 .5 .5"), "unknown class", ("line 1",)),
    "yolo: pixels": (yolo("0 12 8 20 10"), "box outside", ("line 1 (1.jpg)",)),
    "yolo: no area": (yolo("0 .5 .5 0 .5"), "box without area", ("line 1",)),
    "yolo: label without image": ({**yolo(""), "labels/2.txt": "0 .5 .5 .5 .5"}, "missing image", ("2.txt",)),
    "yolo: one label for two": (
        {**yolo("0 .5 .5 .5 .5"), "images/1.png": (9, 9)},
        "duplicate image",
        ("1.png",),
    ),
    "yolo: no image": ({**yolo("0 .5 .5 .5 .5"), "images/1.jpg": "text"}, "unreadable image", ("1.jpg",)),
    "street: no id": (street(image_id=None), "bad entry", ("entry 0", "image_id")),
    "street: path out": (street(image_id="../9"), "bad entry", ("../9",)),
    "street: no items": (street(items=None), "bad entry", ("000009", "items")),
    "street: no box": (street(items=[{"class": "chair"}]), "not a box", ("000009, item 1", "None")),
    "street: three numbers": (street(items=[{"class": "a", "bbox": [1, 2, 3]}]), "not a box", ("item 1",)),
    "street: texts": (street(items=[{"class": "a", "bbox": ["1", "2", "3", "4"]}]), "not a box", ("item 1",)),
    "street: a number beyond all": (
        street(items=[{"class": "a", "bbox": [10**400, 2, 3, 4]}]),
        "not a box",
        ("item 1",),
    ),
    "street: no class": (street(items=[{"bbox": [1, 2, 3, 4]}]), "unknown class", ("item 1",)),
    "street: no object": (street(items=[7]), "unknown class", ("item 1",)),
    "street: outside": (street(items=[{"class": "a", "bbox": [1, 2, 60, 9]}]), "box outside", ("item 1",)),
    "street: no image": (street(image_id="000010"), "missing image", ("000010.jpg",)),
    "street: two images": ({**street(), "images/000009.png": (48, 32)}, "duplicate image", ("000009.png",)),
    "street: id twice": (
        {"s.json": json.dumps(STREET * 2), "images/000009.jpg": (48, 32)},
        "duplicate id",
        ("000009",),
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    files, kind, texts = DEFECTS[name]
    path = put(tmp_path, files)
    checked = check(path)
    assert checked.source.format == name.partition(":")[0]
    found = [defect for defect in checked.defects if defect.kind == kind]
    assert len(found) == 1, checked.defects
    for text in texts:
        assert text in str(found[0])
    with pytest.raises(BadDataset):
        checked.require()


HOPELESS: dict[str, tuple[Files, str]] = {
    "json that is none": ({"a.json": "{", "images/1.jpg": (9, 9)}, "is not JSON"),
    "json far too deep": ({"a.json": '{"images": ' + "[" * 100_000, "images/1.jpg": (9, 9)}, "is not JSON"),
    "json of something else": ({"a.json": '{"x": 1}', "images/1.jpg": (9, 9)}, "'images' must be a list"),
    "a list of something else": ({"a.json": "[3]", "images/1.jpg": (9, 9)}, "Federated Street"),
    "yolo without names": ({"labels/1.txt": "0 .5 .5 .5 .5"}, "no annotations were recognised"),
    "names without order": (yolo("", "names: 3"), "names must be"),
    "names that are no texts": (yolo("", "names: [1, 2]"), "names must be"),
    "names that are ever more lists": (yolo("", LAUGHING_LISTS), "names must be.{1,500}$"),
    "names twice": (yolo("", "names: [a, b, a]"), "'a' is there twice"),
    "two lists of names": ({**yolo(""), "b.yaml": "names: [x]"}, r"b\.yaml and data\.yaml"),
    "nothing": ({"readme.md": "hello"}, "no annotations were recognised"),
    "only a picture": ({"1.jpg": (9, 9)}, "no annotations were recognised"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_what_is_no_data_set_is_refused_as_a_whole(name: str, tmp_path: Path) -> None:
    files, message = HOPELESS[name]
    with pytest.raises(BadDataset, match=message):
        check(put(tmp_path, files))


# --- recognising ---------------------------------------------------------------------------------------


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    put(tmp_path, {"a.json": "{}", "b.json": "[]", "Annotations/1.xml": VOC, "classes.txt": "chair"})
    with pytest.raises(BadDataset) as caught:
        locate(tmp_path)
    for text in ("coco", "a.json", "street", "b.json", "voc", "yolo", "--format"):
        assert text in str(caught.value)
    assert locate(tmp_path, "street") == Source("street", tmp_path / "b.json")
    assert locate(tmp_path, "voc") == Source("voc", tmp_path)
    assert locate(tmp_path / "a.json") == Source("coco", tmp_path / "a.json")


def test_two_files_of_one_format_are_ambiguous_even_if_it_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"a.json": "{}", "b.json": "{}"})
    with pytest.raises(BadDataset, match="several data sets"):
        locate(tmp_path, "coco")


def test_a_format_that_is_not_there_or_does_not_exist(tmp_path: Path) -> None:
    put(tmp_path, {"a.json": "{}"})
    with pytest.raises(BadDataset, match="no annotations were recognised"):
        locate(tmp_path, "street")
    with pytest.raises(BadDataset, match="there is no format 'pascal'; there are: coco, voc, yolo, street"):
        locate(tmp_path, "pascal")


def test_a_named_format_wins_over_the_look_of_a_file(tmp_path: Path) -> None:
    put(tmp_path, {"labels.jsn": json.dumps(STREET), "images/000009.jpg": (48, 32)})
    with pytest.raises(BadDataset, match="no annotations were recognised"):
        check(tmp_path / "labels.jsn")
    assert len(check(tmp_path / "labels.jsn", format="street").pictures) == 1


def test_images_that_are_not_found_or_are_no_folder(tmp_path: Path) -> None:
    put(tmp_path, {"deep/er/still/a.json": "{}"})
    source = Source("coco", tmp_path / "deep/er/still/a.json")
    with pytest.raises(
        BadDataset, match=r"were not found \(.*still/images.*\): name their folder with --images"
    ):
        find_images(source)
    with pytest.raises(BadDataset, match="is not a folder"):
        check(source.path, tmp_path / "nowhere")


def test_readers_need_no_torch() -> None:
    code = "import sys, detection.check, detection.split, detection.statistics; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_a_reader_can_be_called_alone(tmp_path: Path) -> None:
    put(tmp_path, {"s.json": json.dumps(STREET)})
    read: Callable[[Path, Path | None], Annotations] = FORMATS["street"].read
    (picture,) = read(tmp_path / "s.json", None).pictures
    assert (picture.name, picture.width) == ("000009.jpg", None)


def test_coco_sizes_may_be_written_with_a_point(tmp_path: Path) -> None:
    file = tmp_path / "coco.json"
    image = {"id": 1, "file_name": "a.jpg", "width": 640.0, "height": 480.0}
    file.write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    found = coco.read(file, None)
    assert [(p.width, p.height) for p in found.pictures] == [(640, 480)]
    assert not found.defects
    file.write_text(json.dumps({"images": [image | {"width": 640.5}], "annotations": [], "categories": []}))
    assert coco.read(file, None).defects
