"""What is in the bucket besides models and logs: jobs, evaluations, refusals, dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby

from federation import keys
from federation.errors import AccessDenied, CorruptLog, NotFound
from federation.jobs import Job
from federation.types import SERVER, DeadLetter, Evaluation, Refusal
from storage.blob import BlobStore
from storage.reading import load_value


def save_job(store: BlobStore, job: Job) -> bool:
    """Write job.json. False if there is another job of this name; True also if this very one was there."""
    if store.put_if_absent(keys.job_key(job.id), job.to_json()):
        return True
    return load_job(store, job.id) == job


def load_job(store: BlobStore, job_id: str) -> Job:
    """Raises NotFound, CorruptLog if job.json is not one."""
    try:
        return load_value(store, keys.job_key(job_id), Job)
    except NotFound as exc:
        raise NotFound(f"there is no job {job_id!r}") from exc
    except AccessDenied as exc:
        # A site's account gets this answer for a missing object, too; but it may list the log.
        if next(iter(store.list(keys.log_prefix(job_id))), None) is None:
            raise NotFound(f"there is no job {job_id!r}") from exc
        raise


def list_jobs(store: BlobStore) -> list[str]:
    """The ids of all jobs, sorted. Takes one listing per job, however much each has stored."""
    return sorted(job_id for job_id in job_ids(store) if _has_job(store, job_id))


def job_ids(store: BlobStore) -> Iterator[str]:
    """Every name below jobs/, also of a job that was not made (yet), whose models are uploaded."""
    after = ""
    while key := next(iter(store.list(keys.JOBS_PREFIX, start_after=after)), None):
        job_id = key.removeprefix(keys.JOBS_PREFIX).partition("/")[0]
        yield job_id
        # "0" comes right after "/", so this skips all that lies below the job and nothing else
        after = f"{keys.JOBS_PREFIX}{job_id}0"


def _has_job(store: BlobStore, job_id: str) -> bool:
    try:
        store.size(keys.job_key(job_id))
    except NotFound:
        return False
    return True


def save_evaluation(store: BlobStore, evaluation: Evaluation) -> None:
    """Write what somebody measured of a version, replacing an earlier measurement of theirs."""
    key = keys.metrics_key(evaluation.job, evaluation.version, evaluation.who)
    store.put(key, evaluation.to_json())


def save_report(store: BlobStore, report: Evaluation) -> bool:
    """Write what a site measured. False if it has reported on this version before: the first report stays."""
    return store.put_if_absent(keys.metrics_key(report.job, report.version, report.who), report.to_json())


def load_evaluation(store: BlobStore, job_id: str, version: int, who: str) -> Evaluation | None:
    """None if `who` has not measured this version."""
    try:
        return load_value(store, keys.metrics_key(job_id, version, who), Evaluation)
    except NotFound:
        return None


def list_evaluations(store: BlobStore, job_id: str, version: int | None = None) -> list[Evaluation]:
    """All measurements of a job's versions, or of one, by version, then by who measured."""
    prefix = keys.metrics_prefix(job_id, version)
    return [load_value(store, key, Evaluation) for key in store.list(prefix)]


def newest_measured(store: BlobStore, job: Job) -> tuple[int, float] | None:
    """The newest version that has a measurement of the job's metric, and its value: the server's, or the mean of
    the sites over their images. None if there is none. Takes one listing, and few requests after it.
    """
    metric = job.spec.evaluation.metric
    found = sorted(store.list(keys.metrics_prefix(job.id)), reverse=True)
    for _, measured in groupby(found, key=lambda key: key.rpartition("/")[0]):
        evaluations = [load_value(store, key, Evaluation) for key in measured]
        of_metric = [e for e in evaluations if metric in e.metrics and e.num_images]
        chosen = [e for e in of_metric if e.who == SERVER] or of_metric
        if chosen:
            value = sum(e.metrics[metric] * e.num_images for e in chosen) / sum(e.num_images for e in chosen)
            return chosen[0].version, value
    return None


def save_refusal(store: BlobStore, refusal: Refusal) -> None:
    """Write why an update will not be merged; the first reason stays."""
    update = refusal.update
    store.put_if_absent(keys.rejected_key(update.job, update.site, update.update_id), refusal.to_json())


