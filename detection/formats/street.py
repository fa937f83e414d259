"""The original Federated Street JSON, one file for all images (Luo et al. 2019, arXiv 1910.11089).

    [{"image_id": "000001", "device1_id": 3, "device2_id": 1,
      "items": [{"class": "chair", "bbox": [xmin, ymin, xmax, ymax]}, …]}, …]

The image is the one file below the image folder that is called `image_id` without its suffix. Its size is not declared
and is read from the file. Plain fields of an image, such as the device ids, are kept; test files have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.annotations import Annotations, Box, Picture, is_inside, numbers
from detection.formats.files import read_json, require_unique_stems, without_suffix, write_text
from detection.images import header_size, image_files
from federation.errors import BadDataset

FILE = "street.json"


def read(path: Path, images: Path | None) -> Annotations:
    """Read the file `path`. Raises BadDataset if it is no Federated Street file at all."""
    document = read_json(path)
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise BadDataset(f"{path}: must be a list of objects with image_id and items (Federated Street)")
    annotations = Annotations(path)
    files: dict[str, list[str]] = {}
    for name in image_files(images) if images is not None else ():
        files.setdefault(without_suffix(name), []).append(name)
    seen: set[str] = set()
    for position, entry in enumerate(document):
        image_id = entry.get("image_id")
        image_id = str(image_id) if isinstance(image_id, int) else image_id
        if not isinstance(image_id, str) or not is_inside(image_id):
            annotations.defect(
                "bad entry", f"entry {position}: image_id must name an image, is {entry.get('image_id')!r}"
            )
        elif image_id in seen:
            annotations.defect("duplicate id", f"image_id {image_id!r} is there twice")
        else:
            seen.add(image_id)
            picture = _picture(entry, image_id, files.get(image_id, []), images, annotations)
            if picture is not None:
                annotations.pictures.append(picture)
    annotations.classes = tuple(sorted({box.name for p in annotations.pictures for box in p.boxes}))
    return annotations


def write(pictures: Sequence[Picture], classes: Sequence[str], folder: Path) -> Path:
    """Write `folder`/street.json, coordinates to 1/10,000 pixel."""
    require_unique_stems(picture.name for picture in pictures)
    document = [
        {
            **picture.fields,  # before ours, of which none may be overwritten
            "image_id": without_suffix(picture.name),
            "items": [
                {"class": box.name, "bbox": [round(value, 4) for value in box.corners]}
                for box in picture.boxes
            ],
        }
        for picture in pictures
    ]
    return write_text(folder / FILE, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _picture(
    entry: dict[str, Any], image_id: str, files: list[str], images: Path | None, annotations: Annotations
) -> Picture | None:
    where = f"image {image_id}"
    if len(files) > 1:
        annotations.defect("duplicate image", f"{where}: {' and '.join(files)} have this name: keep one")
        return None
    items = entry.get("items")
    if not isinstance(items, list):
        annotations.defect("bad entry", f"{where}: items must be a list, is {items!r}")
        return None
    boxes = []
    for number, item in enumerate(items, start=1):
        at = f"{where}, item {number}"
        name, values = (
            (item.get("class"), numbers(item.get("bbox"))) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(name, str) or not name:
            annotations.defect("unknown class", f"{at}: class must be a name, is {name!r}")
        elif values is None:
            annotations.defect(
                "not a box", f"{at}: bbox must be four finite numbers, is {item.get('bbox')!r}"
            )
        else:
            left, top, right, bottom = values
            boxes.append(Box(name, (left, top, right, bottom), f"item {number}"))
    fields = {k: v for k, v in entry.items() if k not in ("image_id", "items") and isinstance(v, str | int)}
    name = files[0] if files else f"{image_id}.jpg"
    size = header_size(images / name) if images is not None and files else None
    width, height = size or (None, None)
    return Picture(name, width, height, tuple(boxes), fields, where)
