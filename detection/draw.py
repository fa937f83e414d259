"""Pictures for people: boxes on images, a sheet of examples, and the course of a federation.

Drawings are made at twice the image's size or more, so that small frames stay legible. A class has the same
colour in every picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detection.dataset import Item
from detection.evaluate import Found
from federation.errors import BadSettings

PALETTE = ("#ff5c5c", "#3dd68c", "#4da3ff", "#ffb020", "#c77dff", "#2fd4d4", "#ff7ac6", "#b6d94c")
INK = "#10141a"
PAPER = "#f5f6f8"
TRUTH = "#ffffff"
DRAWN_WIDTH = 720
MAX_BOXES_DRAWN = 300
LINE, LETTERS = 0.003, 0.022
"""Width of a box's line and height of a label's letters, as shares of the picture's mean side."""
MIN_LETTERS_PX = 12

Box = tuple[float, float, float, float]  # xyxy


def colour_of(label: int) -> str:
    """The colour of a class, by its label 1..C."""
    return PALETTE[(label - 1) % len(PALETTE)]


def draw(
    image: Image.Image,
    found: Found,
    classes: Sequence[str],
    truth: NDArray[np.float32] | None = None,
    *,
    width: int = DRAWN_WIDTH,
    font_file: Path | None = None,
) -> Image.Image:
    """A copy of `image`, `width` pixels wide, with its detections (class and score) and, thin and white, the
    ground-truth boxes `truth` [N, 4] xyxy in pixels of the image.

    Lines and letters grow with the picture. Labels stay inside it and, where there is room, off each other.
    `font_file`: for class names in a script that DejaVu Sans lacks. Raises BadSettings if it is no font.
    """
    scale = width / image.width
    size = (width, max(1, round(image.height * scale)))
    canvas = image.convert("RGB")
    if canvas is image or canvas.size != size:
        canvas = canvas.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for box in [] if truth is None else truth.tolist():
        pen.rectangle([v * scale for v in box], outline=f"{TRUTH}d0", width=1)
    mean_side = (size[0] * size[1]) ** 0.5
    line = max(2, round(mean_side * LINE))
    font = _font(max(MIN_LETTERS_PX, round(mean_side * LETTERS)), font_file)
    count = min(len(found.scores), MAX_BOXES_DRAWN)
    boxes = (found.boxes[:count] * scale).clip(0, np.array([size[0] - 1, size[1] - 1] * 2)).tolist()
    labels = found.labels[:count].tolist()
    # the best last, on top
    for box, label in zip(reversed(boxes), reversed(labels), strict=True):
        _frame(pen, box, colour_of(label), line)
    tags: list[tuple[Box, str, str]] = []
    for box, label, score in zip(boxes, labels, found.scores[:count].tolist(), strict=True):
        text = _fitting(pen, font, classes[label - 1], f" {score:.2f}", size[0])
        place = _place(pen, font, text, box, size, [taken for taken, _, _ in tags])
        tags.append((place, text, colour_of(label)))
    for place, text, colour in reversed(tags):
        _tag(pen, font, text, place, colour)
    return canvas


def _font(size: int, file: Path | None = None) -> ImageFont.FreeTypeFont:
    # Pillow's own font has ASCII alone; this one comes with matplotlib and has Latin, Greek and Cyrillic letters
    path = file or Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    try:
        return ImageFont.truetype(path, size)
    except OSError as exc:
        raise BadSettings(f"{path} is no font that can be read ({exc}): give a .ttf or .otf file") from exc


def _frame(pen: ImageDraw.ImageDraw, box: Sequence[float], colour: str, line: int) -> None:
    """The outline, dark on both sides, so that it stands out from any background."""
    left, top, right, bottom = box
    edge = max(1, line // 4)
    pen.rectangle(
        [left - edge, top - edge, right + edge, bottom + edge], outline=f"{INK}90", width=line + 2 * edge
    )
    pen.rectangle(box, outline=colour, width=line)


def _fitting(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, name: str, score: str, width: float
) -> str:
    """Class and score, the class cut short where the picture is narrow."""
    shown = name
    while len(shown) > 1 and pen.textlength(shown + score, font=font) + 2 * _padding(font) > width:
        name = name[:-1]
        shown = f"{name}…"
    return shown + score


def _padding(font: ImageFont.FreeTypeFont) -> int:
    return max(2, round(font.size / 4))


def _place(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    text: str,
    box: Sequence[float],
    size: tuple[int, int],
    taken: Sequence[Box] = (),
) -> Box:
    """Where a label goes: of the places at its box and inside the picture, the one that hides the least of others."""
    width = pen.textlength(text, font=font) + 2 * _padding(font)
    height = float(sum(font.getmetrics()))
    rightmost, lowest = max(0.0, size[0] - 1 - width), max(0.0, size[1] - 1 - height)
    left, top, right, bottom = box
    places: list[Box] = []
    for x, y in (
        (left, top - height),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom),
        (left, top),
        (left, bottom - height),
        (right, top),
        (left - width, top),
        (left, min(top, lowest)),  # there is always this one
    ):
        if 0 <= y <= lowest:
            x = min(max(0.0, x), rightmost)
            places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_common_area(place, other) for other in taken))


def _tag(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, place: Box, colour: str) -> None:
    pen.rectangle(place, fill=colour)
    pen.text((place[0] + _padding(font), place[1]), text, fill=INK, font=font)


