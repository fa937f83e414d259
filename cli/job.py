"""`fedqueue job …`: create a job, see where it stands, read its log."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from broker.open import connect, declare
from cli.figures import Figures
from cli.initial import first_weights
from cli.options import BrokerUrl, JobArgument, StoreUrl, chosen_store, console, existing, export, fail, load
from cli.shares import shares
from federation.errors import BadJob, FedqueueError, NotFound, Transient
from federation.jobs import JobSpec
from federation.settings import Settings
from federation.types import Accepted, Closed, Collected, LogRecord, Published, Refused
from storage.blob import BlobStore
from storage.jobs import list_evaluations, list_jobs, load_job
from storage.log import VersionLog
from storage.models import save_model
from storage.open import open_store
from storage.probe import probe
from storage.tensors import from_arrays

MEASURED_SHOWN = 5
"""Newest measured versions in `status`, and the best one."""

app = typer.Typer(help="Create jobs and look at them.", no_args_is_help=True)


@app.command()
def create(
    file: Annotated[Path, typer.Argument(help="a job description, TOML (docs/jobs.md)")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "--pretrained",
            envvar="FEDQUEUE_CLI_WEIGHTS",
            help="first weights, of which is taken what fits: a file (.pth, .safetensors), or torchvision's own by "
            "name, downloaded (`fedqueue model archs` lists them); none: random",
        ),
    ] = None,
    wait_s: Annotated[
        float, typer.Option(envvar="FEDQUEUE_CLI_WAIT_S", help="seconds to wait for a worker to make it")
    ] = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Make initial weights, upload them, and ask a worker to create the job.

    Example: fedqueue job create job.toml --weights backbone.pth
    """
    settings = load(broker_url=broker_url, store_url=store_url)
    try:
        raw = tomllib.loads(existing(file, "job description").read_text())
        spec = JobSpec.from_json(json.dumps(raw))
        with console.status("making initial weights and waiting for a worker"):
            submit(settings, open_store(settings), spec, weights, wait_s, report=_say)
    except tomllib.TOMLDecodeError as exc:
        fail(f"{file}: {exc}")
    except FedqueueError as exc:
        fail(exc)
    console.print(f"job {spec.id} is there, at version 0")


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def submit(
    settings: Settings,
    store: BlobStore,
    spec: JobSpec,
    weights: str | None,
    wait_s: float,
    alive: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Upload version 0 and send `create_job`. Raises BadJob; Transient if no worker made it in `wait_s`.

    weights: as `first_weights` takes them; `report` gets its lines. `alive` is called while waiting, and may raise.
    """
    export(settings)
    from tasks.celery import CREATE_JOB, sender

    probe(store)
    if _exists(store, spec.id):
        raise BadJob(f"there is a job {spec.id!r} already: choose another id")
    first = first_weights(spec, weights)
    for line in first.report:
        report(line)
    files = {
        "initial": save_model(store, spec.id, from_arrays(first.arrays)),
        "first": save_model(store, spec.id, from_arrays({n: first.arrays[n] for n in first.exchanged})),
    }
    broker = connect(settings)
    try:
        declare(settings)
        request = {name: value.to_json().decode() for name, value in {"spec": spec, **files}.items()}
        sender(settings, broker)(CREATE_JOB, request)
    finally:
        broker.close()
    deadline = time.monotonic() + wait_s
    while not _exists(store, spec.id):
        alive()
        if time.monotonic() > deadline:
            raise Transient(
                f"no worker made the job in {wait_s:.0f} s; the request stays queued: start `fedqueue worker`"
            )
        time.sleep(0.1)


def _exists(store: BlobStore, job_id: str) -> bool:
    try:
        VersionLog(store, job_id).head()
    except NotFound:
        return False
    return True


@app.command()
def status(job: JobArgument, store_url: StoreUrl = None) -> None:
    """Where a job stands: version, what waits, each site's share, the newest metrics and the best, bytes.

    Example: fedqueue job status street
    """
    store = chosen_store(store_url)
    try:
        with console.status("reading the log"):
            the_job = load_job(store, job)
            records = list(VersionLog(store, job).history())
            evaluations = list_evaluations(store, job)
    except NotFound:
        fail(f"there is no job {job!r}; there are: {', '.join(list_jobs(store)) or 'none'}")
    except FedqueueError as exc:
        fail(exc)
    head = records[-1].head
    console.print(f"[bold]{job}[/]  {the_job.spec.arch}, {the_job.spec.aggregation.strategy}")
    console.print(
        f"version {head.version} of {the_job.spec.stop.max_versions}, {len(head.pending)} updates waiting"
    )
    console.print(f"closed: {head.closed}" if head.closed else "open")
    figures = Figures.of(the_job.spec, head, evaluations)
    if figures.measured:
        measured = Table("version", "", *figures.headings(), box=None)
        best = {figures.best.version} if figures.best is not None else set()
        for version in sorted({*sorted(figures.measured)[-MEASURED_SHOWN:], *best}):
            measured.add_row(str(version), figures.mark(version), *figures.row(version))
        console.print(measured)
        console.print()
    table = Table("site", "merged", "rejected", "mean staleness", "sum of weights", "MB sent", box=None)
    for site, share in sorted(shares(records).items()):
        table.add_row(
            site,
            str(share.merged),
            str(share.refused),
            f"{share.mean_staleness:.2f}",
            f"{share.weight:.2f}",
            f"{share.sent_bytes / 1e6:.2f}",
        )
    console.print(table)


@app.command()
def history(job: JobArgument, store_url: StoreUrl = None) -> None:
    """The job's log, one line per record.

    Example: fedqueue job history street
    """
    store = chosen_store(store_url)
    try:
        for record in VersionLog(store, job).history():
            console.print(
                f"{record.seq:6d}  {record.at:%Y-%m-%d %H:%M:%S}  v{record.head.version:<5d} {_line(record)}",
                highlight=False,
                soft_wrap=True,
            )
    except NotFound:
        fail(f"there is no job {job!r}; there are: {', '.join(list_jobs(store)) or 'none'}")
    except FedqueueError as exc:
        fail(exc)


def _line(record: LogRecord) -> str:
    event = record.event
    if isinstance(event, Accepted):
        c = event.contribution
        return (
            f"accepted   {c.update.update_id} of {c.update.site}, base {c.update.base_version}, "
            f"staleness {c.staleness}, weight {c.weight:.4f}"
        )
    if isinstance(event, Refused):
        return f"refused    {event.refusal.update.update_id} of {event.refusal.update.site}: {event.refusal.message}"
    if isinstance(event, Published):
        merged = ", ".join(f"{c.update.site} (τ {c.staleness}, {c.weight:.3f})" for c in event.merged)
        refused = f"; refused {len(event.refused)}" if event.refused else ""
        return f"published  {len(event.merged)} merged: {merged}{refused}"
    if isinstance(event, Closed):
        return f"closed     {event.reason}"
    if isinstance(event, Collected):
        return f"collected  {len(event.keys)} objects that are not needed any more"
    return "created"
