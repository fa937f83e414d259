"""`fedqueue job list | show`: what jobs there are and what they say. A site's S3 account may read all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli.options import JobArgument, StoreUrl, chosen_store, console, fail, no_job, printable
from federation.base import Value
from federation.errors import FedqueueError, NotFound
from federation.governance import Member
from federation.jobs import Job
from federation.types import Head
from storage.blob import BlobStore
from storage.control import announced, list_members
from storage.jobs import load_job, newest_measured
from storage.log import VersionLog

Json = Annotated[bool, typer.Option("--json", envvar="FEDQUEUE_CLI_JSON", help="as JSON, for programs")]


def state(head: Head) -> str:
    """Whether sites may train, in words."""
    if head.closed is not None:
        return f"closed: {printable(head.closed)}"
    return printable(head.idle_because or "open")


@dataclass(frozen=True)
class Row:
    """What `list` says of a job."""

    job: Job
    head: Head
    members: list[Member]
    measured: tuple[int, float] | None
    """Version and value of evaluation.metric."""

    @classmethod
    def of(cls, store: BlobStore, job_id: str) -> Row:
        job = load_job(store, job_id)
        head = VersionLog(store, job_id).head().head
        return cls(job, head, list_members(store, job_id), newest_measured(store, job))

    def count(self, answer: str) -> int:
        return sum(member.answer == answer for member in self.members)

    def cells(self) -> list[str]:
        spec = self.job.spec
        measured = f"{self.measured[1]:.3f} at {self.measured[0]}" if self.measured else ""
        return [
            spec.id,
            self.job.submitted_by,
            escape(state(self.head)),
            f"{self.head.version} of {spec.stop.max_versions}",
            str(self.count("joined")),
            str(self.count("declined")),
            measured,
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "job": self.job.id,
            "submitted_by": self.job.submitted_by,
            "state": state(self.head),
            "version": self.head.version,
            "max_versions": self.job.spec.stop.max_versions,
            "joined": self.count("joined"),
            "declined": self.count("declined"),
            "metric": self.job.spec.evaluation.metric,
            "measured": self.measured and {"version": self.measured[0], "value": self.measured[1]},
        }


def list_jobs(as_json: Json = False, store_url: StoreUrl = None) -> None:
    """All jobs: who submitted them, whether they are open, their version, sites, and the newest measurement.

    Example: fedqueue job list
    """
    store = chosen_store(store_url)
    table = Table("job", "of", "state", "version", "joined", "declined", "newest metric", box=None)
    rows: list[dict[str, Any]] = []
    try:
        with console.status("reading the jobs"):
            for job_id in announced(store):
                try:
                    row = Row.of(store, job_id)
                except FedqueueError as exc:  # one that cannot be read hides no other
                    table.add_row(job_id, "", escape(f"cannot be read: {exc}"))
                    rows.append({"job": job_id, "error": str(exc)})
                else:
                    table.add_row(*row.cells())
                    rows.append(row.as_json())
    except FedqueueError as exc:
        fail(exc)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        console.print(table)
    else:
        console.print("there are no jobs: `fedqueue job submit FILE` makes one")


def show(job: JobArgument, as_json: Json = False, store_url: StoreUrl = None) -> None:
    """Everything that a job says, where it stands, and which sites have joined or declined, with their reasons.

    Example: fedqueue job show street
    """
    store = chosen_store(store_url)
    try:
        with console.status("reading the job"):
            row = Row.of(store, job)
    except NotFound:
        no_job(store, job)
    except FedqueueError as exc:
        fail(exc)
    if as_json:
        everything = {
            **row.as_json(),
            "description": json.loads(row.job.to_json()),
            "members": [json.loads(member.to_json()) for member in row.members],
        }
        typer.echo(json.dumps(everything, indent=2))
        return
    made = row.job
    console.print(
        f"[bold]{job}[/]  of {made.submitted_by}, {made.created_at:%Y-%m-%d %H:%M:%S} UTC", highlight=False
    )
    console.print(state(row.head), markup=False, highlight=False, soft_wrap=True)
    console.print(f"version {row.head.version}, {len(row.head.pending)} updates waiting", highlight=False)
    if row.measured:
        version, reached = row.measured
        line = f"{made.spec.evaluation.metric} {reached:.3f}, of version {version}"
        console.print(line, markup=False, highlight=False)
    table = Table("field", "value", box=None)
    unset = {
        "participants": "every enrolled site",
        "max_inflight": f"{made.spec.inflight_limit}, by the strategy",
    }
    for field, value in _fields(made.spec):
        table.add_row(field, escape(unset.get(field, value) if value == "none" else value))
    table.add_row("initial model", f"{made.initial.sha256[:12]}, {made.initial.nbytes} bytes")
    table.add_row("largest update", f"{made.max_update_bytes} bytes")
    console.print(table)
    sites = Table("site", "answer", "images", "at (UTC)", "reason", box=None)
    for member in row.members:
        images = str(member.num_images or "")
        reason = escape(printable(member.reason))
        sites.add_row(member.site, member.answer, images, f"{member.at:%Y-%m-%d %H:%M:%S}", reason)
    console.print(sites if row.members else "no site has answered yet")


def _fields(value: Value, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field with its value, those of values within it as `plan.batch_size`."""
    for name in type(value).model_fields:
        found = getattr(value, name)
        if isinstance(found, Value):
            yield from _fields(found, f"{prefix}{name}.")
        elif isinstance(found, tuple):
            yield f"{prefix}{name}", ", ".join(map(str, found)) or "none"
        else:
            yield f"{prefix}{name}", "none" if found is None else str(found)
