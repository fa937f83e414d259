"""Is a data set fit for training? Every defect is found before the first step, not in the middle of the night.

Annotations of any format are read, every image file is decoded once, and every box is judged. What makes a data set
unusable is a *defect*; what its owner should know, but may be as intended, is a *note*: classes without boxes, files
that nothing refers to, the same image under two names.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path

from detection import formats, images
from detection.annotations import Annotations, Box, Defect, Picture, clipped
from detection.formats import Source
from detection.images import ImageFile
from federation.errors import BadDataset

MAX_REPORTED_DEFECTS = 50
MAX_NAMED = 5
"""Files that a note names before it only counts."""


@dataclass(frozen=True, eq=False)
class Checked:
    """A data set that was looked at: `pictures` whose file is good, with their size and their good boxes, clipped.

    `files[i]` is the file of `pictures[i]`. Usable if there are no defects.
    """

    source: Source
    images: Path
    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    files: tuple[ImageFile, ...]
    defects: tuple[Defect, ...]
    notes: tuple[str, ...]

    def require(self) -> Checked:
        """Itself. Raises BadDataset with every defect."""
        if not self.defects:
            return self
        count = len(self.defects)
        shown = [str(defect) for defect in self.defects[:MAX_REPORTED_DEFECTS]]
        more = [f"… and {count - len(shown)} more"] if count > len(shown) else []
        raise BadDataset(
            "\n  ".join([f"{self.source.path}: {count} defects, correct them and try again:", *shown, *more])
        )


def check(
    path: Path,
    image_folder: Path | None = None,
    classes: Sequence[str] | None = None,
    *,
    format: str | None = None,
    others: Collection[str] = (),
    known: Callable[[str], bool] = lambda sha256: False,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read the annotations `path` and look at every image below `image_folder`.

    Folder and format are found out where they are not given. `classes`: those of the job; without, the data set's
    own. `others`: classes that are meant to be there and are not the job's; their boxes are left out, unless the name
    differs from one of the job's in capitals alone. `known` may vouch for a file, by its sha256, that was decoded
    before. `on_picture` is told how many of how many are done.

    Raises BadDataset if `path` is no data set at all; what is wrong within one is listed in the result.
    """
    source = formats.locate(path, format)
    folder = image_folder if image_folder is not None else formats.find_images(source)
    if not folder.is_dir():
        raise BadDataset(f"{folder}: is not a folder: --images must name the one that the images lie in")
    annotations = formats.FORMATS[source.format].read(source.path, folder)
    wanted = tuple(classes) if classes is not None else annotations.classes
    judge = _Judge(annotations, folder, wanted, frozenset(others), known)
    for done, picture in enumerate(annotations.pictures, start=1):
        judge.look_at(picture)
        on_picture(done, len(annotations.pictures))
    judge.conclude()
    return Checked(
        source=source,
        images=folder,
        classes=wanted,
        pictures=tuple(judge.pictures),
        files=tuple(judge.files),
        defects=tuple(annotations.defects),
        notes=tuple(judge.notes),
    )


def classes_of(path: Path, image_folder: Path | None = None, *, format: str | None = None) -> frozenset[str]:
    """The classes that boxes of the data set have; no image is looked at. Raises BadDataset if it is none at all."""
    source = formats.locate(path, format)
    folder = image_folder if image_folder is not None else formats.find_images(source)
    pictures = formats.FORMATS[source.format].read(source.path, folder).pictures
    return frozenset(box.name for picture in pictures for box in picture.boxes)


