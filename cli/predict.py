"""`fedqueue predict`: use a version on images, beside the cameras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from cli.options import JobId, StoreUrl, console, fail, load
from federation.errors import FedqueueError
from storage.jobs import load_job
from storage.log import VersionLog
from storage.models import load_full_model
from storage.open import open_store


def predict(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    job: JobId,
    version: Annotated[
        int | None, typer.Option(envvar="FEDQUEUE_CLI_VERSION", help="version number; none: the newest")
    ] = None,
    out: Annotated[Path, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="folder for pictures and JSON")] = Path(
        "predictions"
    ),
    score: Annotated[
        float, typer.Option(envvar="FEDQUEUE_CLI_SCORE", min=0, max=1, help="least score, 0 to 1")
    ] = 0.35,
    store_url: StoreUrl = None,
) -> None:
    """Pull a version, detect objects in images, write annotated pictures and COCO-style results.

    Example: fedqueue predict frames/0001.jpg --job street --out predictions
    """
    from PIL import Image

    from detection.draw import draw
    from detection.predict import predict as detect

    store = open_store(load(store_url=store_url))
    out.mkdir(parents=True, exist_ok=True)
    results = []
    try:
        the_job = load_job(store, job)
        log = VersionLog(store, job)
        current = log.head().head.current if version is None else log.version(version)
        weights = load_full_model(store, the_job, current.model).arrays()
        for path in track(images, "detecting", console=console, transient=True):
            (found,) = detect(the_job.spec, weights, [path], score)
            with Image.open(path) as image:
                draw(image, found, the_job.spec.classes).save(out / f"{path.stem}.png")
            for box, label, confidence in zip(found.boxes, found.labels, found.scores, strict=True):
                left, top, right, bottom = (round(float(value), 2) for value in box)
                results.append(
                    {
                        "file_name": path.name,
                        "category": the_job.spec.classes[int(label) - 1],
                        "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                        "score": round(float(confidence), 4),
                    }
                )
    except FedqueueError as exc:
        fail(exc)
    (out / "predictions.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(
        f"version {current.version}: {len(results)} objects in {len(images)} images, written to {out}"
    )
