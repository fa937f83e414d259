"""Pictures for people: boxes on images, a sheet of examples, and the course of a federation.

Drawings are made at twice the image's size or more, so that small frames stay legible. A class has the same
colour in every picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detection.dataset import Item
from detection.evaluate import Found

PALETTE = ("#ff5c5c", "#3dd68c", "#4da3ff", "#ffb020", "#c77dff", "#2fd4d4", "#ff7ac6", "#b6d94c")
INK = "#10141a"
PAPER = "#f5f6f8"
TRUTH = "#ffffff"
DRAWN_WIDTH = 720
MAX_BOXES_DRAWN = 60


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
) -> Image.Image:
    """A copy of `image`, `width` pixels wide, with its detections (class and score) and, thin and white, the
    ground-truth boxes `truth` [N, 4] xyxy in pixels of the image."""
    scale = width / image.width
    canvas = image.convert("RGB").resize((width, round(image.height * scale)), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for box in [] if truth is None else truth.tolist():
        pen.rectangle([v * scale for v in box], outline=f"{TRUTH}d0", width=1)
    font = ImageFont.load_default(size=max(11, width // 48))
    # the best last, on top
    for i in reversed(range(min(len(found.scores), MAX_BOXES_DRAWN))):
        box = [float(v) * scale for v in found.boxes[i]]
        label = int(found.labels[i])
        colour = colour_of(label)
        pen.rectangle(box, outline=colour, fill=f"{colour}22", width=max(2, width // 240))
        _tag(pen, font, f"{classes[label - 1]} {found.scores[i]:.2f}", box, colour, canvas.size)
    return canvas


def _tag(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    box: Sequence[float],
    colour: str,
    size: tuple[int, int],
) -> None:
    """A label above the box, moved inside the picture where there is no room."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 8, bottom - top + 6
    x = min(max(0.0, box[0]), size[0] - width)
    y = box[1] - height if box[1] >= height else min(box[1], size[1] - height)
    pen.rectangle([x, y, x + width, y + height], fill=colour)
    pen.text((x + 4 - left, y + 3 - top), text, fill=INK, font=font)


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
        pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(size=11)
        areas = (item.boxes[:, 2:] - item.boxes[:, :2]).prod(axis=1)
        for i in np.argsort(-areas, kind="stable"):
            box, label = [float(v) * scale for v in item.boxes[i]], int(item.labels[i])
            colour = colour_of(label)
            pen.rectangle(box, outline=colour, width=2)
            _tag(pen, font, classes[label - 1], box, colour, canvas.size)
        _tag(pen, font, item.path.name, (0, canvas.height, 0, canvas.height), PAPER, canvas.size)
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
        pen.text((margin, 14), title, fill=INK, font=ImageFont.load_default(size=24))
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
    font = ImageFont.load_default(size=15)
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