def _common_area(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def contact_sheet(
    items: Sequence[Item],
    found: Sequence[Found],
    classes: Sequence[str],
    out: Path,
    *,
    title: str = "",
    columns: int = 3,
    width: int = 480,
) -> None:
    """Write one picture (format by the suffix of `out`) of several images with their detections and truth.

    `found[i]` are the detections in `items[i]`. A legend names the classes.
    """
    tiles = []
    for item, one in zip(items, found, strict=True):
        with Image.open(item.path) as image:
            tiles.append(draw(image, one, classes, item.boxes, width=width))
    _lay_out(tiles, classes, out, title=title, columns=columns, width=width, truth=True)


def annotation_sheet(
    items: Sequence[Item],
    classes: Sequence[str],
    out: Path,
    *,
    title: str = "",
    count: int = 12,
    columns: int = 3,
    width: int = 480,
) -> None:
    """Write one picture of `count` images, evenly spaced among `items`, with their labelled boxes.

    For a person who wants to see whether boxes and names fit the images. Large boxes are drawn first.
    """
    tiles = []
    for index in evenly(len(items), count):
        item = items[index]
        with Image.open(item.path) as image:
            scale = width / item.width
            canvas = image.convert("RGB").resize(
                (width, round(item.height * scale)), Image.Resampling.LANCZOS
            )
        pen, font = ImageDraw.Draw(canvas, "RGBA"), _font(11)
        areas = (item.boxes[:, 2:] - item.boxes[:, :2]).prod(axis=1)
        for i in np.argsort(-areas, kind="stable"):
            box, label = [float(v) * scale for v in item.boxes[i]], int(item.labels[i])
            colour = colour_of(label)
            pen.rectangle(box, outline=colour, width=2)
            name = classes[label - 1]
            _tag(pen, font, name, _place(pen, font, name, box, canvas.size), colour)
        name, corner = item.path.name, (0, canvas.height, 0, canvas.height)
        _tag(pen, font, name, _place(pen, font, name, corner, canvas.size), PAPER)
        tiles.append(canvas)
    _lay_out(tiles, classes, out, title=title, columns=columns, width=width, truth=False)


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `count`, evenly spaced, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))}) if count else []


def _lay_out(
    tiles: Sequence[Image.Image],
    classes: Sequence[str],
    out: Path,
    *,
    title: str,
    columns: int,
    width: int,
    truth: bool,
) -> None:
    """Tiles of one width in rows, under a title and a legend. `truth`: white boxes are in the legend too."""
    margin, gap = 24, 12
    columns = max(1, min(columns, len(tiles)))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    header = 84 if title else 48
    sheet_width = 2 * margin + columns * width + (columns - 1) * gap
    sheet = Image.new("RGB", (sheet_width, header + sum(heights) + gap * len(rows) + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, 14), title, fill=INK, font=_font(24))
    _legend(pen, classes, margin, header - 34, sheet_width - margin, truth)
    y = header
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (margin + column * (width + gap), y))
        y += height + gap
    sheet.save(out)


def _legend(
    pen: ImageDraw.ImageDraw, classes: Sequence[str], x: float, y: float, right: float, truth: bool
) -> None:
    """The classes' colours from x to `right`, as many as there is room for."""
    font = _font(15)
    entries = [(name, colour_of(i), colour_of(i)) for i, name in enumerate(classes, start=1)]
    if truth:
        entries.append(("ground truth", TRUTH, INK))
    for name, fill, outline in entries:
        width = 19 + pen.textlength(name, font=font)
        if x + width > right:
            pen.text((x, y), "…", fill=INK, font=font)
            return
        pen.rectangle([x, y + 3, x + 13, y + 16], fill=fill, outline=outline)
        pen.text((x + 19, y), name, fill=INK, font=font)
        x += width + 18


def plot_map(
    federation: Sequence[tuple[float, float]],
    alone: Mapping[str, float],
    out: Path,
    *,
    title: str = "Asynchronous federation",
    metric: str = "mAP@0.5",
) -> None:
    """Write a PNG of the global model's metric over wall-clock time.

    federation: (seconds since the job began, metric) of each evaluated version. alone: the same metric of a
    model that a site trained with as many steps but only its own images; each becomes a horizontal line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and only used here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = sorted(federation)
    minutes = [seconds / 60 for seconds, _ in points]
    values = [value for _, value in points]
    axes.plot(minutes, values, color=PALETTE[2], linewidth=2.4, marker="o", markersize=5, zorder=3)
    names = [(values[-1], f"together {values[-1]:.2f}", PALETTE[2])] if values else []
    others = (PALETTE[0], PALETTE[3], PALETTE[4], PALETTE[1], PALETTE[5])
    for i, (site, value) in enumerate(sorted(alone.items())):
        colour = others[i % len(others)]
        axes.axhline(value, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
        names.append((value, f"{site} alone {value:.2f}", colour))
    top = max([0.1, *values, *alone.values()]) * 1.12
    at = -1.0
    for value, name, colour in sorted(names):
        at = max(value, at + 0.045 * top)  # near values do not overprint each other
        axes.text(1.01, at, name, transform=axes.get_yaxis_transform(), color=colour, va="center")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("wall-clock time, minutes")
    axes.set_ylabel(f"{metric} on the test images")
    axes.set_ylim(0, top)
    axes.set_xlim(0, max([*minutes, 1e-3]) * 1.03)
    axes.grid(axis="y", color="#e3e6ea")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(out, format="png")
