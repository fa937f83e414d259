"""Watching a job: every site's state, the version, the newest mAP, as it happens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.demo.processes import Processes
from cli.options import console
from federation.errors import Fatal
from federation.jobs import Job
from federation.settings import Settings
from federation.types import SERVER, Evaluation, LogRecord, Published, SiteStatus
from storage.blob import BlobStore
from storage.jobs import list_evaluations
from storage.liveness import open_liveness
from storage.log import VersionLog

MAP_50 = "mAP@0.5"
FINAL_EVALUATION_S = 300.0


@dataclass
class Watched:
    """What was seen of a job: its records, and what its versions reached."""

    job: Job
    records: list[LogRecord]
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    last_staleness: dict[str, int] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.records[-1].head.version

    @property
    def closed(self) -> bool:
        return self.records[-1].head.closed is not None

    def add(self, records: list[LogRecord]) -> None:
        for record in records:
            self.records.append(record)
            if isinstance(record.event, Published):
                for contribution in record.event.merged:
                    site = contribution.update.site
                    self.merged[site] = self.merged.get(site, 0) + 1
                    self.last_staleness[site] = contribution.staleness


def watch(job: Job, store: BlobStore, settings: Settings, processes: Processes, sites: list[str]) -> Watched:
    """Show the job until it is closed, its last version is measured and the sites have ended."""
    log, liveness = VersionLog(store, job.id), open_liveness(settings)
    beats = settings.heartbeat_s, settings.heartbeat_ttl_s
    watched = Watched(job, list(log.history()))
    began = time.monotonic()
    closed_at: float | None = None
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while True:  # the view reads the store and the heartbeats, as an operator's would
            processes.check()
            watched.add(log.follow(watched.records[-1].seq))
            _evaluations(watched, store, live)
            there = (seen for seen in liveness.sites() if seen.condition(*beats) != "gone")
            statuses = {seen.status.site: seen.status for seen in there}
            live.update(_view(watched, statuses, sites, time.monotonic() - began))
            if watched.closed:
                closed_at = closed_at or time.monotonic()
                if watched.version in watched.evaluations and not any(
                    processes.running(site) for site in sites
                ):
                    break
                if time.monotonic() - closed_at > FINAL_EVALUATION_S:
                    raise Fatal("the last version was not evaluated in time: see the logs of the demo")
            time.sleep(0.5)
    if not console.is_terminal:
        console.print()  # the last view does not end its line there
    return watched


def _evaluations(watched: Watched, store: BlobStore, live: Live) -> None:
    for evaluation in list_evaluations(store, watched.job.id):
        if evaluation.version not in watched.evaluations and evaluation.who == SERVER:
            watched.evaluations[evaluation.version] = evaluation
            if not console.is_terminal:
                live.console.print(f"version {evaluation.version}: mAP@0.5 {evaluation.metrics[MAP_50]:.3f}")


def _view(
    watched: Watched, statuses: dict[str, SiteStatus], sites: list[str], seconds: float
) -> RenderableType:
    table = Table(
        "site", "state", "step", "epoch", "from version", "staleness now", "merged", "last τ", expand=False
    )
    for site in sites:
        status = statuses.get(site)
        if status is None:
            absent = "ended" if watched.closed else "gone" if site in watched.merged else "starting"
            table.add_row(site, absent, *([""] * 4), str(watched.merged.get(site, "")))
            continue
        base = status.base_version
        table.add_row(
            site,
            status.state,
            f"{status.step}/{status.steps}" if status.steps else "",
            f"{status.epoch:.1f}",
            "" if base is None else str(base),
            "" if base is None else str(max(0, watched.version - base)),
            str(watched.merged.get(site, 0)),
            str(watched.last_staleness.get(site, "")),
        )
    last = watched.job.spec.stop.max_versions
    line = Text(f"version {watched.version} of {last}   ")
    if watched.evaluations:
        newest = watched.evaluations[max(watched.evaluations)]
        line.append(
            f"mAP@0.5 {newest.metrics[MAP_50]:.3f} at version {newest.version}   ", style="bold green"
        )
    line.append(f"{seconds:.0f} s" + ("   closed, measuring the last version" if watched.closed else ""))
    rows = Table.grid()  # a bar does not end its line, a row does
    rows.add_row(ProgressBar(total=last, completed=watched.version, width=80))
    rows.add_row(line)
    return Group(rows, table)
