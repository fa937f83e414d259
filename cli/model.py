"""`fedqueue model …`: the versions of a job, and getting one out of the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cli.archs import archs
from cli.export import export
from cli.figures import Figures, metrics
from cli.options import JobArgument, StoreUrl, chosen_store, console, fail
from federation.errors import FedqueueError, NotFound
from federation.types import Created, Published
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog
from storage.models import load_full_model
from storage.tensors import encode

app = typer.Typer(help="Model versions and architectures.", no_args_is_help=True)
app.command()(archs)
app.command()(metrics)
app.command()(export)

Version = Annotated[
    int | None,
    typer.Option("--version", envvar="FEDQUEUE_CLI_VERSION", help="version number; none: the newest"),
]


@app.command("list")
def list_versions(job: JobArgument, store_url: StoreUrl = None) -> None:
    """The stored versions of a job, with what the server and the sites measured of them; which is best, and newest.

    Example: fedqueue model list street
    """
    store = chosen_store(store_url)
    try:
        with console.status("reading the log"):
            spec = load_job(store, job).spec
            records = list(VersionLog(store, job).history())
            figures = Figures.of(spec, records[-1].head, list_evaluations(store, job))
    except (FedqueueError, NotFound) as exc:
        fail(exc)
    table = Table("version", "", "made (UTC)", "updates", *figures.headings(), "bytes", "sha256", box=None)
    for record in records:
        if isinstance(record.event, Created | Published):
            current = record.head.current
            table.add_row(
                str(current.version),
                figures.mark(current.version),
                f"{record.at:%Y-%m-%d %H:%M:%S}",
                str(len(record.event.merged)) if isinstance(record.event, Published) else "0",
                *figures.row(current.version),
                str(current.model.nbytes),
                current.model.sha256[:12],
            )
    console.print(table)


@app.command()
def pull(
    job: JobArgument,
    version: Version = None,
    out: Annotated[Path, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="where to write it")] = Path(
        "model.safetensors"
    ),
    store_url: StoreUrl = None,
) -> None:
    """Download a version, verified, with all its tensors, as one safetensors file.

    Example: fedqueue model pull street --version 40 --out street.safetensors
    """
    store = chosen_store(store_url)
    try:
        with console.status("downloading"):
            the_job = load_job(store, job)
            log = VersionLog(store, job)
            current = log.head().head.current if version is None else log.version(version)
            data = encode(load_full_model(store, the_job, current.model))
    except FedqueueError as exc:
        fail(exc)
    temporary = out.with_name(f"{out.name}.part")
    temporary.write_bytes(data)
    os.replace(temporary, out)
    console.print(f"version {current.version}: {out}, {len(data)} bytes")
