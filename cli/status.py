"""`fedqueue job status`: where a job stands, and what it cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import typer
from rich.table import Table

from cli.figures import Figures
from cli.joblist import Json, state
from cli.options import JobArgument, StoreUrl, chosen_store, console, fail, no_job
from cli.units import bytes_text, ratio_text
from federation.errors import FedqueueError, NotFound
from federation.jobs import Job
from federation.types import Evaluation, LogRecord
from storage.account import Account, accounts, total
from storage.blob import BlobStore
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog

MEASURED_SHOWN = 5
"""Newest measured versions, and the best one."""


@dataclass(frozen=True)
class JobState:
    """Everything that the store says of a job's progress."""

    job: Job
    newest: LogRecord
    accounts: dict[str, Account]
    evaluations: list[Evaluation]

    @classmethod
    def read(cls, store: BlobStore, job_id: str) -> JobState:
        """Exits if there is no such job, or the store cannot be read."""
        try:
            with console.status("reading the log"):
                job = load_job(store, job_id)
                records = list(VersionLog(store, job_id).history())
                return cls(job, records[-1], accounts(records), list_evaluations(store, job_id))
        except NotFound:
            no_job(store, job_id)
        except FedqueueError as exc:
            fail(exc)

    @property
    def figures(self) -> Figures:
        return Figures.of(self.job.spec, self.newest.head, self.evaluations)


def status(job: JobArgument, as_json: Json = False, store_url: StoreUrl = None) -> None:
    """Where a job stands: version, what waits, the newest metrics and the best; each site's share, and what travelled.

    Example: fedqueue job status street
    """
    found = JobState.read(chosen_store(store_url), job)
    if as_json:
        typer.echo(json.dumps(_document(found), indent=1))
        return
    spec, head, figures = found.job.spec, found.newest.head, found.figures
    console.print(f"[bold]{job}[/]  {spec.arch}, {spec.aggregation.strategy}")
    console.print(f"version {head.version} of {spec.stop.max_versions}, {len(head.pending)} updates waiting")
    _say(state(head))
    if figures.measured:
        measured = Table("version", "", *figures.headings(), box=None)
        best = {figures.best.version} if figures.best is not None else set()
        for version in sorted({*sorted(figures.measured)[-MEASURED_SHOWN:], *best}):
            measured.add_row(str(version), figures.mark(version), *figures.row(version))
        console.print(measured)
        console.print()
    table = Table(
        *("site", "merged", "rejected", "mean staleness", "sum of weights", "up", "down", "images at home"),
        "ratio",
        box=None,
    )
    for site, account in found.accounts.items():
        table.add_row(
            site,
            str(account.merged),
            str(account.rejected),
            f"{account.mean_staleness:.2f}",
            f"{account.weight:.2f}",
            *_bytes(account),
            ratio_text(account.ratio),
        )
    console.print(table)
    if found.accounts:
        _say(cost_line(found.accounts))


def cost_line(by_site: dict[str, Account]) -> str:
    """What stayed and what travelled, of all sites together, and who did not tell."""
    whole = total(by_site.values())
    stayed = bytes_text(whole.image_bytes) if whole.image_bytes else "unknown"
    line = f"images stayed home: {stayed}; travelled: {bytes_text(whole.travelled_bytes)}"
    if whole.ratio is not None:
        line += f"; ratio {ratio_text(whole.ratio)}"
    silent = [site for site, account in by_site.items() if account.untold]
    return line + (f" (not all told by {', '.join(silent)})" if silent else "")


def account_json(account: Account) -> dict[str, Any]:
    """For programs. null: not known."""
    return {
        "merged": account.merged,
        "rejected": account.rejected,
        "mean_staleness": account.mean_staleness,
        "weight": account.weight,
        "uploaded_bytes": account.uploaded_bytes,
        "downloaded_bytes": account.downloaded_bytes,
        "image_bytes": account.image_bytes or None,
        "ratio": account.ratio,
        "updates_without_transfer": account.untold,
        "last_merged": None
        if account.last is None or account.last_at is None
        else {
            "version": account.last.version,
            "staleness": account.last.staleness,
            "at": account.last_at.isoformat(),
        },
    }


def _bytes(account: Account) -> tuple[str, str, str]:
    return (
        bytes_text(account.uploaded_bytes),
        bytes_text(account.downloaded_bytes) if account.downloaded_bytes else "",
        bytes_text(account.image_bytes) if account.image_bytes else "",
    )


def _document(found: JobState) -> dict[str, Any]:
    spec, head, figures = found.job.spec, found.newest.head, found.figures
    best = figures.best
    whole = account_json(total(found.accounts.values()))
    del whole["last_merged"]
    return {
        "job": found.job.id,
        "arch": spec.arch,
        "strategy": spec.aggregation.strategy,
        "version": head.version,
        "offered_version": head.offered.version,
        "stable_version": None if head.stable is None else head.stable.version,
        "max_versions": spec.stop.max_versions,
        "pending": len(head.pending),
        "closed": head.closed,
        "state": state(head),
        "metric": figures.metric,
        "best": None if best is None else {"version": best.version, "value": best.value, "who": best.who},
        "measured": {
            version: {who: evaluation.metrics[figures.metric] for who, evaluation in by.items()}
            for version, by in sorted(figures.measured.items())
        },
        "sites": {site: account_json(account) for site, account in found.accounts.items()},
        "total": whole,
    }


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
