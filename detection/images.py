"""Image files: finding them, looking at them, decoding them to what a detector takes."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from federation.errors import BadDataset

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
REDUCING_GAP = 1
"""A JPEG is decoded at a half, quarter or eighth of its size if that is at least this many times what is wanted. With 1
1920x1080 takes half the time, and the pixels of a square differ by 0.4 of 255 in the mean."""
_ORIENTATION = 0x0112  # EXIF; 1 is upright
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What files may be, whatever they are called; MPO is a JPEG. Of the others that Pillow knows one runs Ghostscript."""
NOT_AN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that was looked at: pixels, bytes, content. `upright` is False if a JPEG's EXIF tells viewers to
    turn it."""

    width: int
    height: int
    nbytes: int
    sha256: str
    upright: bool


def image_files(folder: Path) -> list[str]:
    """Paths of all image files below `folder`, by suffix, relative to it with "/", sorted. Hidden ones are not."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def header_size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels from the file's header; None if it is not a readable image."""
    try:
        with _quiet(), Image.open(path, formats=FORMATS) as image:
            return image.size
    except NOT_AN_IMAGE:
        return None


def inspect(path: Path, known: Callable[[str], bool] = lambda sha256: False) -> ImageFile:
    """Look at a file, down to its last pixel, because a truncated one is found only so.

    A content that was decoded before, which `known` says of a sha256, is not decoded again. Raises BadDataset that
    says what is wrong.
    """
    with _opened(path) as (data, image):
        file = _describe(data, image)
        if not known(file.sha256):
            image.load()
    return file


def decode_square(path: Path, side: int) -> tuple[NDArray[np.uint8], ImageFile]:
    """The image resized to uint8 [side, side, 3], RGB, and what file it was. Raises BadDataset."""
    with _opened(path) as (data, image):
        file = _describe(data, image)
        image.draft("RGB", (REDUCING_GAP * side, REDUCING_GAP * side))
        pixels = np.array(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    return pixels, file


def _describe(data: bytes, image: Image.Image) -> ImageFile:
    # of a JPEG alone: it is cameras that turn images so, and a PNG would be decoded to find it
    upright = image.format not in ("JPEG", "MPO") or orientation(image) == 1
    return ImageFile(image.width, image.height, len(data), hashlib.sha256(data).hexdigest(), upright)


def orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where there is none. What cannot be parsed is no reason to refuse the picture."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1


def require_eight_bits(image: Image.Image) -> None:
    """Raises ValueError for a picture, such as a thermal camera's, of which Pillow would make all above 255 white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"more than 8 bits a pixel, mode {image.mode}: only the camera's owner knows which values matter; "
            "make an 8-bit picture of them"
        )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[bytes, Image.Image]]:
    data = _read(path)
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            require_eight_bits(image)
            yield data, image
    except NOT_AN_IMAGE as exc:
        raise BadDataset(f"{path}: cannot be read as an image ({exc}): replace the file") from exc


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise BadDataset(f"{path}: there is no such file") from exc
    except OSError as exc:
        raise BadDataset(f"{path}: cannot be read: {exc.strerror}") from exc


def _quiet() -> warnings.catch_warnings[None]:
    """A very large image, or an odd header, is unusual and not wrong."""
    return warnings.catch_warnings(action="ignore")
