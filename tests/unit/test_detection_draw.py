"""Pictures of detections: everything legible, everything inside, nothing hidden without need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont

from detection import draw as module
from detection.draw import colour_of, draw
from detection.evaluate import Found
from federation.errors import BadSettings

CLASSES = ("car", "Fußgänger", "long name " * 6)
Rectangle = tuple[float, float, float, float]


def found(*boxes: Rectangle, labels: list[int] | None = None) -> Found:
    count = len(boxes)
    return Found(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels or [1] * count, np.int64),
        np.linspace(0.9, 0.5, count, dtype=np.float32),
    )


class Labels:
    """Records what is written where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.extents: list[Rectangle] = []
        self.letters: list[float] = []
        text = ImageDraw.ImageDraw.text

        def record(pen: ImageDraw.ImageDraw, xy: tuple[float, float], what: str, **more: object) -> None:
            font = more["font"]
            assert isinstance(font, ImageFont.FreeTypeFont)
            self.texts.append(what)
            self.extents.append(pen.textbbox(xy, what, font=font))
            self.letters.append(font.size)
            text(pen, xy, what, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> Labels:
    return Labels(monkeypatch)


CORNERS = [(0, 0, 40, 30), (440, 0, 480, 30), (0, 360, 40, 392), (440, 360, 480, 392), (0, 0, 480, 392)]


@pytest.mark.parametrize("size", [(480, 392), (3840, 2160), (720, 4000), (200, 30)])
def test_labels_stay_in_the_picture_and_grow_with_it(labels: Labels, size: tuple[int, int]) -> None:
    scale = np.array([size[0] / 480, size[1] / 392] * 2, np.float32)
    some = found(*CORNERS, labels=[1, 2, 3, 1, 2])
    drawn = draw(
        Image.new("RGB", size, "grey"),
        Found(some.boxes * scale, some.labels, some.scores),
        CLASSES,
        width=size[0],
    )
    assert drawn.size == size
    assert len(labels.texts) == 5
    for left, top, right, bottom in labels.extents:
        assert left >= 0
        assert top >= 0
        assert right <= size[0]
        assert bottom <= size[1]
    assert labels.letters[0] == max(12, round((size[0] * size[1]) ** 0.5 * 0.022))
    assert all(text.endswith(("0.90", "0.80", "0.70", "0.60", "0.50")) for text in labels.texts)


def test_labels_give_way_to_each_other(labels: Labels) -> None:
    draw(Image.new("RGB", (480, 392)), found(*[(200, 150, 300, 250)] * 4), CLASSES, width=720)
    rectangles = labels.extents
    for i, a in enumerate(rectangles):
        for b in rectangles[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_a_name_that_is_too_long_is_cut_and_says_so(labels: Labels) -> None:
    draw(Image.new("RGB", (240, 200)), found((0, 0, 50, 50), labels=[3]), CLASSES, width=240)
    assert labels.texts[0].startswith("long name")
    assert "… 0.90" in labels.texts[0]


def test_letters_beyond_ascii_are_drawn_and_not_replaced_by_boxes() -> None:
    """A missing letter is drawn as one and the same box, whatever it is."""
    font = module._font(30, None)

    def glyph(letter: str) -> bytes:
        return bytes(font.getmask(letter))

    missing = glyph("\U0010fffd")
    assert all(glyph(letter) != missing for letter in "ßäéłŠΩЖ…·")
    assert glyph("车") == missing  # so there is --font


def test_another_font_is_used_or_refused_by_name(tmp_path: Path) -> None:
    one = found((100, 100, 200, 200))
    image = Image.new("RGB", (480, 392))
    serif = Path(module.get_data_path()) / "fonts" / "ttf" / "DejaVuSerif-Bold.ttf"
    usual, other = draw(image, one, CLASSES), draw(image, one, CLASSES, font_file=serif)
    assert ImageChops.difference(usual, other).getbbox() is not None
    (tmp_path / "no.ttf").write_text("no font")
    with pytest.raises(BadSettings, match=r"no\.ttf"):
        draw(image, one, CLASSES, font_file=tmp_path / "no.ttf")


def test_boxes_are_outlined_in_their_colour_and_the_image_is_left_alone() -> None:
    image = Image.new("RGB", (480, 392), "white")
    drawn = draw(image, found((100, 100, 300, 300), (-20, -20, 600, 500), labels=[1, 2]), CLASSES, width=480)
    assert "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((200, 100))) == colour_of(1)
    assert "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((479, 200))) == colour_of(2), "clipped to the picture"
    assert drawn.getpixel((200, 200)) == (255, 255, 255)
    assert image.getcolors() == [(480 * 392, (255, 255, 255))]
