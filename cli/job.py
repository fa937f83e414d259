"""`fedqueue job …`: submit a job, see where it stands, read its log, pause, resume and stop it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from cli.asking import WaitS, ask
from cli.joblist import list_jobs, show
from cli.metrics import metrics
from cli.options import (
    BrokerUrl,
    JobArgument,
    StoreUrl,
    chosen_store,
    console,
    fail,
    load,
    no_job,
    printable,
)
from cli.status import status
from cli.submission import check, schema, submit
from federation.base import findings
from federation.errors import FedqueueError, NotFound
from federation.requests import SteerJob
from federation.types import (
    Accepted,
    Cleared,
    Closed,
    Collected,
    Created,
    Held,
    LogRecord,
    Promoted,
    Published,
    Quarantined,
    Refused,
    Resumed,
    RolledBack,
)
from storage.log import VersionLog
from storage.open import open_store

app = typer.Typer(help="Submit jobs, look at them, steer them.", no_args_is_help=True)
app.command()(submit)
app.command()(check)
app.command()(schema)
app.command("list")(list_jobs)
app.command()(show)
app.command()(status)
app.command()(metrics)

Reason = Annotated[
    str, typer.Option(envvar="FEDQUEUE_CLI_REASON", help="why, for everybody who reads the log")
]


@app.command()
def pause(
    job: JobArgument,
    reason: Reason = "",
    wait_s: WaitS = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Let no site start a training until the job is resumed. Of the job's submitter, or an operator.

    What sites have finished by then, or are at work on, is merged all the same.

    Example: fedqueue job pause street --reason "new labels on Monday"
    """
    _steer(job, "pause", reason, wait_s, broker_url, store_url)


@app.command()
def resume(
    job: JobArgument, wait_s: WaitS = 60.0, broker_url: BrokerUrl = None, store_url: StoreUrl = None
) -> None:
    """Let sites train again; also a job that still waits for sites. Of the job's submitter, or an operator.

    Example: fedqueue job resume street
    """
    _steer(job, "resume", "", wait_s, broker_url, store_url)


@app.command()
def stop(
    job: JobArgument,
    reason: Reason = "",
    wait_s: WaitS = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Close the job for good: nothing is merged any more. Of the job's submitter, or an operator.

    Its versions stay. An update that comes later is refused as job-closed.

    Example: fedqueue job stop street --reason "good enough"
    """
    _steer(job, "stop", reason, wait_s, broker_url, store_url)


def _steer(
    job: str,
    action: Literal["pause", "resume", "stop"],
    reason: str,
    wait_s: float,
    broker_url: str | None,
    store_url: str | None,
) -> None:
    settings = load(broker_url=broker_url, store_url=store_url)
    try:
        store, asked = open_store(settings), SteerJob(job=job, action=action, reason=reason)
    except FedqueueError as exc:
        fail(exc)
    except ValidationError as exc:
        fail(*findings(exc))
    ask(settings, store, asked, wait_s)


@app.command()
def history(job: JobArgument, store_url: StoreUrl = None) -> None:
    """The job's log, one line per record.

    Example: fedqueue job history street
    """
    store = chosen_store(store_url)
    try:
        for record in VersionLog(store, job).history():
            where = f"{record.seq:6d}  {record.at:%Y-%m-%d %H:%M:%S}  v{record.head.version:<5d}"
            line = f"{where} {printable(_line(record))}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    except NotFound:
        no_job(store, job)
    except FedqueueError as exc:
        fail(exc)


def _line(record: LogRecord) -> str:
    match record.event:
        case Created():
            return "created"
        case Accepted(contribution=c):
            return (
                f"accepted   {c.update.update_id} of {c.update.site}, base {c.update.base_version}, "
                f"staleness {c.staleness}, weight {c.weight:.4f}"
            )
        case Refused(refusal=r):
            return f"refused    {r.update.update_id} of {r.update.site}: {r.message}"
        case Published() as event:
            merged = ", ".join(f"{c.update.site} (τ {c.staleness}, {c.weight:.3f})" for c in event.merged)
            refused = f"; refused {len(event.refused)}" if event.refused else ""
            return f"published  {len(event.merged)} merged: {merged}{refused}"
        case Held() as event:
            return f"held       by {event.by}: {event.reason}"
        case Resumed() as event:
            return f"resumed    by {event.by}"
        case Quarantined() as event:
            return f"quarantine version {event.version}: {event.reason}"
        case Cleared() as event:
            return f"cleared    version {event.version} is out of quarantine, by {event.by}"
        case Promoted() as event:
            return f"promoted   version {event.version} is stable, by {event.by}"
        case RolledBack() as event:
            refused = f"; refused {len(event.refused)}" if event.refused else ""
            why = f": {event.reason}" if event.reason else ""
            return f"rolled-back to version {event.to}, by {event.by}{why}{refused}"
        case Closed() as event:
            return f"closed     by {event.by}: {event.reason}"
        case Collected() as event:
            return f"collected  {len(event.keys)} objects that are not needed any more"
