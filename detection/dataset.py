"""A site's images and boxes, read from one COCO file and a folder of images, and checked before use.

    {"images": [{"id": 1, "file_name": "000001.jpg", "width": 480, "height": 392}, …],
     "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [x, y, width, height]}, …],
     "categories": [{"id": 3, "name": "chair"}, …]}

https://cocodataset.org/#format-data. Other fields are ignored. Two sites may number the same class
differently, so labels come from the class *name* alone: label i + 1 is `classes[i]` of the job.

A data set is used whole or not at all: every defect is collected and all are reported in one BadDataset.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from federation.errors import BadDataset

MAX_REPORTED_DEFECTS = 50
ROUNDING_PX = 1.0
"""Annotation tools round: a box may stick out by this much and is clipped."""
DEFAULT_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class Item:
    """One image and its ground truth."""

    path: Path
    width: int
    height: int
    boxes: NDArray[np.float32]  # [N, 4] xyxy, pixels of the file
    labels: NDArray[np.int64]  # [N], 1..C


@dataclass(eq=False)
class PixelCache:
    """Decoded squares. Keeps what fits and evicts nothing: under random access over more images than fit, an
    evicting cache would miss nearly every time."""

    limit_bytes: int
    used_bytes: int = 0
    squares: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Checked items in the order of the file. `image_bytes` is what stays at home: the files' total size."""

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    image_bytes: int
    cache: PixelCache = field(repr=False)

    @property
    def num_examples(self) -> int:
        return len(self.items)

    @property
    def num_boxes(self) -> int:
        return sum(len(item.boxes) for item in self.items)

    def boxes_per_class(self) -> dict[str, int]:
        """Ground-truth boxes by class name; classes without any have 0."""
        counts = np.bincount(
            np.concatenate([item.labels for item in self.items]), minlength=len(self.classes) + 1
        )
        return {name: int(counts[i + 1]) for i, name in enumerate(self.classes)}

    def square(self, index: int, side: int) -> Tensor:
        """Image `index` resized to uint8 [3, side, side], from memory after the first time.

        Do not write to it. Raises BadDataset if the file has become unreadable.
        """
        cached = self.cache.squares.get((index, side))
        if cached is not None:
            return cached
        square = read_square(self.items[index].path, side)
        if self.cache.used_bytes + square.nbytes <= self.cache.limit_bytes:
            self.cache.squares[(index, side)] = square
            self.cache.used_bytes += square.nbytes
        return square


