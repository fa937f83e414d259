"""Annotation formats, one module each: `read(path, images)`, `write(pictures, classes, folder)`.

    coco     one JSON file, an object with images, annotations, categories
    voc      Pascal VOC: a folder of XML files, or the folder above its `Annotations`
    yolo     YOLO and Darknet text: the folder of data.yaml or classes.txt, or data.yaml itself
    street   the original Federated Street: one JSON file, a list

All are read into detection/annotations.py's convention. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.annotations import Annotations, Picture
from detection.formats import coco, street, voc, yolo
from detection.images import image_files
from federation.errors import BadDataset

Read = Callable[[Path, Path | None], Annotations]
Write = Callable[[Sequence[Picture], Sequence[str], Path], Path]


@dataclass(frozen=True)
class Format:
    """`images`: the folder beside the annotations into which the images of a new data set go."""

    read: Read
    write: Write
    images: str = "images"


FORMATS = {
    "coco": Format(coco.read, coco.write),
    "voc": Format(voc.read, voc.write, voc.IMAGES),
    "yolo": Format(yolo.read, yolo.write),
    "street": Format(street.read, street.write),
}

_HOW_TO_NAME = "name it with --format (or the setting …_FORMAT): " + ", ".join(FORMATS)


@dataclass(frozen=True)
class Source:
    """Where annotations are and in which format."""

    format: str
    path: Path


def locate(path: Path, format: str | None = None) -> Source:
    """The format of a file or folder by what is in it; in a folder, the one JSON file there is.

    Raises BadDataset listing the candidates if there are several, and what was looked for if there is none.
    """
    if format is not None and format not in FORMATS:
        raise BadDataset(f"there is no format {format!r}; there are: {', '.join(FORMATS)}")
    if not path.exists():
        raise BadDataset(f"{path}: cannot be read: there is no such file or folder")
    candidates = _in_file(path) if path.is_file() else _in_folder(path)
    if format is not None:
        fitting = [source for source in candidates if source.format == format]
        # a file or folder that was named is what was meant, whatever it looks like
        candidates = fitting or (
            [Source(format, path)] if path.is_file() or format in ("voc", "yolo") else []
        )
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        listed = "; ".join(f"{source.format} ({source.path})" for source in candidates)
        raise BadDataset(
            f"{path}: could be several data sets: {listed}: name the file, or the format with --format"
        )
    raise BadDataset(
        f"{path}: no annotations were recognised: a COCO or Federated Street file ends in .json, a folder of Pascal VOC"
        " holds .xml files or Annotations/, one of YOLO holds data.yaml, classes.txt or obj.names;"
        f" {_HOW_TO_NAME}"
    )


def find_images(source: Source) -> Path:
    """The image folder of annotations that were found without one, by the formats' customs.

    Raises BadDataset that says where was looked.
    """
    path = source.path
    folder = path.parent if path.is_file() else path
    if source.format == "yolo" and path.is_file() and (train := yolo.train_images(path)) is not None:
        return train
    if source.format == "yolo" and yolo.LABELS in folder.parts:
        parts = list(folder.parts)
        parts[len(parts) - 1 - parts[::-1].index(yolo.LABELS)] = yolo.IMAGES
        if Path(*parts).is_dir():
            return Path(*parts)
    names = (voc.IMAGES, "images") if source.format == "voc" else ("images",)
    above = [folder, folder.parent, folder.parent.parent]
    if source.format == "yolo":
        above = [folder]
    tried = [place / name for place in above for name in names]
    for candidate in tried:
        if candidate.is_dir():
            return candidate
    if image_files(folder):
        return folder
    listed = ", ".join(str(place) for place in tried)
    raise BadDataset(f"{path}: its images were not found ({listed}): name their folder with --images")


def _in_file(path: Path) -> list[Source]:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return [Source("yolo", path)]
    if suffix == ".json":
        return [Source(_json_format(path), path)]
    return []


def _json_format(path: Path) -> str:
    """By the first bracket: what is wrong with the rest is for the reader to say."""
    try:
        with path.open("rb") as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as exc:
        raise BadDataset(f"{path}: cannot be read: {exc.strerror}") from exc
    return "street" if start.startswith(b"[") else "coco"


def _in_folder(path: Path) -> list[Source]:
    documents = sorted(path.glob("*.json")) or sorted((path / "annotations").glob("*.json"))
    found = [Source(_json_format(file), file) for file in documents]
    if (path / voc.ANNOTATIONS).is_dir() or any(path.glob("*.xml")):
        found.append(Source("voc", path))
    if yolo.has_names(path):
        found.append(Source("yolo", path))
    return found
