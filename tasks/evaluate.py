"""fedqueue.evaluate_version: what a version reaches on the server's held-out set.

Runs in the evaluation worker, the only server process with torch, which is therefore imported inside. When
versions come faster than evaluations, only the newest due one is worked on: a metric of last hour's model
helps nobody, and the last version of a job is always measured.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import BadSettings
from federation.jobs import Job
from federation.types import SERVER, Evaluation
from storage.jobs import load_evaluation, save_evaluation
from storage.models import load_full_model
from tasks import celery
from tasks.context import Context, current
from tasks.judge import judge

if TYPE_CHECKING:
    from detection.dataset import Dataset

log = logging.getLogger("fedqueue.evaluate")


@celery.task(celery.EVALUATE)
def evaluate_version(self: Any, job: str, version: str) -> None:
    """Measure `version` of `job` and store an Evaluation, unless that is done or overtaken; and judge by it."""
    context = current()
    evaluate(context, job, int(version))
    judge(context, context.job(job))


def evaluate(context: Context, job_id: str, version: int) -> Evaluation | None:
    """Returns None if the version is measured already or a newer due one waits."""
    job = context.job(job_id)
    if load_evaluation(context.store, job_id, version, SERVER) is not None or _overtaken(
        context, job, version
    ):
        return None
    from detection.evaluate import evaluate as measure
    from detection.threads import pick_device

    device, dataset = pick_device(context.settings.device), _held_out(context, job)
    current_version = context.log(job_id).version(version)
    weights = load_full_model(context.store, job, current_version.model).arrays()
    result = measure(job.spec, weights, dataset, device=device)
    evaluation = Evaluation(
        job=job_id,
        version=version,
        who=SERVER,
        num_images=result.num_images,
        metrics=result.metrics,
        per_class=result.per_class,
        at=datetime.now(UTC),
    )
    save_evaluation(context.store, evaluation)
    log.info("%s: version %d reaches %s", job_id, version, result.metrics)
    return evaluation


def _overtaken(context: Context, job: Job, version: int) -> bool:
    head = context.log(job.id).head().head
    every = max(job.spec.evaluation.every, 1)
    return head.version // every > version // every or (head.closed is not None and head.version > version)


def _held_out(context: Context, job: Job) -> Dataset:
    settings = context.settings
    if settings.eval_annotations is None:
        raise BadSettings(
            "this job is evaluated centrally, but the worker has no held-out set: set FEDQUEUE_EVAL_ANNOTATIONS "
            "and FEDQUEUE_EVAL_IMAGES, or create the job with evaluation.every = 0"
        )
    return _load(settings.eval_annotations, settings.eval_images, settings.eval_format, job.spec.classes)


@lru_cache(maxsize=4)
def _load(annotations: Path, images: Path | None, format: str | None, classes: tuple[str, ...]) -> Dataset:
    from detection.dataset import load_dataset

    return load_dataset(annotations, images, classes, format=format)
