"""YOLO (Darknet, Ultralytics) text, one file per image. https://docs.ultralytics.com/datasets/detect/

    data.yaml                   names: {0: basket, 1: chair}   (or a list; or one name a line in classes.txt, obj.names)
    images/a/000001.jpg
    labels/a/000001.txt         1 0.25 0.4 0.125 0.2           class number, then centre x, y, width and height as
                                                               shares of the image's width and height

The label file lies in `labels` where the image lies in `images`, or beside the image, as Darknet has it. An image
without one has no objects. Numbers are only the way of the file: what counts are the names.

A folder stands for all of its images, data.yaml for those of its `train`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from detection.annotations import Annotations, Box, Picture
from detection.formats.files import read_text, require_unique_stems, same_stem, without_suffix, write_text
from detection.images import header_size, image_files
from federation.errors import BadDataset

LABELS, IMAGES = "labels", "images"
DATA = "data.yaml"
LISTS = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")
"""Files with one class name a line, as LabelImg, CVAT and Roboflow write them."""


def read(path: Path, images: Path | None) -> Annotations:
    """Read the label files of the images below `images`.

    `path` is the data set's folder or its data.yaml. Raises BadDataset if no class names are found.
    """
    root = path.parent if path.is_file() else path
    names = _names(path)
    annotations = Annotations(path, tuple(names.values()))
    if images is None:
        raise BadDataset(f"{path}: a YOLO data set needs its images to be read: name their folder")
    labels = labels_of(root, images)
    known: set[Path] = set()
    pictures = image_files(images)
    for first, second in same_stem(pictures):
        annotations.defect("duplicate image", f"differs from {first} in the suffix alone", images / second)
    for name in pictures:
        file = labels / f"{without_suffix(name)}.txt"
        known.add(file)
        size = header_size(images / name)
        boxes = _boxes(file, names, size, annotations) if size and file.is_file() else ()
        width, height = size or (None, None)
        annotations.pictures.append(Picture(name, width, height, boxes, {}, file.name))
    for file in sorted(labels.rglob("*.txt")):
        if file not in known and _holds_boxes(file):
            annotations.defect("missing image", "there is no image of this name", file)
    return annotations


def labels_of(root: Path, images: Path) -> Path:
    """The folder of the label files: `labels` for `images` in the path, else as it is (Darknet)."""
    parts = images.parts
    for i in reversed(range(len(parts))):
        if parts[i] == IMAGES:
            mirrored = Path(*parts[:i], LABELS, *parts[i + 1 :])
            if mirrored.is_dir():
                return mirrored
            break
    if (root / LABELS).is_dir():
        return root / LABELS
    return root if not images.is_relative_to(root) and any(root.rglob("*.txt")) else images


def train_images(path: Path) -> Path | None:
    """The folder that `train` of data.yaml names; None if it names none. Raises BadDataset."""
    document = _yaml(path)
    train = document.get("train")
    if not isinstance(train, str):
        return None
    base = document.get("path")
    roots = [path.parent / base] if isinstance(base, str) else []
    # exports of Roboflow say ../train/images and mean train/images
    tails = [train, train.removeprefix("../")]
    for folder in (r / tail for r in [*roots, path.parent] for tail in tails):
        if folder.is_dir():
            return folder
    return None


def write(pictures: Sequence[Picture], classes: Sequence[str], folder: Path) -> Path:
    """Write `folder`/labels/*.txt and data.yaml. Eight decimals: 1/10,000 pixel in an image 10,000 wide."""
    require_unique_stems(picture.name for picture in pictures)
    number = {name: i for i, name in enumerate(classes)}
    document = {"path": ".", "train": IMAGES, "val": IMAGES, "names": dict(enumerate(classes))}
    write_text(folder / DATA, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    for picture in pictures:
        assert picture.width, "a checked picture has its size"
        assert picture.height
        lines = []
        for box in picture.boxes:
            left, top, right, bottom = box.corners
            x, width = (left + right) / 2 / picture.width, (right - left) / picture.width
            y, height = (top + bottom) / 2 / picture.height, (bottom - top) / picture.height
            lines.append(f"{number[box.name]} {x:.8f} {y:.8f} {width:.8f} {height:.8f}\n")
        write_text(folder / LABELS / f"{without_suffix(picture.name)}.txt", "".join(lines))
    return folder


def _boxes(
    file: Path, names: dict[int, str], size: tuple[int, int], annotations: Annotations
) -> tuple[Box, ...]:
    try:
        lines = read_text(file).splitlines()
    except BadDataset as exc:
        annotations.defect("unreadable annotations", str(exc).removeprefix(f"{file}: "), file)
        return ()
    boxes = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"line {number}"
        if len(fields) != 5:
            hint = ": an outline? export boxes" if len(fields) > 6 and len(fields) % 2 else ""
            annotations.defect(
                "not a box", f"{where}: must be class x y width height, has {len(fields)} fields{hint}", file
            )
            continue
        values = _values(fields[1:])
        label = int(fields[0]) if re.fullmatch("[0-9]{1,9}", fields[0]) else None
        if label is None or label not in names:
            annotations.defect(
                "unknown class",
                f"{where}: class {fields[0][:32]} is none of the {len(names)} named classes",
                file,
            )
        elif values is None:
            annotations.defect("not a box", f"{where}: must be finite numbers, is {line.strip()!r}", file)
        else:
            x, y, width, height = (v * side for v, side in zip(values, (*size, *size), strict=True))
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            boxes.append(Box(names[label], corners, where))
    return tuple(boxes)


def _values(fields: list[str]) -> list[float] | None:
    try:
        values = [float(field) for field in fields]
    except ValueError:
        return None
    return values if all(isfinite(value) for value in values) else None


def _holds_boxes(file: Path) -> bool:
    """True if the first line is a box: tools put lists of files and classes among the label files."""
    try:
        with file.open(encoding="utf-8") as lines:
            fields = lines.readline().split()
    except (OSError, UnicodeDecodeError):
        return False
    return len(fields) == 5 and _values(fields) is not None


def has_names(path: Path) -> bool:
    """True if a file in the folder, or the YAML file `path`, gives class names."""
    return bool(_name_files(path))


def _name_files(path: Path) -> list[Path]:
    """The files that may give class names: data.yaml wins over lists, near ones over far ones."""
    if path.is_file():
        return [path]
    for folder in (path, path / LABELS, path.parent, path.parent.parent):
        documents = [file for file in sorted(folder.glob("*.y*ml")) if "names" in _yaml_or_nothing(file)]
        if len(documents) > 1:
            raise BadDataset(
                f"{folder}: {' and '.join(file.name for file in documents)} both give class names: name one of them"
            )
        lists = [folder / name for name in LISTS if (folder / name).is_file()]
        if documents or lists:
            return documents or lists
    return []


def _names(path: Path) -> dict[int, str]:
    """class number -> name."""
    files = _name_files(path)
    if not files:
        raise BadDataset(
            f"{path}: has no class names: add data.yaml with names, or classes.txt with one name a line"
        )
    file = files[0]
    if file.suffix in (".yaml", ".yml"):
        names = _yaml(file).get("names")
        entries = dict(enumerate(names)) if isinstance(names, list) else names
    else:
        lines = [line.strip() for line in read_text(file).splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        entries = dict(enumerate(lines))
    if not isinstance(entries, dict) or not all(_is_name(k, v) for k, v in entries.items()) or not entries:
        # not what they are: a few lines of YAML can stand for gigabytes
        raise BadDataset(f"{file}: names must be a list of class names, or give one text for each number")
    twice = sorted({str(name) for name in entries.values() if list(entries.values()).count(name) > 1})
    if twice:
        raise BadDataset(f"{file}: the class {twice[0]!r} is there twice")
    return dict(sorted(entries.items()))


def _is_name(number: object, name: object) -> bool:
    return isinstance(number, int) and number >= 0 and isinstance(name, str) and bool(name)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        raise BadDataset(f"{path}: is not YAML: {exc}") from exc
    if not isinstance(document, dict):
        raise BadDataset(f"{path}: must be YAML with names, as data.yaml of YOLO")
    return document


def _yaml_or_nothing(path: Path) -> dict[str, Any]:
    """For looking around: what is no such file is simply another file."""
    try:
        return _yaml(path)
    except BadDataset:
        return {}
