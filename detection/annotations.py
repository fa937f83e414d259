"""Labelled pictures as every annotation format is read into, and written from.

One convention: boxes are (left, top, right, bottom) in pixels of the image file, with 0, 0 the upper left corner of
the upper left pixel, so that a whole image of W x H is (0, 0, W, H); classes are names, never numbers; pictures are
named by their path below the image folder, with "/".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path, PurePosixPath

ROUNDING_PX = 1.0
"""Annotation tools round: a box may stick out by this much and is clipped."""

Corners = tuple[float, float, float, float]
"""xyxy, pixels."""


@dataclass(frozen=True, slots=True)
class Box:
    """One labelled object. `where`: its place in the annotation file, for messages, as in "annotation 17"."""

    name: str
    corners: Corners
    where: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and its boxes. Without width and height (pixels) where the format does not declare them.

    `fields` are what the annotations say about the image beside that, such as the camera's id. `where` is its
    place in the annotations, as in "image 17".
    """

    name: str
    width: int | None
    height: int | None
    boxes: tuple[Box, ...]
    fields: Mapping[str, str | int] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, slots=True)
class Defect:
    """What is wrong with one thing in one file. `kind` is one of a few phrases, to count by."""

    kind: str
    file: Path
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass(eq=False)
class Annotations:
    """What a reader found. `classes`: the names that the format lists, or those that occur, in its order.

    A reader adds a defect for what it cannot take over and leaves that out; whether boxes, files and classes are
    right is not its business (detection/check.py). `left_out` counts, in words, what is not an object on purpose.
    """

    file: Path
    classes: tuple[str, ...] = ()
    pictures: list[Picture] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def defect(self, kind: str, message: str, file: Path | None = None) -> None:
        """Note a defect, of the annotation file unless another is named."""
        self.defects.append(Defect(kind, file or self.file, message))


def numbers(values: object) -> list[float] | None:
    """`values` as floats if it is a list of four finite numbers."""
    if not isinstance(values, list) or len(values) != 4 or not all(_is_finite_number(v) for v in values):
        return None
    return [float(value) for value in values]


def _is_finite_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number of JSON may have any number of digits
        return False


def is_inside(name: object) -> bool:
    """True if `name` is a relative path that cannot lead out of the folder that it is relative to."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def clipped(corners: Corners, width: int, height: int) -> tuple[Corners, str, str]:
    """The box within its image, and the kind and words of what is wrong with it (empty if nothing)."""
    left, top, right, bottom = corners
    shown = f"box ({left:g}, {top:g}, {right:g}, {bottom:g})"
    if not all(isfinite(value) for value in corners):
        return corners, "not a box", f"{shown} must be four finite numbers"
    if right <= left or bottom <= top:
        return corners, "box without area", f"{shown} has no area"
    if min(left, top) < -ROUNDING_PX or right > width + ROUNDING_PX or bottom > height + ROUNDING_PX:
        return corners, "box outside", f"{shown} lies outside its image of {width}x{height}"
    inner = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    if inner[2] <= inner[0] or inner[3] <= inner[1]:
        return corners, "box without area", f"{shown} has no area inside its image of {width}x{height}"
    return inner, "", ""
