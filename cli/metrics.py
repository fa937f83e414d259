"""`fedqueue job metrics`: a job's figures for Prometheus, by way of node_exporter's textfile collector."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from cli.exposition import Family, exposition
from cli.options import JobArgument, LiveUrl, StoreUrl, errors, fail, load
from cli.status import JobState
from federation.errors import FedqueueError, Transient
from federation.settings import Settings
from storage.control import list_members
from storage.liveness import CONDITIONS, Seen, open_liveness
from storage.open import open_store


def metrics(job: JobArgument, live_url: LiveUrl = None, store_url: StoreUrl = None) -> None:
    """A job's counters in Prometheus' text format: what its sites sent, fetched and kept at home; which are there.

    Example: fedqueue job metrics street > street.new && mv street.new street.prom
    """
    settings = load(live_url=live_url, store_url=store_url)
    try:
        store = open_store(settings)
        state = JobState.read(store, job)
        known = {*state.accounts, *(member.site for member in list_members(store, job))}
    except FedqueueError as exc:
        fail(exc)
    families = [*job_families(state), *site_families(job, settings, known, _seen(settings))]
    typer.echo(exposition(families), nl=False)


def _seen(settings: Settings) -> list[Seen]:
    try:
        return open_liveness(settings).sites()
    except Transient as exc:  # the job's figures are true without it
        errors.print(f"no condition of any site: {exc}", markup=False, highlight=False, soft_wrap=True)
        return []
    except FedqueueError as exc:
        fail(exc)


def job_families(state: JobState) -> Iterable[Family]:
    """What the log and the measurements say."""
    job, head = state.job.id, state.newest.head
    version = Family("fedqueue_job_version", "gauge", "Newest model version.")
    version.add(head.version, job=job)
    closed = Family("fedqueue_job_closed", "gauge", "1 if the job is over.")
    closed.add(int(head.closed is not None), job=job)
    pending = Family("fedqueue_job_pending_updates", "gauge", "Updates accepted and not merged yet.")
    pending.add(len(head.pending), job=job)
    quarantine = Family(
        "fedqueue_job_quarantine", "gauge", "1 if a version waits for somebody to decide on it."
    )
    quarantine.add(int(head.quarantine is not None), job=job)
    yield from (version, closed, pending, quarantine)

    uploaded = Family(
        "fedqueue_uploaded_bytes_total", "counter", "Payloads and messages of a site's updates."
    )
    downloaded = Family(
        "fedqueue_downloaded_bytes_total", "counter", "Models and log records that a site says it read."
    )
    home = Family("fedqueue_home_image_bytes", "gauge", "Training images of a site, which stayed there.")
    merged = Family("fedqueue_updates_merged_total", "counter", "Updates that were merged.")
    rejected = Family("fedqueue_updates_rejected_total", "counter", "Updates that were rejected.")
    staleness = Family("fedqueue_staleness_total", "counter", "Staleness of merged updates, summed.")
    for site, account in state.accounts.items():
        uploaded.add(account.uploaded_bytes, job=job, site=site)
        downloaded.add(account.downloaded_bytes, job=job, site=site)
        home.add(account.image_bytes, job=job, site=site)
        merged.add(account.merged, job=job, site=site)
        rejected.add(account.rejected, job=job, site=site)
        staleness.add(account.staleness, job=job, site=site)
    yield from (uploaded, downloaded, home, merged, rejected, staleness)

    metric = state.job.spec.evaluation.metric
    value = Family(
        "fedqueue_job_metric", "gauge", "The job's metric of the newest version that was measured."
    )
    measured = Family("fedqueue_job_measured_version", "gauge", "That version.")
    newest = {e.who: e for e in state.evaluations if metric in e.metrics}  # they come by version
    for who, evaluation in sorted(newest.items()):
        value.add(evaluation.metrics[metric], job=job, who=who, metric=metric)
        measured.add(evaluation.version, job=job, who=who)
    yield from (value, measured)


def site_families(job: str, settings: Settings, known: set[str], seen: Iterable[Seen]) -> Iterable[Family]:
    """What heartbeats say of the sites that are `known` to take part, or say that they work on the job."""
    condition = Family("fedqueue_site_condition", "gauge", "1 for the condition that a site is in.")
    last = Family("fedqueue_site_last_seen_timestamp_seconds", "gauge", "When the last heartbeat came.")
    for site in seen:
        name = site.status.site
        if name not in known and site.status.job != job:
            continue
        current = site.condition(settings.heartbeat_s, settings.heartbeat_ttl_s)
        for possible in CONDITIONS:
            condition.add(int(possible == current), job=job, site=name, condition=possible)
        last.add(site.seen_at.timestamp(), job=job, site=name)
    yield from (condition, last)
