"""`fedqueue audit` and `fedqueue replay`: is everything there, and does the log make these very models?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cli.options import JobArgument, StoreUrl, chosen_store, console, fail
from federation.errors import FedqueueError, NotFound
from storage.audit import Audit, Finding
from storage.blob import BlobStore
from storage.jobs import list_jobs
from storage.tensors import encode
from tasks.replay import Replay


def audit(
    job: JobArgument,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", envvar="FEDQUEUE_CLI_QUICK", help="compare sizes, not digests, of models and payloads"
        ),
    ] = False,
    store_url: StoreUrl = None,
) -> None:
    """Check that nothing of a job is lost and nothing counted twice. Writes nothing; workers may run on.

    One line per finding, then a summary. Errors break a promise, and make the exit status 1; notes do not.

    Example: fedqueue audit street
    """
    store = chosen_store(store_url)
    run = Audit(store, job, digests=not quick)
    try:
        with console.status("reading the log") as status:
            for finding in run.findings():
                console.print(_line(finding), soft_wrap=True)
                status.update(f"{run.tally.records} records, {run.tally.bytes / 1e6:.0f} MB checked")
    except NotFound:
        fail(_no_job(store, job))
    except FedqueueError as exc:
        fail(exc)
    tally = run.tally
    verdict = "[bold red]FAIL[/]" if tally.errors else "[bold green]pass[/]"
    console.print(
        f"{verdict}  {job}: {tally.records} records, {tally.versions} versions; updates: {tally.merged} merged, "
        f"{tally.rejected} rejected, {tally.pending} pending, {tally.orphaned} orphaned; "
        f"{tally.bytes} bytes checked; {tally.errors} errors, {tally.notes} notes",
        highlight=False,
        soft_wrap=True,
    )
    if tally.errors:
        raise typer.Exit(1)


def replay(
    job: JobArgument,
    to: Annotated[
        int | None,
        typer.Option("--to", envvar="FEDQUEUE_CLI_TO", min=0, help="last version to make; none: the newest"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="write the last version's file here")
    ] = None,
    store_url: StoreUrl = None,
) -> None:
    """Make every version again from version 0, the log and the stored updates, and compare bit for bit.

    Names the first record that differs, with exit status 1. Writes nothing but what --out asks for.

    Example: fedqueue replay street --to 40 --out street-40.safetensors
    """
    store = chosen_store(store_url)
    versions = updates = 0
    try:
        run = Replay(store, job)
        with console.status("reading the log") as status:
            for step in run.steps(to):
                if not step.equal:
                    fail(f"record {step.seq}, version {step.version}: {step.difference}")
                versions, updates = versions + bool(step.updates), updates + step.updates
                status.update(f"version {step.version}: equal")
    except NotFound as exc:
        fail(exc if job in list_jobs(store) else _no_job(store, job))
    except FedqueueError as exc:
        fail(exc)
    console.print(f"{versions} versions from {updates} updates, all equal", highlight=False)
    if out is not None:
        temporary = out.with_name(f"{out.name}.part")
        temporary.write_bytes(encode(run.model))
        os.replace(temporary, out)
        console.print(f"version {step.version}: {out}", highlight=False)


def _line(finding: Finding) -> Text:
    style = "bold red" if finding.level == "error" else "yellow"
    return Text.assemble((f"{finding.level:5s}", style), f"  {finding.subject}: {finding.message}")


def _no_job(store: BlobStore, job: str) -> str:
    return f"there is no job {job!r}; there are: {', '.join(list_jobs(store)) or 'none'}"
