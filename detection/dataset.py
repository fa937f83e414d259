"""A site's images and boxes, checked, and as a detector takes them.

Two sites may number the same class differently, so labels come from the class *name* alone: label i + 1 is
`classes[i]` of the job. Formats: detection/formats. A data set is used whole or not at all: every defect is collected,
and all are reported in one BadDataset (detection/check.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.annotations import Picture
from detection.cache import DiskCache, MemoryCache, Square
from detection.check import Checked, check
from detection.images import ImageFile, decode_square
from federation.errors import BadDataset

log = logging.getLogger("fedqueue.data")

DEFAULT_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class Item:
    """One image and its ground truth. `sha256` and `nbytes`: of the file as it was checked."""

    path: Path
    width: int
    height: int
    boxes: NDArray[np.float32]  # [N, 4] xyxy, pixels of the file
    labels: NDArray[np.int64]  # [N], 1..C
    sha256: str
    nbytes: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """Checked items in the order of the annotations."""

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    cache: MemoryCache[Tensor] = field(repr=False)
    disk: DiskCache | None = field(default=None, repr=False)

    def part(self, indices: Iterable[int]) -> Dataset:
        """Some of the items. Whole and parts share the caches, and so their bounds."""
        return replace(self, items=tuple(self.items[index] for index in indices))

    @property
    def num_examples(self) -> int:
        return len(self.items)

    @property
    def image_bytes(self) -> int:
        """What stays at home: the files' total size."""
        return sum(item.nbytes for item in self.items)

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
        """Image `index` resized to uint8 [3, side, side], channels last in memory; kept in the caches.

        Do not write to it. Raises BadDataset if the file has become unreadable, or another size than it had.
        """
        path = self.items[index].path
        square = self.cache.get(path, side)
        if square is None:
            square = _planes(self._read(index, side))
            self.cache.put(path, side, square)
        return square

    def _read(self, index: int, side: int) -> Square:
        item = self.items[index]
        if self.disk is not None and (kept := self.disk.get(item.sha256, side)) is not None:
            return kept
        square, file = decode_square(item.path, side)
        if (file.width, file.height) != (item.width, item.height):
            raise BadDataset(
                f"{item.path}: is {file.width}x{file.height} and was {item.width}x{item.height} when the data were"
                " checked: its boxes are wrong now"
            )
        if self.disk is not None:
            self.disk.put(file.sha256, side, square)
        return square


def read_square(path: Path, side: int) -> Tensor:
    """Decode an image file and resize it to uint8 [3, side, side]. Raises BadDataset."""
    return _planes(decode_square(path, side)[0])


def load_dataset(
    annotations: Path,
    images: Path | None,
    classes: Sequence[str],
    *,
    format: str | None = None,
    others: Collection[str] = (),
    cache: MemoryCache[Tensor] | None = None,
    disk: DiskCache | None = None,
) -> Dataset:
    """Read and check the data set `annotations` whose images lie below the folder `images`.

    `classes` are the job's, in its order; `others` those that the data have besides (detection/check.py). Folder and
    format are found out if they are not given. Every file is decoded once, so that a truncated one is found now and not
    in the middle of training, unless `disk` holds it already. `cache` keeps decoded squares in memory; None: one of
    DEFAULT_CACHE_BYTES. What the owner should know is logged.

    Raises BadDataset listing every defect with its file and annotation: images that are missing, unreadable, of another
    size than declared, or listed twice; ids given twice; annotations of unknown images or classes;
    boxes outside their image (more than 1 px; less is clipped) or without area; a data set without images or
    boxes. An image without boxes is no defect: it teaches what is background.
    """
    known: Callable[[str], bool] = (lambda sha256: False) if disk is None else disk.__contains__
    checked = check(annotations, images, classes, format=format, others=others, known=known).require()
    for note in checked.notes:
        log.warning("%s: %s", annotations, note)
    if disk is not None:
        disk.reserve(file.sha256 for file in checked.files)
    return Dataset(
        checked.classes,
        checked_items(checked),
        MemoryCache(DEFAULT_CACHE_BYTES) if cache is None else cache,
        disk,
    )


def checked_items(checked: Checked) -> tuple[Item, ...]:
    """The pictures of `checked` with labels in the order of its classes."""
    labels = {name: label for label, name in enumerate(checked.classes, start=1)}
    return tuple(
        _item(checked.images, picture, file, labels)
        for picture, file in zip(checked.pictures, checked.files, strict=True)
    )


def _item(images: Path, picture: Picture, file: ImageFile, labels: dict[str, int]) -> Item:
    return Item(
        path=images / picture.name,
        width=file.width,
        height=file.height,
        boxes=np.array([box.corners for box in picture.boxes], np.float32).reshape(-1, 4),
        labels=np.array([labels[box.name] for box in picture.boxes], np.int64),
        sha256=file.sha256,
        nbytes=file.nbytes,
    )


def _planes(square: Square) -> Tensor:
    """[3, side, side] with the channels last in memory, which resizes twice as fast."""
    return torch.from_numpy(square).permute(2, 0, 1)
