"""The companies: each has a camera, annotations that nobody else sees, settings, and a policy of its own."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from detection import scenes
from examples.three_companies.stage import Actor
from federation.settings import Settings

NAMES = ("company-a", "company-b", "company-c")
IMAGES_PER_COMPANY = 40
TEST_IMAGES = 30
POLICIES: dict[str, dict[str, object]] = {
    "company-a": {},
    "company-b": {},
    "company-c": {"site_submitters": ["company-b"]},  # what A submits it declines
}


@dataclass(frozen=True)
class Cast:
    """Everybody. `classes` of the scenes."""

    operator: Actor
    a: Actor
    b: Actor
    c: Actor
    classes: tuple[str, ...]

    @property
    def settings(self) -> Settings:
        """The operator's, to look at the store while waiting."""
        values = tomllib.loads((self.operator.folder / "fedqueue.toml").read_text())
        return Settings.model_validate(
            {k: v for k, v in values.items() if k.endswith("_url") or k.startswith("store_")}
        )


def assemble(folder: Path, configs: Path | None) -> Cast:
    """Draw each company's images into its own folder, and write everybody's settings.

    configs: a folder with server.toml and <company>.toml, accounts on real servers as `make servers` makes them;
    None: everything is embedded, in `folder`.
    """
    drawn = scenes.render(
        folder / "scenes", images_per_site=IMAGES_PER_COMPANY, test_images=TEST_IMAGES, size=(192, 160)
    )
    for company, camera in zip(NAMES, drawn.sites, strict=True):
        _hand_over(drawn.images, f"{camera}-*.jpg", drawn.sites[camera], folder / company)
    _hand_over(drawn.images, "test-*.jpg", drawn.test, folder / "operator")
    shutil.rmtree(folder / "scenes")
    embedded = {
        "broker_url": f"sqlite:{folder / 'queue.db'}",
        "store_url": f"file:{folder / 'store'}",
        "live_url": f"file:{folder / 'live'}",
    }

    def actor(name: str, config: str, own: Mapping[str, object]) -> Actor:
        accounts = embedded if configs is None else tomllib.loads((configs / config).read_text())
        _write(folder / name / "fedqueue.toml", {**accounts, "threads": 1, **own})
        return Actor(name, folder / name)

    held_out = {
        "eval_annotations": str(folder / "operator" / "annotations.json"),
        "eval_images": str(folder / "operator" / "images"),
        "oversee_every_s": 1.0,
    }
    operator = actor("operator", "server.toml", held_out)
    a, b, c = (
        actor(
            name,
            f"{name}.toml",
            {
                "site": name,
                "site_annotations": str(folder / name / "annotations.json"),
                "site_images": str(folder / name / "images"),
                "site_classes": list(drawn.classes),  # a job of some of them will do, too
                "site_state": str(folder / name / "state"),
                "predict_cache": str(folder / name / "models"),
                "site_duty": 0.5,
                "poll_s": 0.5,
                "heartbeat_s": 1.0,
                "heartbeat_ttl_s": 5.0,
                **POLICIES[name],
            },
        )
        for name in NAMES
    )
    return Cast(operator, a, b, c, drawn.classes)


def _hand_over(images: Path, pattern: str, annotations: Path, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for path in sorted(images.glob(pattern)):
        path.rename(folder / "images" / path.name)
    annotations.rename(folder / "annotations.json")


def _write(path: Path, values: Mapping[str, object]) -> None:
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
