"""What a demo leaves: a table, two pictures, a summary to read by programs, and the next command to type."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from cli.demo.alone import Alone
from cli.demo.data import DemoData
from cli.demo.live import MAP_50, Watched
from cli.options import console
from detection.dataset import Dataset, load_dataset
from detection.draw import contact_sheet, plot_map
from detection.predict import predict
from federation.settings import Settings
from federation.types import MAP, Created, Published
from storage.account import Account, accounts
from storage.blob import BlobStore
from storage.models import load_full_model

SHOWN_IMAGES = 9
SHOWN_SCORE = 0.35


def report(
    folder: Path,
    settings: Settings,
    data: DemoData,
    store: BlobStore,
    watched: Watched,
    alone: dict[str, Alone],
    seconds: dict[str, float],
    began: float,
) -> bool:
    """Print and write everything. True if the federation beats every site alone.

    `began`: of the whole demo, on the monotonic clock.
    """
    spec, version = watched.job.spec, watched.version
    final = watched.evaluations[version].metrics
    share = accounts(watched.records)
    datasets = {site: load_dataset(file, data.images, spec.classes) for site, file in data.sites.items()}
    image_bytes = {site: dataset.image_bytes for site, dataset in datasets.items()}
    _table(watched, alone, share, image_bytes, datasets)

    weights = load_full_model(store, watched.job, watched.records[-1].head.current.model).arrays()
    test = load_dataset(data.test, data.images, spec.classes)
    pictures = folder / "detections.png"
    chosen = test.items[:: max(1, len(test.items) // SHOWN_IMAGES)][:SHOWN_IMAGES]
    found = predict(spec, weights, [item.path for item in chosen], SHOWN_SCORE)
    what = "generated scenes" if data.generated else "test images"
    contact_sheet(
        chosen, found, spec.classes, pictures, title=f"{spec.id}, version {version}: detections on {what}"
    )
    plot = folder / "map.png"
    plot_map(
        _curve(watched),
        {site: result.metrics[MAP_50] for site, result in alone.items()},
        plot,
        title=f"{spec.id}: {len(data.sites)} sites, {spec.aggregation.strategy}"
        + (", generated scenes" if data.generated else ""),
    )
    beats = all(final[MAP_50] > result.metrics[MAP_50] for result in alone.values())
    seconds["in all"] = time.monotonic() - began
    summary = {
        "job": spec.id,
        "generated_data": data.generated,
        "version": version,
        "federation": final,
        "federation_beats_every_site": beats,
        "alone": {site: asdict(result) for site, result in alone.items()},
        "bytes_sent": {site: s.uploaded_bytes for site, s in share.items()},
        "image_bytes": image_bytes,
        "mean_staleness": {site: s.mean_staleness for site, s in share.items()},
        "seconds": seconds,
        "curve": _curve(watched),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    where = f" --store-url file:{_short(folder / 'store')}" if settings.embedded else ""
    command = f"{_command()} predict {_short(chosen[0].path)} --job {spec.id}{where}"
    for name, text in {
        "detections": _short(pictures),
        "mAP in time": _short(plot),
        "figures": _short(folder / "summary.json"),
        "model": f"{_short(folder / 'model.safetensors')}  (version {version}, {spec.arch})",
        "predict": f"{command} --out {_short(folder / 'predictions')}",
    }.items():
        console.print(f"{name:13}{text}", highlight=False, soft_wrap=True)
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"took         {took}", highlight=False)
    return beats


def _short(path: Path) -> Path:
    """As it is typed from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _command() -> str:
    """This command as it was typed, which may be .venv/bin/fedqueue."""
    typed = Path(sys.argv[0])
    return str(_short(typed)) if typed.name == "fedqueue" else "fedqueue"


def _curve(watched: Watched) -> list[tuple[float, float]]:
    """(seconds since the job was created, mAP@0.5) of every measured version."""
    made = {
        record.head.version: (record.at - watched.records[0].at).total_seconds()
        for record in watched.records
        if isinstance(record.event, Created | Published)
    }
    return [(made[v], e.metrics[MAP_50]) for v, e in sorted(watched.evaluations.items()) if v in made]


def _table(
    watched: Watched,
    alone: dict[str, Alone],
    share: dict[str, Account],
    image_bytes: dict[str, int],
    datasets: dict[str, Dataset],
) -> None:
    final = watched.evaluations[watched.version].metrics
    table = Table(title="one model for all, and each site alone", title_justify="left")
    for column in (
        "",
        "mAP@0.5",
        "mAP@[.5:.95]",
        "images",
        "local steps",
        "updates",
        "mean τ",
        "MB sent",
        "MB of images",
    ):
        table.add_column(column, justify="left" if not column else "right")
    nothing = Account()
    for site, result in alone.items():
        s = share.get(site, nothing)
        table.add_row(
            f"{site} alone",
            f"{result.metrics[MAP_50]:.3f}",
            f"{result.metrics[MAP]:.3f}",
            str(datasets[site].num_examples),
            str(result.steps),
            str(s.merged),
            f"{s.mean_staleness:.2f}",
            f"{s.uploaded_bytes / 1e6:.1f}",
            f"{image_bytes[site] / 1e6:.1f}",
        )
    table.add_section()
    sent, stayed = sum(s.uploaded_bytes for s in share.values()), sum(image_bytes.values())
    table.add_row(
        "federation",
        f"[bold green]{final[MAP_50]:.3f}[/]",
        f"[bold green]{final[MAP]:.3f}[/]",
        str(sum(d.num_examples for d in datasets.values())),
        str(sum(result.steps for result in alone.values())),
        str(sum(s.merged for s in share.values())),
        "",
        f"{sent / 1e6:.1f}",
        f"{stayed / 1e6:.1f}",
    )
    console.print(table)
