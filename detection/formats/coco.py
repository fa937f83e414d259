"""COCO JSON, one file for all images. https://cocodataset.org/#format-data

    {"images": [{"id": 1, "file_name": "000001.jpg", "width": 480, "height": 392, "device": 3}, …],
     "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [left, top, width, height]}, …],
     "categories": [{"id": 3, "name": "chair"}, …]}

Other plain fields of an image, such as `device`, are kept. Regions marked `iscrowd` hold many objects at once and are
left out, as is usual for training boxes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detection.annotations import Annotations, Box, Picture, is_inside, numbers
from detection.formats.files import read_json, write_text
from federation.errors import BadDataset

FILE = "annotations.json"
OWN_FIELDS = {"id", "file_name", "width", "height", "license", "flickr_url", "coco_url", "date_captured"}


def read(path: Path, images: Path | None) -> Annotations:
    """Read the file `path`. Raises BadDataset if it is no COCO file at all."""
    document = read_json(path)
    _check_shape(document, path)
    annotations = Annotations(path)
    names = _categories(document, annotations)
    annotations.classes = tuple(names.values())
    boxes = _boxes(document, names, annotations)
    for entry in _entries(document, "images", annotations):
        name = entry.get("file_name")
        width, height = (_as_whole(entry.get(side)) for side in ("width", "height"))
        where = f"image {entry['id']}"
        if not is_inside(name):
            annotations.defect(
                "bad entry", f"{where}: file_name must be a path inside the image folder, is {name!r}"
            )
        elif not (_is_whole(width) and _is_whole(height) and width > 0 and height > 0):
            annotations.defect(
                "bad entry",
                f"{where} ({name}): width and height must be positive numbers of pixels,"
                f" are {width!r} and {height!r}",
            )
        else:
            fields = {k: v for k, v in entry.items() if k not in OWN_FIELDS and isinstance(v, str | int)}
            annotations.pictures.append(
                Picture(name, width, height, tuple(boxes.get(entry["id"], ())), fields, where)
            )
    return annotations


def write(pictures: Sequence[Picture], classes: Sequence[str], folder: Path) -> Path:
    """Write `folder`/annotations.json."""
    return write_file(pictures, classes, folder / FILE)


def write_file(pictures: Sequence[Picture], classes: Sequence[str], file: Path) -> Path:
    """Write one COCO file. Images and boxes are numbered from 1 in their order, classes in the order of `classes`."""
    category = {name: number for number, name in enumerate(classes, start=1)}
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(pictures, start=1):
        for box in picture.boxes:
            left, top, right, bottom = box.corners
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category[box.name],
                    "bbox": [round(value, 4) for value in (left, top, width, height)],
                    "area": round(width * height, 4),
                    "iscrowd": 0,
                }
            )
    document = {
        "images": [
            # what other formats call `id` must not take the place of ours, which the boxes refer to
            {**p.fields, "id": i, "file_name": p.name, "width": p.width, "height": p.height}
            for i, p in enumerate(pictures, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in category.items()],
    }
    return write_text(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _as_whole(value: Any) -> Any:
    """Some tools write 480.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_shape(document: object, path: Path) -> None:
    if not isinstance(document, dict):
        raise BadDataset(f"{path}: must be a COCO object with images, annotations and categories")
    for part in ("images", "annotations", "categories"):
        entries = document.get(part)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadDataset(f"{path}: {part!r} must be a list of objects, as in the COCO format")


def _entries(document: Mapping[str, Any], part: str, annotations: Annotations) -> Iterator[Any]:
    """The entries of a list, each of whose ids is a whole number that occurs once."""
    seen: set[int] = set()
    singular = {"images": "image", "annotations": "annotation", "categories": "category"}[part]
    for position, entry in enumerate(document[part]):
        number = entry.get("id")
        if not _is_whole(number):
            annotations.defect("bad entry", f"{part}[{position}]: id must be a whole number, is {number!r}")
        elif number in seen:
            annotations.defect("duplicate id", f"{singular} id {number} is there twice")
        else:
            seen.add(number)
            yield entry


def _categories(document: Mapping[str, Any], annotations: Annotations) -> dict[int, str]:
    """category id -> name."""
    names: dict[int, str] = {}
    for entry in _entries(document, "categories", annotations):
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            annotations.defect("bad entry", f"category {entry['id']}: name must be a text, is {name!r}")
        elif name in names.values():
            annotations.defect("duplicate id", f"category {entry['id']}: the name {name!r} is there twice")
        else:
            names[entry["id"]] = name
    return names


def _boxes(
    document: Mapping[str, Any], names: Mapping[int, str], annotations: Annotations
) -> dict[int, list[Box]]:
    """image id -> its boxes."""
    # also of images with a defect of their own, which is in the list already
    files = {
        entry["id"]: entry.get("file_name") for entry in document["images"] if _is_whole(entry.get("id"))
    }
    boxes: dict[int, list[Box]] = {}
    for entry in _entries(document, "annotations", annotations):
        image_id, category, bbox = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
        where = f"annotation {entry['id']}"
        if not _is_whole(image_id) or image_id not in files:
            annotations.defect("bad entry", f"{where}: image_id {image_id!r} is no image of this file")
            continue
        if entry.get("iscrowd") == 1:
            annotations.left_out["crowd regions"] = annotations.left_out.get("crowd regions", 0) + 1
            continue
        values = numbers(bbox)
        if not _is_whole(category) or category not in names:
            annotations.defect(
                "unknown class",
                f"{where} ({files[image_id]}): category_id {category!r} is no category of this file",
            )
        elif values is None:
            annotations.defect(
                "not a box", f"{where} ({files[image_id]}): bbox must be four finite numbers, is {bbox!r}"
            )
        else:
            x, y, width, height = values
            boxes.setdefault(image_id, []).append(Box(names[category], (x, y, x + width, y + height), where))
    return boxes


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
