"""The painters of generated scenes: four kinds of street objects and three backgrounds. See detection.scenes.

A painter works in units of its canvas, so that it can be drawn at any size. Objects are drawn several times
larger than they appear and scaled down, which smooths their edges; an object's mask is where it covers at
least half of a pixel, and its sprite is cropped to that mask, so boxes are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Painter = Callable[[ImageDraw.ImageDraw, float, float, np.random.Generator], None]

HORIZON = 0.42  # height of the horizon in all backgrounds, from the top, share of the image
_ENLARGED = 3


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A painted object, cropped to what is visible of it."""

    name: str
    image: Image.Image  # RGBA
    mask: NDArray[np.bool_]  # [height, width], pixels that count as the object


def paint(name: str, size: tuple[float, float], rng: np.random.Generator) -> Sprite:
    """An object of class `name` within `size` (width, height) pixels; colour, pose and direction vary."""
    width, height = (max(6, round(side)) for side in size)
    big = Image.new("RGBA", (width * _ENLARGED, height * _ENLARGED))
    PAINTERS[name](ImageDraw.Draw(big), big.width - 1, big.height - 1, rng)
    if rng.random() < 0.5:
        big = big.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    small = big.resize((width, height), Image.Resampling.BOX)
    mask = np.asarray(small)[..., 3] >= 128
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return Sprite(name=name, image=small.crop((left, top, right, bottom)), mask=mask[top:bottom, left:right])


def _pick(colours: tuple[RGB, ...], rng: np.random.Generator, spread: int = 18) -> RGB:
    """One of `colours`, a little varied."""
    base = colours[int(rng.integers(len(colours)))]
    shift = rng.integers(-spread, spread, size=3, endpoint=True)
    red, green, blue = (int(np.clip(c + s, 0, 255)) for c, s in zip(base, shift, strict=True))
    return red, green, blue


def _shade(colour: RGB, factor: float) -> RGB:
    red, green, blue = (int(min(255, c * factor)) for c in colour)
    return red, green, blue


# --- objects: (pen, width, height, random stream); all face right --------------------------------------