def read_square(path: Path, side: int) -> Tensor:
    """Decode an image file and resize it to uint8 [3, side, side]. Raises BadDataset."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
        raise BadDataset(f"{path}: cannot be read as an image ({exc}): replace the file") from exc
    # [3, H, W] with the channels last in memory, which resizes twice as fast
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_dataset(
    annotations: Path,
    images: Path,
    classes: Sequence[str],
    *,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Dataset:
    """Read and check the COCO file `annotations` whose images lie in the folder `images`.

    `classes` are the job's, in its order. Every file is decoded once, so that a truncated one is found now
    and not in the middle of training. `cache_bytes` bounds the decoded squares kept in memory.

    Raises BadDataset listing every defect with its file and annotation id: images that are missing,
    unreadable or of another size than declared; ids given twice; annotations of unknown images or classes;
    boxes outside their image (more than 1 px; less is clipped) or without area; a data set without images or
    boxes. An image without boxes is no defect: it teaches what is background.
    """
    document = _read_json(annotations)
    defects: list[str] = []
    records = _images(document, annotations, defects)
    labels = _labels(document, annotations, tuple(classes), defects)
    boxes = _boxes(document, annotations, records, labels, defects)
    items: list[Item] = []
    image_bytes = 0
    for image_id, (name, width, height) in records.items():
        path = images / name
        defect = _image_defect(path, width, height)
        if defect:
            defects.append(f"image {image_id}: {defect}")
            continue
        image_bytes += path.stat().st_size
        own = boxes.get(image_id, [])
        items.append(
            Item(
                path=path,
                width=width,
                height=height,
                boxes=np.array([box for box, _ in own], np.float32).reshape(-1, 4),
                labels=np.array([label for _, label in own], np.int64),
            )
        )
    if not records:
        defects.append(f"{annotations}: lists no images: a site needs at least one")
    if not document.get("annotations"):
        defects.append(f"{annotations}: holds no boxes: a site needs at least one")
    if defects:
        raise BadDataset(_report(annotations, defects))
    return Dataset(tuple(classes), tuple(items), image_bytes, PixelCache(cache_bytes))


def _report(annotations: Path, defects: list[str]) -> str:
    shown = defects[:MAX_REPORTED_DEFECTS]
    more = len(defects) - len(shown)
    lines = [f"{annotations}: {len(defects)} defects, correct them and try again:", *shown]
    if more:
        lines.append(f"… and {more} more")
    return "\n  ".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as exc:
        raise BadDataset(f"{path}: cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadDataset(f"{path}: is not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise BadDataset(f"{path}: must be a COCO object with images, annotations and categories")
    for part in ("images", "annotations", "categories"):
        entries = document.get(part)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadDataset(f"{path}: {part!r} must be a list of objects, as in the COCO format")
    return document


def _entries(document: Mapping[str, Any], part: str, file: Path, defects: list[str]) -> Iterator[Any]:
    """The entries of a list, each of whose ids is a whole number that occurs once."""
    seen: set[int] = set()
    singular = {"images": "image", "annotations": "annotation", "categories": "category"}[part]
    for position, entry in enumerate(document[part]):
        number = entry.get("id")
        if not isinstance(number, int) or isinstance(number, bool):
            defects.append(f"{file}: {part}[{position}]: id must be a whole number, is {number!r}")
        elif number in seen:
            defects.append(f"{file}: {singular} id {number} is there twice")
        else:
            seen.add(number)
            yield entry


def _images(document: Mapping[str, Any], file: Path, defects: list[str]) -> dict[int, tuple[str, int, int]]:
    """image id -> file name, width, height."""
    records: dict[int, tuple[str, int, int]] = {}
    for entry in _entries(document, "images", file, defects):
        name, width, height = entry.get("file_name"), entry.get("width"), entry.get("height")
        where = f"{file}: image {entry['id']}"
        if not isinstance(name, str) or not name or _leaves_folder(name):
            defects.append(f"{where}: file_name must be a path inside the image folder, is {name!r}")
        elif not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
            defects.append(
                f"{where} ({name}): width and height must be positive numbers of pixels,"
                f" are {width!r} and {height!r}"
            )
        else:
            records[entry["id"]] = (name, width, height)
    return records


def _leaves_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _labels(
    document: Mapping[str, Any], file: Path, classes: tuple[str, ...], defects: list[str]
) -> dict[int, int | str]:
    """category id -> label, or the name if the job has no such class."""
    known: dict[int, int | str] = {}
    for entry in _entries(document, "categories", file, defects):
        name = entry.get("name")
        known[entry["id"]] = classes.index(name) + 1 if name in classes else str(name)
    return known


def _boxes(
    document: Mapping[str, Any],
    file: Path,
    records: Mapping[int, tuple[str, int, int]],
    labels: Mapping[int, int | str],
    defects: list[str],
) -> dict[int, list[tuple[list[float], int]]]:
    """image id -> its boxes (xyxy, pixels) with their labels."""
    declared = {entry.get("id") for entry in document["images"] if isinstance(entry.get("id"), int)}
    boxes: dict[int, list[tuple[list[float], int]]] = {}
    for entry in _entries(document, "annotations", file, defects):
        where = f"{file}: annotation {entry['id']}"
        image_id, category = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image_id, int) or image_id not in declared:
            defects.append(f"{where}: image_id {image_id!r} is no image of this file")
            continue
        if image_id not in records:
            continue  # that image's own defect is in the list
        name, width, height = records[image_id]
        label = labels.get(category) if isinstance(category, int) else None
        if label is None:
            defects.append(f"{where} ({name}): category_id {category!r} is no category of this file")
            continue
        if isinstance(label, str):
            defects.append(f"{where} ({name}): class {label!r} is not one of the job's")
            continue
        box, defect = _box(entry.get("bbox"), width, height)
        if defect:
            defects.append(f"{where} ({name}): {defect}")
        else:
            boxes.setdefault(image_id, []).append((box, label))
    return boxes


def _box(bbox: object, width: int, height: int) -> tuple[list[float], str]:
    """COCO's [x, y, width, height] as a clipped xyxy, or what is wrong with it."""
    values = bbox if isinstance(bbox, list) else []
    if len(values) != 4 or not all(_is_finite_number(value) for value in values):
        return [], f"bbox must be four finite numbers, is {bbox!r}"
    x, y, w, h = (float(value) for value in values)
    if w <= 0 or h <= 0:
        return [], f"box {bbox} has no area"
    if min(x, y) < -ROUNDING_PX or x + w > width + ROUNDING_PX or y + h > height + ROUNDING_PX:
        return [], f"box {bbox} lies outside its image of {width}x{height}"
    box = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    if box[2] - box[0] <= 0 or box[3] - box[1] <= 0:
        return [], f"box {bbox} has no area inside its image of {width}x{height}"
    return box, ""


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _image_defect(path: Path, width: int, height: int) -> str:
    """What is wrong with an image file, in words; empty if nothing."""
    if not path.is_file():
        return f"{path}: there is no such file"
    try:
        with warnings.catch_warnings():
            # a very large image is unusual, not wrong
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                size = image.size
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
        return f"{path}: cannot be read as an image ({exc})"
    if size != (width, height):
        return f"{path}: is {size[0]}x{size[1]}, declared as {width}x{height}"
    return ""
