"""What follows from measurements and from the clock: a version goes into quarantine, a job closes.

`aggregator/gate.py` and `aggregator/stopping.py` decide, of everything that was measured, so that judging twice, late
or in another order comes to the same. It is done after each measurement, and by oversee_jobs in case a worker died.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from aggregator import transitions
from aggregator.gate import failure
from aggregator.stopping import why_stop
from federation.best import Course
from federation.jobs import Job
from federation.types import SERVER, Event, Head, LogRecord, Quarantined
from tasks import records
from tasks.closing import close_if
from tasks.context import Context
from tasks.tell import tell_changed

log = logging.getLogger("fedqueue.jobs")


def judge(context: Context, job: Job) -> None:
    """Quarantine what failed its gate, and close the job if a stop rule holds. Repeating it changes nothing."""
    _act(context, job, _course(context, job), context.log(job.id).head())


def judge_by_clock(context: Context, job: Job, newest: LogRecord) -> None:
    """The same by the deadline alone: asks nothing of the store until that has passed."""
    _act(context, job, Course((), job.spec.evaluation.metric), newest)


def goes_by_measurements(job: Job) -> bool:
    stop = job.spec.stop
    return (stop.target, stop.patience, job.spec.evaluation.max_drop) != (None, None, None)


def _act(context: Context, job: Job, course: Course, newest: LogRecord) -> None:
    max_drop = job.spec.evaluation.max_drop
    if max_drop is not None and failure(max_drop, course, newest.head) is not None:
        _guard(context, job, course, max_drop)

    def why(head: Head) -> str | None:
        return why_stop(job.spec.stop, course, head, datetime.now(UTC))

    if newest.head.closed is not None or why(newest.head) is not None:
        close_if(context, job, why)


def _course(context: Context, job: Job) -> Course:
    """By the server's figures alone, if it measures at all: the sites' may be there first."""
    evaluation = job.spec.evaluation
    measured = context.evaluations(job.id) if goes_by_measurements(job) else []
    if evaluation.every:
        measured = [e for e in measured if e.who == SERVER]
    return Course(measured, evaluation.metric)


def _guard(context: Context, job: Job, course: Course, max_drop: float) -> None:
    versions = context.log(job.id)

    def quarantine(newest: LogRecord) -> tuple[Event, Head] | None:
        failed = failure(max_drop, course, newest.head)
        if failed is None:
            return None
        offered, made = versions.version(failed.offered), versions.first_at(failed.offered)
        if versions.is_collected(offered, made.seq):
            # measured in the instant in which retention took it, which removes the measurement, too
            log.warning("%s: version %d is gone, judged later", job.id, failed.offered)
            return None
        reason = failed.reason[:200]
        head = transitions.quarantine(newest.head, failed.version, reason, offered)
        return Quarantined(version=failed.version, reason=reason), head

    record = records.append(context, job.id, quarantine)
    if record is not None and record.head.quarantine is not None:
        log.warning(
            "%s: version %d is in quarantine, version %d is offered instead: %s",
            *(job.id, record.head.quarantine.version, record.head.offered.version),
            record.head.quarantine.reason,
        )
        tell_changed(context, job)
