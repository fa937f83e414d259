"""`fedqueue model …`: the versions of a job, what is decided about them, and getting one out of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cli.archs import archs
from cli.diff import diff
from cli.export import export
from cli.figures import Figures, metrics
from cli.options import JobArgument, StoreUrl, chosen_store, console, fail
from cli.registry import clear, promote, rollback
from cli.show import show
from cli.versions import number_of, stored_versions
from federation.errors import FedqueueError, NotFound
from storage.channels import CHANNELS, LATEST
from storage.files import replace_durably
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog
from storage.models import load_full_model
from storage.tensors import encode

app = typer.Typer(help="Model versions and architectures.", no_args_is_help=True)
app.command()(archs)
app.command()(metrics)
app.command()(export)
app.command()(show)
app.command()(diff)
app.command()(promote)
app.command()(rollback)
app.command()(clear)

Version = Annotated[
    str,
    typer.Option("--version", envvar="FEDQUEUE_CLI_VERSION", help=f"{', '.join(CHANNELS)}, or a number"),
]
PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}


@app.command("list")
def list_versions(job: JobArgument, store_url: StoreUrl = None) -> None:
    """Every version of a job: how it was made, what was measured of it, and whether it is latest, best, stable, in
    quarantine or rolled back.

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
    for number, made in stored_versions(records).items():
        table.add_row(
            str(number),
            figures.mark(number),
            f"{made.record.at:%Y-%m-%d %H:%M:%S}",
            made.how,
            *figures.row(number),
            str(made.stored.model.nbytes),
            made.stored.model.sha256[:12],
        )
    console.print(table)
    head = records[-1].head
    if head.quarantine is not None:
        console.print(
            f"version {head.quarantine.version} is in quarantine, version {head.offered.version} is offered instead: "
            f"{head.quarantine.reason}. `fedqueue model clear {job} {head.quarantine.version}`, or `fedqueue model "
            f"rollback {job} {head.offered.version}`",
            **PLAIN,
        )


@app.command()
def pull(
    job: JobArgument,
    version: Version = LATEST,
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
            current = VersionLog(store, job).version(number_of(store, job, version))
            data = encode(load_full_model(store, the_job, current.model))
        replace_durably(out, data)
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"{out} cannot be written: {exc}")
    console.print(f"version {current.version}: {out}, {len(data)} bytes")
