"""Pictures as viewers show them, from image files and from videos."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from detection.dataset import read_square
from detection.frames import VideoFile, count_frames, is_video, read_image, read_video, require_video
from detection.predict import _square
from federation.errors import BadDataset, BadSettings

RED, BLUE = (200, 30, 30), (30, 30, 200)


def scene(width: int = 120, height: int = 80) -> Image.Image:
    """Upright: blue, but red in the top left quarter."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    return image


def is_scene(image: Image.Image) -> bool:
    """Whether only the top left quarter is red."""
    width, height = image.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    pixels = [image.getpixel(place) for place in places]
    reds = [isinstance(p, tuple) and p[0] > 120 and p[2] < 120 for p in pixels]
    return reds == [True, False, False, False]


STORED = {  # how a camera that writes this EXIF orientation has stored the upright scene
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("at_least", [None, 16])
def test_an_image_is_turned_as_its_exif_says(tmp_path: Path, orientation: int, at_least: int | None) -> None:
    image = scene()
    for turn in STORED[orientation]:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "phone.jpg"
    image.save(path, exif=exif, quality=95)
    frame = read_image(path, at_least=at_least)
    assert (frame.width, frame.height) == (120, 80)
    assert is_scene(frame.image)
    assert frame.turned == (orientation != 1)
    assert frame.image.size == (120, 80) or (at_least and frame.image.width < 120), (
        "a JPEG is decoded smaller"
    )
    assert frame.original().size == (120, 80)
    assert is_scene(frame.original())
    stored = read_image(path, upright=False)
    assert (stored.width, stored.height) == image.size
    assert not stored.turned


def test_a_broken_exif_is_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    scene().save(tmp_path / "odd.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert is_scene(read_image(tmp_path / "odd.jpg").image)


def test_a_picture_reaches_the_detector_as_in_training(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    for name, side in (("noise.png", 64), ("noise.jpg", 64), ("noise.jpg", 16)):
        Image.fromarray(noise).save(tmp_path / name)
        ours = _square(read_image(tmp_path / name, at_least=side).image, side)
        assert torch.equal(ours, read_square(tmp_path / name, side))


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), (b"text", "cannot identify"), (b"", "cannot")]
)
def test_no_image_is_refused_by_name(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadDataset, match=rf"x\.jpg.*{why}"):
        read_image(path)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    scene().save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadDataset, match="truncated"):
        read_image(path)


# --- videos --------------------------------------------------------------------------------------------------


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Ten frames, ten a second; frame i has brightness 20 i."""
    path = tmp_path / "v.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10):
            grey = np.full((48, 64, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("every", "expected"), [(1, range(10)), (4, [0, 4, 8]), (100, [0])])
def test_frames_come_with_number_and_time(video: Path, every: int, expected: range | list[int]) -> None:
    frames = list(read_video(video, every))
    assert [frame.index for frame in frames] == list(expected)
    assert [frame.time_s for frame in frames] == pytest.approx([i / 10 for i in expected])
    assert all((frame.width, frame.height) == frame.image.size == (64, 48) for frame in frames)
    levels = [np.asarray(frame.image).mean() for frame in frames]
    assert levels == pytest.approx([20 * i for i in expected], abs=6)
    assert count_frames(video, every) == len(frames)


def test_what_is_written_is_read_again_at_its_times(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    film = VideoFile(path)
    times = [5.0, 5.04, 5.5, 5.5, 9.0]  # does not begin at 0, stands still, jumps
    for time_s in times:
        film.add(scene(121, 81), time_s)
    film.close()
    frames = list(read_video(path))
    assert [frame.time_s for frame in frames] == pytest.approx([t - 5 for t in times], abs=0.001)
    assert all(frame.image.size == (120, 80) for frame in frames), "4:2:0 has even sides"
    assert all(is_scene(frame.image) for frame in frames)


def test_a_video_that_is_none_and_one_that_breaks_off(tmp_path: Path, video: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "gone.mp4"):
        with pytest.raises(BadDataset, match=rf"{name}: cannot be read as a video"):
            list(read_video(tmp_path / name))
        assert count_frames(tmp_path / name, 1) is None
    sound = tmp_path / "sound.mkv"
    with av.open(sound, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    with pytest.raises(BadDataset, match="has no pictures"):
        list(read_video(sound))
    assert is_video(sound)


def test_without_pyav_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_video()
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails
    with pytest.raises(BadSettings, match=r"pip install 'fedqueue\[video\]'"):
        require_video()