class _Judge:
    """Looks at one picture after the other and remembers what only shows across several."""

    def __init__(
        self,
        annotations: Annotations,
        folder: Path,
        classes: tuple[str, ...],
        others: frozenset[str],
        known: Callable[[str], bool],
    ) -> None:
        self.annotations, self.folder, self.classes, self.known = annotations, folder, classes, known
        alike = {name.casefold() for name in classes}
        self._others = {name for name in others if name.casefold() not in alike}
        self.pictures: list[Picture] = []
        self.files: list[ImageFile] = []
        self.notes: list[str] = []
        self._names: set[str] = set()
        self._content: dict[str, Picture] = {}
        self._copies: list[str] = []
        self._contradictions: list[str] = []
        self._turned: list[str] = []
        self._repeated = 0

    def look_at(self, picture: Picture) -> None:
        note = self.annotations.defect
        path = self.folder / picture.name
        at = f"{picture.where}: " if picture.where else ""
        if picture.name in self._names:
            note("duplicate image", f"{at}{picture.name} is listed twice")
            return
        self._names.add(picture.name)
        if not isfile(path):  # Path.is_file raises for a name that is too long
            note("missing image", f"{at}{path}: there is no such file")
            return
        try:
            file = images.inspect(path, self.known)
        except BadDataset as exc:
            note("unreadable image", f"{at}{exc}")
            return
        declared = (picture.width or file.width, picture.height or file.height)
        if declared != (file.width, file.height):
            declared_size, size = f"{declared[0]}x{declared[1]}", f"{file.width}x{file.height}"
            note("size mismatch", f"{at}{path}: is {size}, declared as {declared_size}")
            return
        if not file.upright:
            self._turned.append(picture.name)
        good = replace(
            picture, width=file.width, height=file.height, boxes=self._boxes(picture, file.width, file.height)
        )
        self._compare(good, file)
        self.pictures.append(good)
        self.files.append(file)

    def _boxes(self, picture: Picture, width: int, height: int) -> tuple[Box, ...]:
        boxes: list[Box] = []
        for box in picture.boxes:
            where = f"{box.where} ({picture.name})"
            if box.name not in self.classes and box.name in self._others:
                what = "boxes of classes that the job does not have"
                self.annotations.left_out[what] = self.annotations.left_out.get(what, 0) + 1
                continue
            if box.name not in self.classes:
                self.annotations.defect(
                    "unknown class",
                    f"{where}: class {box.name!r} is not one of the job's{self._near(box.name)}",
                )
                continue
            corners, kind, message = clipped(box.corners, width, height)
            if kind:
                self.annotations.defect(kind, f"{where}: {message}")
            else:
                boxes.append(replace(box, corners=corners))
        self._repeated += len(boxes) - len({(box.name, box.corners) for box in boxes})
        return tuple(boxes)

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name.lower(), [c.lower() for c in self.classes], 1)
        return "".join(f" (is {c!r} meant?)" for c in self.classes if [c.lower()] == near)

    def _compare(self, picture: Picture, file: ImageFile) -> None:
        """The same bytes under two names count twice in training; with other boxes they contradict each other."""
        first = self._content.setdefault(file.sha256, picture)
        if first is picture:
            return
        same = Counter((b.name, b.corners) for b in first.boxes) == Counter(
            (b.name, b.corners) for b in picture.boxes
        )
        (self._copies if same else self._contradictions).append(f"{picture.name} = {first.name}")

    def conclude(self) -> None:
        """Judge the whole, and put the notes into words."""
        annotations = self.annotations
        if not annotations.pictures:
            annotations.defect("empty", "lists no images: a site needs at least one")
        if not any(picture.boxes for picture in annotations.pictures):
            annotations.defect("empty", "holds no boxes: a site needs at least one")
        occurring = {box.name for picture in self.pictures for box in picture.boxes}
        missing = [name for name in self.classes if name not in occurring]
        unlisted = [name for name in images.image_files(self.folder) if name not in self._names]
        if missing and occurring:
            self.notes.append(f"no boxes of {_some(missing, len(missing))}: this data set cannot teach them")
        if unlisted:
            self.notes.append(
                f"{len(unlisted)} image files have no annotations and are not used: {_some(unlisted)}"
            )
        if self._copies:
            self.notes.append(
                f"{len(self._copies)} images are there twice, byte for byte: {_some(self._copies)}"
            )
        if self._contradictions:
            self.notes.append(
                f"{len(self._contradictions)} images are another's copy, byte for byte, but have other boxes, and so"
                f" contradict each other: {_some(self._contradictions)}"
            )
        if self._repeated:
            self.notes.append(f"{self._repeated} boxes are there twice, with the same class and corners")
        if self._turned:
            self.notes.append(
                f"{len(self._turned)} images are turned by EXIF, which is not followed: boxes must fit the pixels as"
                f" stored: {_some(self._turned)}"
            )
        for what, count in annotations.left_out.items():
            self.notes.append(f"{count} {what} are left out")


def _some(names: Sequence[str], limit: int = MAX_NAMED) -> str:
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")
