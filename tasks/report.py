"""fedqueue.record_report: what a site measured of a version goes to metrics/<version>/<site>.json.

Put-if-absent, so a report that is delivered twice changes nothing, and the first of two different ones stays. The
name of the object is the site's, which the broker has checked, so no site can write what another one measured, or
the server. A report on nothing that this site could measure is a dead letter: whoever operates the server sees it.
"""

from __future__ import annotations

import logging
from typing import Any

from federation.errors import NotFound
from federation.jobs import Job
from federation.points import Point, reach
from federation.types import Evaluation
from storage.jobs import save_report
from storage.log import VersionLog
from tasks import celery
from tasks.context import Context, current
from tasks.deadletters import keep_report
from tasks.judge import judge

log = logging.getLogger("fedqueue.report")


@celery.task(celery.RECORD_REPORT)
def record_report(self: Any, report: str) -> None:
    """`report`: an Evaluation as JSON, checked by the ingress."""
    record(current(), Evaluation.from_json(report))


def record(context: Context, report: Evaluation) -> None:
    """Raises Transient if the store does not answer."""
    refusal = _refusal(context, report)
    if refusal is not None:
        keep_report(context.store, report, *refusal)
        return
    if save_report(context.store, report):
        reach(Point.REPORT_KEPT)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
        log.info("%s: version %d reaches %s at %s", report.job, report.version, shown, report.who)
    else:
        log.info("%s: %s has reported on version %d before", report.job, report.who, report.version)
    judge(context, context.job(report.job))


def _refusal(context: Context, report: Evaluation) -> tuple[str, str] | None:
    """Reason and explanation, if this report is of nothing that the site could measure."""
    try:
        job = context.job(report.job)
    except NotFound:
        return "unknown-job", f"there is no job {report.job!r}"
    if job.spec.participants is not None and report.who not in job.spec.participants:
        return "not-a-participant", f"{report.who} does not take part in job {report.job!r}"
    foreign = {name for table in report.per_class.values() for name in table} - {*job.spec.classes}
    if foreign:
        return "unknown-class", f"job {report.job!r} has no classes {', '.join(sorted(foreign))}"
    log = context.log(job.id)
    try:
        version = log.version(report.version)
        context.store.size(version.model.key)  # else retention could not keep it any more for being measured
    except NotFound as exc:
        return "unknown-version", f"version {report.version} of job {report.job!r} is not kept: {exc}"
    if not _is_due(job, log, report.version):
        return "not-due", f"sites measure other versions of job {report.job!r} than {report.version}"
    return None


def _is_due(job: Job, log: VersionLog, version: int) -> bool:
    """Retention keeps what was measured, and so a site must not be able to measure everything."""
    made = log.first_at(version)
    before = next(log.history(max(made.seq - 1, 0)))
    head = log.head().head
    ended_with_it = head.closed is not None and head.version == version
    return job.spec.evaluation.sites_due(before.head.version, version, ended_with_it)
