"""Annotated copies of images and videos in a folder, under the names that the inputs have below theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.inputs import Input

if TYPE_CHECKING:
    from detection.evaluate import Found
    from detection.frames import Frame, VideoFile

JPEG_QUALITY = 90
"""A PNG would take ten times as long to write as its objects to detect."""
FRAMES_PER_S = 25
"""Assumed of a video that does not say when a frame is shown."""


def picture_name(item: Input) -> str:
    """What the annotated copy of `item` is called. Formats that it changes stay visible: a.png -> a.png.jpg."""
    from detection.frames import is_video

    suffix = item.path.suffix.lower()
    if is_video(item.path):
        return item.name if suffix == ".mp4" else f"{item.name}.mp4"
    return item.name if suffix in (".jpg", ".jpeg") else f"{item.name}.jpg"


class AnnotatedCopies:
    """A context manager, because the last video is finished at the end. Methods raise OSError.

    font: for class names in a script that the usual font lacks.
    """

    def __init__(
        self, folder: Path, inputs: Sequence[Input], classes: Sequence[str], font: Path | None
    ) -> None:
        self._folder, self._classes, self._font = folder, classes, font
        self._names = {item.path: picture_name(item) for item in inputs}
        self._video: tuple[Path, VideoFile] | None = None

    def add(self, frame: Frame, found: Found) -> str:
        """Draw and write; returns the file's name below the folder. Frames of a video come one after another.

        Raises BadDataset if the image cannot be read any more.
        """
        from detection.draw import DRAWN_WIDTH, draw

        name = self._names[frame.path]
        drawn = draw(
            frame.original(), found, self._classes, width=max(DRAWN_WIDTH, frame.width), font_file=self._font
        )
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if frame.index is None:
            drawn.save(target, "JPEG", quality=JPEG_QUALITY)
        else:
            time_s = frame.index / FRAMES_PER_S if frame.time_s is None else frame.time_s
            self._video_of(frame.path, target).add(drawn, time_s)
        return name

    def _video_of(self, source: Path, target: Path) -> VideoFile:
        from detection.frames import VideoFile

        if self._video is None or self._video[0] != source:
            self._finish()
            self._video = source, VideoFile(target)
        return self._video[1]

    def _finish(self) -> None:
        if self._video is not None:
            self._video[1].close()
        self._video = None

    def __enter__(self) -> AnnotatedCopies:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finish()
