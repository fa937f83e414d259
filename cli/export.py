"""`fedqueue model export`: a version as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cli.options import JobId, StoreUrl, console, fail, load
from cli.predict import pull_version
from federation.errors import FedqueueError
from federation.settings import Settings
from producers.offline import Pulled
from storage.channels import LATEST, check_wanted
from storage.files import replace_durably


def export(
    job: JobId,
    onnx: Annotated[Path, typer.Option(envvar="FEDQUEUE_CLI_ONNX", help="the ONNX file to write")],
    version: Annotated[
        str,
        typer.Option(envvar="FEDQUEUE_CLI_VERSION", help="latest, best (as measured), stable, or a number"),
    ] = LATEST,
    store_url: StoreUrl = None,
) -> None:
    """Write a version as an ONNX file that does the same in onnxruntime, which is checked (docs/export.md).

    Example: fedqueue model export --job street --version best --onnx street.onnx
    """
    settings = load(store_url=store_url)
    try:
        wanted = check_wanted(version)
    except ValueError as exc:
        fail(str(exc))
    try:
        from detection.export import export_onnx

        pulled = pull_version(settings, job, wanted, offline=False)
        if pulled.away:
            console.print(
                f"[yellow]the store is away, from the cache:[/] {escape(pulled.away)}", highlight=False
            )
        with console.status("exporting and comparing"):
            exported = export_onnx(pulled.job.spec, pulled.weights, metadata(settings, pulled))
        onnx.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(onnx, exported.data)
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"{onnx} cannot be written: {exc}")
    console.print(
        f"version {pulled.version}: {onnx}, {len(exported.data)} bytes; in onnxruntime the same "
        f"{exported.detections} detections within {exported.difference:.1e}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if not exported.detections:
        console.print(
            "[yellow]in the images of the comparison the detector finds nothing: before you rely on the file, compare "
            "it with `fedqueue predict` on images of yours[/]",
            highlight=False,
            soft_wrap=True,
        )


def metadata(settings: Settings, pulled: Pulled) -> dict[str, str]:
    """What the file says of itself (docs/export.md)."""
    about = {"job": pulled.job.id, "version": str(pulled.version), "sha256": pulled.sha256}
    if pulled.own_norm:
        about["norm"] = f"BatchNorm layers of site {settings.site or 'here'}"
    return about
