"""Generated street-like scenes: a data set for demonstrations and tests that needs no download.

Three fixed cameras, four classes, drawn with Pillow from a seed. Every frame carries the caption "generated"
and every annotation file says so in its `info`. The cameras differ in background, in light and, sharply, in
what passes them (`CAMERAS`: shares of the objects in a camera's training images):

    camera    light      car   person  bicycle  cart
    north     day        .55   .41     .04      -      houses and a road
    harbour   overcast   .20   .02     .50      .28    water and a quay
    market    dusk       -     .38     .04      .58    stalls on paving

So no camera alone teaches all classes, and all together do. The test set has every camera and every class in
equal numbers, drawn from other random streams than the training images.

    folder/images/<camera>-<4 digits>.jpg, test-<camera>-<4 digits>.jpg
    folder/annotations/{north,harbour,market,test}.json     COCO; boxes xywh in pixels of the visible part

The same seed, size and counts give the same pixels and the same annotations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detection.scenery import BACKGROUNDS, CLASSES, HORIZON, PROPORTIONS, Sprite, paint

CAPTION = "generated"
OBJECTS_PER_IMAGE = (2, 5)
_SHAKE = 4  # pixels that the camera moves in the wind
_OVERLAP = 0.2  # of the smaller of two objects: more occlusion than this is avoided
_PLACEMENT_TRIES = 30

Box = tuple[int, int, int, int]  # left, top, width, height, pixels


@dataclass(frozen=True, kw_only=True)
class Camera:
    """What is particular to one camera. `shares` follow `CLASSES`; `light` is (darkest, brightest) gain."""

    name: str
    shares: tuple[float, ...]
    light: tuple[float, float]
    tint: tuple[float, float, float]  # RGB factors
    grey: float  # 0: full colour, 1: none


CAMERAS = (
    Camera(name="north", shares=(0.55, 0.41, 0.04, 0.0), light=(0.95, 1.1), tint=(1.02, 1.0, 0.95), grey=0.0),
    Camera(
        name="harbour", shares=(0.2, 0.02, 0.5, 0.28), light=(0.78, 0.95), tint=(0.95, 1.0, 1.05), grey=0.25
    ),
    Camera(
        name="market", shares=(0.0, 0.38, 0.04, 0.58), light=(0.6, 0.8), tint=(1.12, 0.95, 0.98), grey=0.05
    ),
)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Where a rendered data set lies."""

    images: Path
    sites: Mapping[str, Path]  # annotation file of each site
    test: Path
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Shot:
    """One image to draw: which camera, under which name, with which objects."""

    camera: Camera
    file_name: str
    classes: tuple[str, ...]


def render(
    folder: Path,
    seed: int = 0,
    images_per_site: int = 60,
    test_images: int = 60,
    size: tuple[int, int] = (320, 256),
    on_image: Callable[[int, int], None] | None = None,
) -> Scenes:
    """Draw the data set into `folder`, which is made if need be; files of the same names are replaced.

    `size` is (width, height) in pixels; `on_image(done, total)` is called after every image. Raises
    ValueError for a size below 64 pixels, a negative count or seed, or fewer than 1 image per site.
    """
    if min(size) < 64:
        raise ValueError(f"size {size}: scenes need at least 64 pixels a side")
    if seed < 0 or images_per_site < 1 or test_images < 0:
        raise ValueError("seed and test_images must be 0 or more, images_per_site 1 or more")
    images = folder / "images"
    annotations = folder / "annotations"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)

    total = len(CAMERAS) * images_per_site + test_images
    done = 0
    backgrounds = {
        camera.name: _background(camera, size, np.random.default_rng([seed, number]))
        for number, camera in enumerate(CAMERAS)
    }
    # a random stream of its own for every set: changing one set's length changes no other set
    plans = {
        camera.name: _site_shots(camera, images_per_site, np.random.default_rng([seed, 10 + number]))
        for number, camera in enumerate(CAMERAS)
    }
    plans["test"] = _test_shots(test_images, np.random.default_rng([seed, 20]))
    files: dict[str, Path] = {}
    for number, (name, shots) in enumerate(plans.items()):
        rng = np.random.default_rng([seed, 30 + number])
        entries = []
        for shot in shots:
            frame, boxes = _draw(shot, backgrounds[shot.camera.name], size, rng)
            frame.save(images / shot.file_name, quality=90, subsampling=0)
            entries.append((shot, boxes))
            done += 1
            if on_image is not None:
                on_image(done, total)
        files[name] = annotations / f"{name}.json"
        files[name].write_text(json.dumps(_coco(name, entries, size, seed), indent=1) + "\n")
    return Scenes(
        images=images, sites={c.name: files[c.name] for c in CAMERAS}, test=files["test"], classes=CLASSES
    )