def _car(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    body = _pick(((200, 40, 40), (45, 85, 190), (235, 235, 235), (150, 30, 60)), rng)
    back, front = rng.uniform(0.08, 0.2), rng.uniform(0.74, 0.84)
    cabin = [(back * w, 0.45 * h), ((back + 0.1) * w, 0), ((front - 0.18) * w, 0), (front * w, 0.45 * h)]
    pen.polygon(cabin, fill=body)
    glass = [
        ((back + 0.06) * w, 0.42 * h),
        ((back + 0.13) * w, 0.08 * h),
        ((front - 0.2) * w, 0.08 * h),
        ((front - 0.06) * w, 0.42 * h),
    ]
    pen.polygon(glass, fill=(40, 55, 75))
    middle = (back + front) / 2
    pen.rectangle([(middle - 0.02) * w, 0.05 * h, (middle + 0.01) * w, 0.45 * h], fill=body)
    pen.rounded_rectangle([0, 0.4 * h, w, 0.86 * h], radius=0.16 * h, fill=body)
    pen.rectangle([0.02 * w, 0.68 * h, 0.98 * w, 0.84 * h], fill=_shade(body, 0.7))
    pen.ellipse([0.91 * w, 0.47 * h, 0.99 * w, 0.62 * h], fill=(255, 245, 190))
    pen.rectangle([0, 0.48 * h, 0.04 * w, 0.62 * h], fill=(255, 60, 40))
    radius = 0.23 * h
    for x in (0.2 * w, 0.79 * w):
        _disc(pen, x, h - radius, radius, (25, 25, 28))
        _disc(pen, x, h - radius, 0.45 * radius, (190, 190, 195))


def _person(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    shirt = _pick(((230, 70, 120), (250, 220, 80), (90, 60, 150), (240, 240, 240), (60, 130, 210)), rng)
    trousers = _pick(((35, 40, 60), (60, 50, 45), (30, 60, 110)), rng)
    skin = _pick(((240, 200, 170), (200, 150, 110), (125, 85, 60)), rng, spread=10)
    stride = rng.uniform(0.05, 0.3)
    thick = max(2, round(0.21 * w))
    for side in (-1, 1):
        foot = (0.5 + side * stride) * w
        pen.line([(0.5 * w + side * 0.1 * w, 0.55 * h), (foot, 0.95 * h)], fill=trousers, width=thick)
        pen.ellipse([foot - 0.11 * w, 0.93 * h, foot + 0.19 * w, h], fill=(25, 25, 25))
        hand = (0.5 + side * rng.uniform(0.3, 0.42)) * w
        pen.line(
            [(0.5 * w + side * 0.22 * w, 0.24 * h), (hand, 0.5 * h)], fill=_shade(shirt, 0.8), width=thick
        )
        _disc(pen, hand, 0.52 * h, 0.085 * w, skin)
    pen.rounded_rectangle([0.24 * w, 0.19 * h, 0.76 * w, 0.58 * h], radius=0.18 * w, fill=shirt)
    _disc(pen, 0.5 * w, 0.1 * h, 0.1 * h, _pick(((50, 35, 25), (30, 30, 30), (150, 100, 50)), rng))
    _disc(pen, 0.54 * w, 0.115 * h, 0.082 * h, skin)


def _bicycle(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    frame = _pick(((30, 220, 90), (20, 215, 205), (150, 235, 40)), rng)
    radius = 0.25 * w
    axle = h - radius
    tyre, tube = max(2, round(0.055 * w)), max(2, round(0.06 * w))
    rear, front = (radius, axle), (w - radius, axle)
    crank, seat, head = (0.47 * w, axle), (0.37 * w, 0.3 * h), (0.68 * w, 0.22 * h)
    for x, y in (rear, front):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=(20, 20, 20), width=tyre)
        inner = radius - tyre
        pen.ellipse(
            [x - inner, y - inner, x + inner, y + inner], outline=(220, 220, 220), width=max(1, tyre // 2)
        )
        _disc(pen, x, y, 0.05 * w, (220, 220, 220))
    for start, end in (
        (rear, crank),
        (rear, seat),
        (seat, crank),
        (crank, head),
        (seat, head),
        (head, front),
    ):
        pen.line([start, end], fill=frame, width=tube)
    pen.line([head, (0.66 * w, 0.04 * h)], fill=frame, width=tube)
    pen.line([(0.6 * w, 0.04 * h), (0.76 * w, 0.04 * h)], fill=(25, 25, 25), width=tube)
    pen.line([seat, (0.36 * w, 0.2 * h)], fill=frame, width=tube)
    pen.ellipse([0.26 * w, 0.12 * h, 0.46 * w, 0.22 * h], fill=(25, 25, 25))


def _cart(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    cloth = _pick(((250, 130, 20), (255, 165, 30), (240, 105, 40)), rng)
    wood = _pick(((150, 95, 50), (175, 120, 70)), rng)
    for x in (0.14, 0.82):
        pen.rectangle([x * w, 0.2 * h, (x + 0.05) * w, 0.62 * h], fill=_shade(wood, 0.7))
    goods = _pick(((215, 45, 40), (110, 180, 50), (240, 220, 70)), rng)
    for i in range(5):
        _disc(pen, (0.22 + 0.14 * i) * w, 0.55 * h, 0.085 * w, _shade(goods, 0.85 + 0.15 * (i % 2)))
    pen.rectangle([0.08 * w, 0.57 * h, 0.92 * w, 0.83 * h], fill=wood)
    pen.rectangle([0.08 * w, 0.68 * h, 0.92 * w, 0.71 * h], fill=_shade(wood, 0.7))
    stripes = int(rng.integers(5, 8))
    for i in range(stripes):
        left, right = i / stripes, (i + 1) / stripes
        colour = cloth if i % 2 == 0 else (250, 245, 235)
        roof = [
            (left * w, 0.22 * h),
            ((0.12 + 0.76 * left) * w, 0),
            ((0.12 + 0.76 * right) * w, 0),
            (right * w, 0.22 * h),
        ]
        pen.polygon(roof, fill=colour)
        pen.pieslice([left * w, 0.14 * h, right * w, 0.3 * h], 0, 180, fill=_shade(colour, 0.9))
    for x in (0.26 * w, 0.74 * w):
        _disc(pen, x, h - 0.13 * w, 0.13 * w, (35, 30, 28))
        _disc(pen, x, h - 0.13 * w, 0.06 * w, (200, 180, 150))


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: RGB) -> None:
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


PAINTERS: dict[str, Painter] = {"car": _car, "person": _person, "bicycle": _bicycle, "cart": _cart}
CLASSES = tuple(PAINTERS)

# (width, height) of an object halfway between the far and the near edge, share of the image's mean side
PROPORTIONS: dict[str, tuple[float, float]] = {
    "car": (0.25, 0.116),
    "person": (0.095, 0.235),
    "bicycle": (0.2, 0.135),
    "cart": (0.16, 0.175),
}


# --- backgrounds: (pen, width, height, random stream) --------------------------------------------------


def _street(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """Houses behind a pavement, and a road."""
    horizon = HORIZON * h
    _gradient(pen, w, 0, horizon, (120, 175, 235), (205, 225, 245))
    x = -0.05 * w
    while x < w:
        wide, top = rng.uniform(0.14, 0.24) * w, rng.uniform(0.07, 0.2) * h
        wall = _pick(((205, 180, 150), (190, 165, 165), (165, 175, 180), (215, 205, 175)), rng)
        pen.rectangle([x, top, x + wide, horizon + 0.03 * h], fill=wall)
        pen.rectangle([x, top, x + wide, top + 0.02 * h], fill=_shade(wall, 0.75))
        for column in range(3):
            for row in range(4):
                left, upper = x + wide * (0.14 + 0.28 * column), top + (0.05 + 0.09 * row) * h
                if upper + 0.05 * h < horizon:
                    pen.rectangle([left, upper, left + 0.16 * wide, upper + 0.05 * h], fill=_shade(wall, 0.6))
        x += wide
    _gradient(pen, w, horizon + 0.02 * h, 0.54 * h, (165, 160, 155), (180, 176, 170))
    pen.rectangle([0, 0.54 * h, w, 0.555 * h], fill=(200, 198, 192))
    _gradient(pen, w, 0.555 * h, h, (95, 97, 102), (112, 114, 118))
    for i in range(6):
        left = (0.02 + 0.18 * i) * w
        pen.polygon(
            [
                (left, 0.75 * h),
                (left + 0.09 * w, 0.75 * h),
                (left + 0.08 * w, 0.775 * h),
                (left - 0.01 * w, 0.775 * h),
            ],
            fill=(215, 215, 205),
        )


def _quay(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """Water with containers and a crane beyond it, and a concrete quay."""
    horizon = HORIZON * h
    _gradient(pen, w, 0, horizon, (165, 175, 185), (210, 214, 216))
    for i in range(14):
        left, rows = (0.02 + 0.07 * i) * w, int(rng.integers(1, 4))
        for row in range(rows):
            paint_ = _pick(((120, 90, 85), (90, 105, 120), (115, 120, 105)), rng, spread=10)
            lower = 0.33 * h - row * 0.035 * h
            pen.rectangle([left, lower - 0.033 * h, left + 0.066 * w, lower], fill=paint_)
    mast = rng.uniform(0.55, 0.75) * w
    steel = (100, 105, 112)
    pen.rectangle([mast, 0.08 * h, mast + 0.02 * w, 0.33 * h], fill=steel)
    pen.rectangle([mast - 0.22 * w, 0.1 * h, mast + 0.12 * w, 0.118 * h], fill=steel)
    pen.line([(mast - 0.15 * w, 0.11 * h), (mast - 0.15 * w, 0.2 * h)], fill=steel, width=2)
    _gradient(pen, w, 0.33 * h, 0.52 * h, (95, 120, 135), (70, 98, 115))
    for _ in range(60):
        x, y = rng.uniform(0, w), rng.uniform(0.34, 0.51) * h
        pen.line([(x, y), (x + rng.uniform(0.02, 0.06) * w, y)], fill=(120, 145, 158), width=2)
    pen.rectangle([0, 0.52 * h, w, 0.55 * h], fill=(95, 95, 92))
    _gradient(pen, w, 0.55 * h, h, (150, 150, 145), (172, 171, 165))
    for i in range(-3, 9):
        pen.line([((0.3 + 0.08 * i) * w, 0.55 * h), ((0.17 * i) * w, h)], fill=(135, 135, 130), width=2)
    for y in (0.63, 0.76):
        pen.line([(0, y * h), (w, y * h)], fill=(135, 135, 130), width=2)


def _square(pen: ImageDraw.ImageDraw, w: float, h: float, rng: np.random.Generator) -> None:
    """A row of closed stalls under an evening sky, and paving."""
    horizon = HORIZON * h
    _gradient(pen, w, 0, horizon, (105, 85, 140), (245, 175, 130))
    pen.rectangle([0, horizon, w, 0.5 * h], fill=(85, 70, 80))
    x = -0.03 * w
    while x < w:
        wide, top = rng.uniform(0.16, 0.22) * w, rng.uniform(0.17, 0.22) * h
        cloth = _pick(((95, 75, 95), (80, 85, 105), (105, 85, 80)), rng, spread=10)
        pen.rectangle([x + 0.01 * w, top, x + wide - 0.01 * w, 0.5 * h], fill=_shade(cloth, 0.75))
        pen.polygon(
            [
                (x, top + 0.07 * h),
                (x + 0.03 * w, top),
                (x + wide - 0.03 * w, top),
                (x + wide, top + 0.07 * h),
            ],
            fill=cloth,
        )
        x += wide + 0.01 * w
    for i in range(24):
        lamp = (i + 0.5) / 24
        _disc(pen, lamp * w, (0.1 + 0.05 * abs(np.sin(lamp * 9.4))) * h, 0.006 * w, (255, 240, 180))
    _gradient(pen, w, 0.49 * h, h, (140, 122, 118), (165, 145, 138))
    joints = (125, 108, 104)
    y, step = 0.49, 0.03
    while y < 1:
        pen.line([(0, y * h), (w, y * h)], fill=joints, width=2)
        y, step = y + step, step * 1.3
    for i in range(-12, 13):
        pen.line([((0.5 + 0.05 * i) * w, 0.49 * h), ((0.5 + 0.14 * i) * w, h)], fill=joints, width=2)


def _gradient(pen: ImageDraw.ImageDraw, w: float, top: float, bottom: float, upper: RGB, lower: RGB) -> None:
    """Horizontal bands from `top` to `bottom`, the colour running from `upper` to `lower`."""
    for y in range(int(top), int(bottom) + 1):
        t = (y - top) / max(1.0, bottom - top)
        red, green, blue = (round(a + (b - a) * t) for a, b in zip(upper, lower, strict=True))
        pen.line([(0, y), (w, y)], fill=(red, green, blue))


BACKGROUNDS: dict[str, Painter] = {"north": _street, "harbour": _quay, "market": _square}