def list_refusals(store: BlobStore, job_id: str) -> Iterator[Refusal]:
    """All refusals of a job, by site, then in the order in which the updates were named."""
    for key in store.list(keys.rejected_prefix(job_id)):
        yield load_value(store, key, Refusal)


# A dead letter has a little log of its own, appended by put-if-absent: `<id>.json`, `<id>.1.json`, `<id>.2.json` …
# Each record is the whole letter, and the newest counts:
#     failed -> requeue began -> requeued -> failed again …
# "Began" comes before the message is sent, and "requeued" after it only as the very next record. So whatever
# fails again, as soon as it may, is a record of its own and is never hidden by a requeue that came before it.


def save_dead_letter(store: BlobStore, letter: DeadLetter) -> None:
    """Keep a message that nobody could handle. If the same one waits already, nothing changes."""
    while True:
        number = _newest_letters(store, letter.id).get(letter.id, -1)
        try:
            if number >= 0 and _load_letter(store, letter.id, number).requeue_began_at is None:
                return
        except NotFound:
            continue  # an operator deleted it meanwhile
        except CorruptLog:
            pass  # a record that nobody can read must not hide a message that failed
        if store.put_if_absent(_letter_key(letter.id, number + 1), letter.to_json()):
            return


def load_dead_letter(store: BlobStore, letter_id: str) -> DeadLetter:
    """The newest record of a letter, requeued or not. Raises NotFound."""
    return _newest_letter(store, letter_id)[1]


def list_dead_letters(store: BlobStore) -> Iterator[DeadLetter]:
    """The letters that wait: all but those that were requeued and have not failed again. By id."""
    for letter_id, number in sorted(_newest_letters(store).items()):
        letter = _load_letter(store, letter_id, number)
        if letter.requeued_at is None:
            yield letter


def begin_requeue(store: BlobStore, letter_id: str) -> tuple[int, DeadLetter]:
    """Call before the message is sent again. Returns what `finish_requeue` needs. Raises NotFound.

    A requeue that began and never finished is taken over: the letter waits until one has finished.
    """
    while True:
        number, letter = _newest_letter(store, letter_id)
        if letter.requeue_began_at is not None and letter.requeued_at is None:
            return number, letter
        began = letter.model_copy(update={"requeue_began_at": datetime.now(UTC), "requeued_at": None})
        store.put_if_absent(_letter_key(letter_id, number + 1), began.to_json())


def finish_requeue(store: BlobStore, number: int, letter: DeadLetter) -> None:
    """Call when the broker has the message. Changes nothing if it has failed again already."""
    requeued = letter.model_copy(update={"requeued_at": datetime.now(UTC)})
    store.put_if_absent(_letter_key(letter.id, number + 1), requeued.to_json())


def _newest_letter(store: BlobStore, letter_id: str) -> tuple[int, DeadLetter]:
    numbers = _newest_letters(store, letter_id)
    if letter_id not in numbers:
        raise NotFound(f"there is no dead letter {letter_id}")
    return numbers[letter_id], _load_letter(store, letter_id, numbers[letter_id])


def _newest_letters(store: BlobStore, letter_id: str = "") -> dict[str, int]:
    """The number of the newest record of each letter, or of one."""
    newest: dict[str, int] = {}
    for key in store.list(f"{keys.DEADLETTERS_PREFIX}{letter_id}"):
        found, _, number = key.removeprefix(keys.DEADLETTERS_PREFIX).removesuffix(".json").partition(".")
        if number and not (number.isascii() and number.isdigit()):
            raise CorruptLog(f"{key} is not the key of a dead letter: move it out of this prefix")
        newest[found] = max(newest.get(found, 0), int(number or 0))
    return newest


def _load_letter(store: BlobStore, letter_id: str, number: int) -> DeadLetter:
    return load_value(store, _letter_key(letter_id, number), DeadLetter)


def _letter_key(letter_id: str, number: int) -> str:
    return keys.deadletter_key(f"{letter_id}.{number}" if number else letter_id)
