"""What a demo trains on: generated scenes, or a folder of real images split by company."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cli.options import console, fail
from federation.ids import is_name


@dataclass(frozen=True)
class DemoData:
    """COCO files by site, one folder of images, a common test set."""

    images: Path
    sites: dict[str, Path]
    test: Path
    classes: tuple[str, ...]
    pretrained: Path | None
    generated: bool


def render_scenes(folder: Path) -> DemoData:
    """Draw the generated street scenes into `folder`: deterministic, three differently skewed cameras."""
    from rich.progress import Progress

    from detection import scenes

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rendering street-like scenes", total=None)
        rendered = scenes.render(
            folder, on_image=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    return DemoData(
        images=rendered.images,
        sites=dict(rendered.sites),
        test=rendered.test,
        classes=_classes(rendered.test),
        pretrained=None,
        generated=True,
    )


def find_split(folder: Path, sites: int) -> DemoData:
    """A folder with images/, annotations/test.json, annotations/sites<N>/*.json, and perhaps weights/*.pth."""
    annotations = folder / "annotations"
    files = [
        f for f in sorted((annotations / f"sites{sites}").glob("*.json")) if not f.stem.startswith("test")
    ]
    if len(files) != sites or not (annotations / "test.json").is_file() or not (folder / "images").is_dir():
        splits = sorted(path.name for path in annotations.glob("sites*"))
        fail(
            f"{folder} needs images/, annotations/test.json and {sites} files in annotations/sites{sites}/; "
            f"found splits: {', '.join(splits) or 'none'}"
        )
    weights = sorted((folder / "weights").glob("*.pth"))
    return DemoData(
        images=folder / "images",
        sites={_site_name(file.stem): file for file in files},
        test=annotations / "test.json",
        classes=_classes(annotations / "test.json"),
        pretrained=weights[0] if weights else None,
        generated=False,
    )


def _site_name(stem: str) -> str:
    name = "site-" + re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not is_name(name):
        fail(f"cannot make a site name of {stem!r}")
    return name


def _classes(annotations: Path) -> tuple[str, ...]:
    categories = json.loads(annotations.read_text())["categories"]
    return tuple(category["name"] for category in sorted(categories, key=lambda c: int(c["id"])))