# --- what is in which image ----------------------------------------------------------------------------


def _site_shots(camera: Camera, count: int, rng: np.random.Generator) -> list[_Shot]:
    counts = rng.integers(OBJECTS_PER_IMAGE[0], OBJECTS_PER_IMAGE[1], size=count, endpoint=True)
    contents = _deal(counts.tolist(), camera.shares, rng)
    return [
        _Shot(camera=camera, file_name=f"{camera.name}-{i:04d}.jpg", classes=content)
        for i, content in enumerate(contents)
    ]


def _test_shots(count: int, rng: np.random.Generator) -> list[_Shot]:
    """Cameras take turns; over all images of a camera the classes are equally frequent."""
    shots: list[_Shot] = []
    for number, camera in enumerate(CAMERAS):
        mine = len(range(number, count, len(CAMERAS)))
        low, high = OBJECTS_PER_IMAGE
        counts = [low + i % (high - low + 1) for i in range(mine)]
        equal = tuple(1 / len(CLASSES) for _ in CLASSES)
        for i, content in enumerate(_deal(counts, equal, rng)):
            shots.append(_Shot(camera=camera, file_name=f"test-{camera.name}-{i:04d}.jpg", classes=content))
    return shots


def _deal(counts: list[int], shares: tuple[float, ...], rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Deal sum(counts) objects to the images; their classes follow `shares` exactly, up to rounding."""
    total = sum(counts)
    edges = np.rint(np.cumsum(shares) / sum(shares) * total).astype(int)
    numbers = np.diff(edges, prepend=0)
    deck = np.repeat(np.arange(len(CLASSES)), numbers)
    rng.shuffle(deck)
    hands = np.split(deck, np.cumsum(counts)[:-1]) if counts else []
    return [tuple(CLASSES[int(card)] for card in hand) for hand in hands]


# --- drawing -------------------------------------------------------------------------------------------


def _background(camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The camera's empty scene, `_SHAKE` pixels larger on every side; drawn larger for smooth edges."""
    width, height = size[0] + 2 * _SHAKE, size[1] + 2 * _SHAKE
    canvas = Image.new("RGB", (2 * width, 2 * height))
    BACKGROUNDS[camera.name](ImageDraw.Draw(canvas), 2 * width, 2 * height, rng)
    return canvas.resize((width, height), Image.Resampling.BOX)


def _draw(
    shot: _Shot, background: Image.Image, size: tuple[int, int], rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """The frame, and class and box of every object of which something is visible."""
    width, height = size
    dx, dy = (int(v) for v in rng.integers(0, 2 * _SHAKE, size=2, endpoint=True))
    frame = background.crop((dx, dy, dx + width, dy + height))

    placed: list[tuple[Box, Sprite]] = []
    for name in shot.classes:
        placed.append(_place(name, [box for box, _ in placed], size, rng))
    placed.sort(key=lambda item: item[0][1] + item[0][3])  # far to near: the feet say who hides whom

    visible: list[NDArray[np.bool_]] = []
    for box, sprite in placed:
        _shadow(frame, box)
        frame.paste(sprite.image, box[:2], sprite.image)
        mask = _on_canvas(sprite.mask, box, size)
        visible = [other & ~mask for other in visible] + [mask]
    found = [
        (sprite.name, _bounds(mask)) for (_, sprite), mask in zip(placed, visible, strict=True) if mask.any()
    ]
    return _caption(_expose(frame, shot.camera, rng), shot.camera), found


def _place(
    name: str, others: list[Box], size: tuple[int, int], rng: np.random.Generator
) -> tuple[Box, Sprite]:
    """An object where it hides, and is hidden by, little: the farther away, the smaller."""
    width, height = size
    unit = (width * height) ** 0.5
    far, near = HORIZON + 0.18, 0.98  # where its feet may stand
    best_overlap, best_box = 2.0, (0, 0, 0, 0)
    for _ in range(_PLACEMENT_TRIES):
        feet = rng.uniform(far, near)
        scale = (0.75 + 0.5 * (feet - far) / (near - far)) * rng.uniform(0.88, 1.12) * unit
        w, h = (round(scale * side) for side in PROPORTIONS[name])
        box = (round(rng.uniform(-0.12 * w, width - 0.88 * w)), round(feet * height) - h, w, h)
        overlap = max((_overlap(box, other) for other in others), default=0.0)
        if overlap < best_overlap:
            best_overlap, best_box = overlap, box
        if best_overlap <= _OVERLAP:
            break
    left, top, w, h = best_box
    sprite = paint(name, (w, h), rng)
    sprite_height, sprite_width = sprite.mask.shape
    return (left, top + h - sprite_height, sprite_width, sprite_height), sprite


def _overlap(a: Box, b: Box) -> float:
    """The common area of two boxes, as a share of the smaller one's."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, wide) * max(0, high) / max(1, min(a[2] * a[3], b[2] * b[3]))


def _shadow(frame: Image.Image, box: Box) -> None:
    """Darken the ground under an object."""
    left, top, w, h = box
    bottom, depth = top + h, max(2, round(0.05 * w))
    shade = Image.new("L", frame.size)
    ImageDraw.Draw(shade).ellipse([left, bottom - 2 * depth, left + w, bottom + depth // 2], fill=90)
    frame.paste((20, 20, 30), mask=shade)


def _on_canvas(mask: NDArray[np.bool_], box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """[height, width] of the image: where the object covers it. What is outside of the image is cut off."""
    width, height = size
    left, top, w, h = box
    canvas = np.zeros((height, width), dtype=np.bool_)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + w), min(height, top + h)
    canvas[y0:y1, x0:x1] = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas


def _bounds(mask: NDArray[np.bool_]) -> Box:
    """The box around all true pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def _expose(frame: Image.Image, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """The camera's light on the frame: gain, a slope from side to side, tint, greyness, sensor noise."""
    pixels = np.asarray(frame, dtype=np.float32)  # [height, width, 3]
    slope = np.linspace(-1, 1, pixels.shape[1], dtype=np.float32) * rng.uniform(-0.08, 0.08)
    gain = rng.uniform(*camera.light) * (1 + slope)
    pixels = pixels * gain[None, :, None].astype(np.float32) * np.asarray(camera.tint, dtype=np.float32)
    pixels += np.float32(camera.grey) * (pixels.mean(axis=2, keepdims=True) - pixels)
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(2, 5))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _caption(frame: Image.Image, camera: Camera) -> Image.Image:
    """Say in the top left corner, above all objects, what this is."""
    text, font = f"{CAPTION} | {camera.name}", ImageFont.load_default()
    left, top, right, bottom = font.getbbox(text)
    layer = Image.new("RGBA", frame.size)
    pen = ImageDraw.Draw(layer)
    pen.rectangle([2, 2, right - left + 8, bottom - top + 8], fill=(0, 0, 0, 110))
    pen.text((5 - left, 5 - top), text, font=font, fill=(255, 255, 255, 230))
    frame.paste(layer, mask=layer)
    return frame


# --- annotations ---------------------------------------------------------------------------------------


def _coco(
    name: str, entries: list[tuple[_Shot, list[tuple[str, Box]]]], size: tuple[int, int], seed: int
) -> dict[str, object]:
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, (shot, objects) in enumerate(entries, start=1):
        images.append(
            {
                "id": number,
                "file_name": shot.file_name,
                "width": size[0],
                "height": size[1],
                "camera": shot.camera.name,
            }
        )
        for label, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CLASSES.index(label) + 1,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {
            "description": f"Generated street scenes, set {name!r}: drawings, not camera images",
            "generated": True,
            "seed": seed,
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": label} for i, label in enumerate(CLASSES, start=1)],
    }
