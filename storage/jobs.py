"""What is in the bucket besides models and logs: jobs, evaluations, refusals, dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from federation import keys
from federation.base import Value
from federation.errors import AccessDenied, CorruptLog, NotFound, Rejected
from federation.jobs import Job
from federation.types import DeadLetter, Evaluation, Refusal
from storage.blob import BlobStore

V = TypeVar("V", bound=Value)

MAX_OBJECT_BYTES = 16 << 20
"""None of these objects is ever near it."""


def save_job(store: BlobStore, job: Job) -> bool:
    """Write job.json. False if there is another job of this name; True also if this very one was there."""
    if store.put_if_absent(keys.job_key(job.id), job.to_json()):
        return True
    return load_job(store, job.id) == job


def load_job(store: BlobStore, job_id: str) -> Job:
    """Raises NotFound, CorruptLog if job.json is not one."""
    try:
        return _load(store, keys.job_key(job_id), Job)
    except AccessDenied as exc:
        # A site's account gets this answer for a missing object, too; but it may list the log.
        if next(iter(store.list(keys.log_prefix(job_id))), None) is None:
            raise NotFound(f"there is no job {job_id!r}") from exc
        raise


def list_jobs(store: BlobStore) -> list[str]:
    """The ids of all jobs, sorted. Takes one listing per job, however much each has stored."""
    found: list[str] = []
    after = ""
    while True:
        key = next(iter(store.list(keys.JOBS_PREFIX, start_after=after)), None)
        if key is None:
            return sorted(found)
        job_id = key.removeprefix(keys.JOBS_PREFIX).split("/", 1)[0]
        try:
            store.size(keys.job_key(job_id))
            found.append(job_id)
        except NotFound:
            pass  # models were uploaded, the job was not made (yet)
        # "0" comes right after "/", so this skips all that lies below the job and nothing else
        after = f"{keys.JOBS_PREFIX}{job_id}0"


def save_evaluation(store: BlobStore, evaluation: Evaluation) -> None:
    """Write what somebody measured of a version, replacing an earlier measurement of theirs."""
    key = keys.metrics_key(evaluation.job, evaluation.version, evaluation.who)
    store.put(key, evaluation.to_json())


def load_evaluation(store: BlobStore, job_id: str, version: int, who: str) -> Evaluation | None:
    """None if `who` has not measured this version."""
    try:
        return _load(store, keys.metrics_key(job_id, version, who), Evaluation)
    except NotFound:
        return None


def list_evaluations(store: BlobStore, job_id: str) -> list[Evaluation]:
    """All measurements of a job's versions, by version, then by who measured."""
    return [_load(store, key, Evaluation) for key in store.list(keys.metrics_prefix(job_id))]


def save_refusal(store: BlobStore, refusal: Refusal) -> None:
    """Write why an update will not be merged; the first reason stays."""
    update = refusal.update
    store.put_if_absent(keys.rejected_key(update.job, update.site, update.update_id), refusal.to_json())


def list_refusals(store: BlobStore, job_id: str) -> Iterator[Refusal]:
    """All refusals of a job, by site, then in the order in which the updates were named."""
    for key in store.list(keys.rejected_prefix(job_id)):
        yield _load(store, key, Refusal)


def save_dead_letter(store: BlobStore, letter: DeadLetter) -> None:
    """Keep a message that was no update; saving the same again changes nothing."""
    store.put_if_absent(keys.deadletter_key(letter.id), letter.to_json())


def list_dead_letters(store: BlobStore) -> Iterator[DeadLetter]:
    for key in store.list(keys.DEADLETTERS_PREFIX):
        yield _load(store, key, DeadLetter)


def _load(store: BlobStore, key: str, kind: type[V]) -> V:
    try:
        return kind.from_json(store.get(key, max_bytes=MAX_OBJECT_BYTES))
    except Rejected as exc:
        raise CorruptLog(f"{key}: {exc}") from exc
