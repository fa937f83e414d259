"""Pictures to detect in: image files, and frames of video files, upright, one at a time.

A camera or phone that is held sideways stores the picture as its sensor lies and notes how to turn it (EXIF
orientation; the display matrix of a video). Here pictures are turned as every viewer does. Training does not:
COCO's boxes are in the pixels as they are stored.

Videos are read by PyAV, FFmpeg's libraries, which is an extra.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from detection.images import FORMATS, NOT_AN_IMAGE, REDUCING_GAP, orientation, require_eight_bits
from federation.errors import BadDataset, BadSettings

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = frozenset(
    {".avi", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
_Turn = Image.Transpose
_EXIF_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_SIDEWAYS = {_Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE, _Turn.ROTATE_90}
_VIDEO_TURNS = {90: _Turn.ROTATE_90, 180: _Turn.ROTATE_180, 270: _Turn.ROTATE_270}  # counter-clockwise
_CLOCK = Fraction(1, 90_000)  # MPEG's own, in which every usual frame rate is a whole number of ticks


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture in RGB. `width` and `height` in pixels are of the upright original; `image` may be smaller, so that
    many can be held.

    `turned`: the stored pixels lie otherwise. Of a video: `index` counts its frames from 0, `time_s` is the
    frame's time in seconds, where the file tells.
    """

    path: Path
    image: Image.Image
    width: int
    height: int
    turned: bool = False
    index: int | None = None
    time_s: float | None = None

    def original(self) -> Image.Image:
        """The picture in its own size; raises BadDataset if it has to be read again and cannot be."""
        if self.image.size == (self.width, self.height):
            return self.image
        return read_image(self.path).image


def read_image(path: Path, *, upright: bool = True, at_least: int | None = None) -> Frame:
    """An image file; of several pictures in it, the first.

    upright: turn it as EXIF says. at_least: pixels a side that suffice, which makes large JPEGs several times
    faster to read; reduced as for training. Raises BadDataset for a file that is missing or no image.
    """
    try:
        # Pillow warns of large pictures and of odd headers, which is no news to who has many
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            require_eight_bits(file)
            width, height = file.size
            if at_least is not None:
                file.draft("RGB", (REDUCING_GAP * at_least, REDUCING_GAP * at_least))
            turn = _EXIF_TURNS.get(orientation(file)) if upright else None
            image = file.convert("RGB")
    except NOT_AN_IMAGE as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise BadDataset(f"{path}: cannot be read as an image: {reason}") from exc
    if turn is None:
        return Frame(path, image, width, height)
    if turn in _SIDEWAYS:
        width, height = height, width
    return Frame(path, image.transpose(turn), width, height, turned=True)


def is_video(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def require_video() -> None:
    """Raises BadSettings if PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as exc:
        raise BadSettings(
            "videos are read by PyAV, which is not installed: pip install 'fedqueue[video]', or extract the frames"
        ) from exc


def count_frames(path: Path, every: int) -> int | None:
    """How many frames `read_video` will probably give, by the file's header; None if it does not say."""
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            if not stream.frames and container.duration and stream.average_rate:
                return -(-int(container.duration / 1e6 * stream.average_rate) // every) or None
            return -(-stream.frames // every) or None
    except (av.FFmpegError, OSError, IndexError):
        return None


def read_video(path: Path, every: int = 1) -> Iterator[Frame]:
    """Frames 0, `every`, 2 `every` … of a video file.

    Raises BadDataset for a file that is missing or no video, or, after the frames before it, at a broken place.
    """
    import av

    index = -1
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise BadDataset(f"{path}: has no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if index % every == 0:
                    yield _video_frame(path, frame, index)
    except (av.FFmpegError, OSError, ValueError) as exc:
        where = f"after frame {index}" if index >= 0 else "as a video"
        raise BadDataset(f"{path}: cannot be read {where}: {getattr(exc, 'strerror', None) or exc}") from exc
    if index < 0:
        raise BadDataset(f"{path}: has no pictures")


def _video_frame(path: Path, frame: av.VideoFrame, index: int) -> Frame:
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    turn = _VIDEO_TURNS.get(frame.rotation % 360)
    if turn is not None:
        image = image.transpose(turn)
    return Frame(path, image, image.width, image.height, turn is not None, index, frame.time)


class VideoFile:
    """An .mp4 of pictures that come one after another, each at its own time. To be closed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be made."""
        import av

        self._av, self._container = av, av.open(path, "w")
        self._stream: av.VideoStream | None = None
        self._first_s, self._last_tick = 0.0, -1

    def add(self, image: Image.Image, time_s: float) -> None:
        """Append a picture that is shown `time_s` seconds after the same moment as the others; times rise.

        Raises OSError; BadSettings if there is no encoder.
        """
        if self._stream is None:
            self._stream, self._first_s = self._new_stream(), time_s
            # 4:2:0 chroma needs even sides
            self._stream.width, self._stream.height = (max(2, side // 2 * 2) for side in image.size)
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = _CLOCK
        size = (self._stream.width, self._stream.height)
        picture = image if image.size == size else image.resize(size)
        frame: av.VideoFrame = self._av.VideoFrame.from_image(picture)  # type: ignore[no-untyped-call]
        self._last_tick = max(self._last_tick + 1, round((time_s - self._first_s) / _CLOCK))
        frame.pts, frame.time_base = self._last_tick, _CLOCK
        self._container.mux(self._stream.encode(frame))

    def _new_stream(self) -> av.VideoStream:
        try:
            return self._container.add_stream("h264", rate=30)
        except ValueError as exc:
            raise BadSettings(
                "this build of FFmpeg writes no H.264: use the av package of PyPI, or draw no videos"
            ) from exc

    def close(self) -> None:
        """Write what is left."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
