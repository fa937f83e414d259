"""`fedqueue gc`: remove what no job needs any more, or only say what that is."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from cli.options import StoreUrl, console, errors, export, fail, load
from federation.errors import FedqueueError, NotFound
from federation.settings import Settings
from storage.blob import BlobStore
from storage.jobs import job_ids, load_job
from storage.leftovers import leftovers
from storage.log import VersionLog
from storage.open import open_store
from storage.probe import probe
from storage.retention import Garbage, Retention


def gc(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JOB]…", envvar="FEDQUEUE_CLI_JOBS", help="ids of jobs; none: all"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", envvar="FEDQUEUE_CLI_DRY_RUN", help="only say what would go")
    ] = False,
    store_url: StoreUrl = None,
) -> None:
    """Remove leftovers, refused payloads and superseded versions. docs/operations.md says what stays and how long.

    Safe beside running workers, which do the same every gc_every_s seconds. Versions that are gone can be made
    again: fedqueue replay.

    Example: fedqueue gc street --dry-run
    """
    settings = load(store_url=store_url)
    export(settings)
    try:
        store = open_store(settings)
        if not dry_run:
            probe(store)
        names = jobs or list(job_ids(store))
    except FedqueueError as exc:
        fail(exc)
    gone: list[Garbage] = []
    failed = False
    for job_id in names:
        try:
            retention = _retention(settings, store, job_id)
            if retention is None:
                failed |= bool(jobs)
                _print(
                    f"{job_id}: models of a job that was never created, or not wholly yet: nothing is touched"
                )
                continue
            with console.status(f"{job_id}: reading the log and the store"):
                found = retention.plan() if dry_run else retention.collect()
        except FedqueueError as exc:
            failed = True
            errors.print(
                f"[bold red]{type(exc).__name__}:[/] {job_id}: {exc}", highlight=False, soft_wrap=True
            )
        else:
            gone += found
            _show(found)
    if not jobs:
        try:
            found = list(leftovers(store, timedelta(seconds=settings.gc_grace_s)))
            for item in found:
                if not dry_run:
                    store.delete(item.key)
        except FedqueueError as exc:
            fail(exc)
        gone += found
        _show(found)
    megabytes = sum(item.nbytes for item in gone) / 1e6
    console.print(f"{len(gone)} objects, {megabytes:.2f} MB {'would go' if dry_run else 'removed'}")
    if failed:
        raise typer.Exit(1)


def _retention(settings: Settings, store: BlobStore, job_id: str) -> Retention | None:
    """None if there is no job.json, or no log."""
    from tasks.retention import policy

    log = VersionLog(store, job_id)
    try:
        job = load_job(store, job_id)
        log.head()
    except NotFound:
        return None
    return Retention(store, log, job, policy(settings, job))


def _show(found: list[Garbage]) -> None:
    width = max((len(item.key) for item in found), default=0)
    for item in found:
        _print(f"{item.key:{width}s}  {item.nbytes / 1e6:9.3f} MB  {_days(item.age):>10s}  {item.why}")


def _print(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _days(age: timedelta) -> str:
    return f"{age.days} d {age.seconds // 3600:2d} h"
