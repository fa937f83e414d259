"""Request submit-job: a job description and two tensor files become job.json and version 0.

Making initial weights takes torch, which a merge worker does not have. So the submitter uploads two files where a
site may write: `initial` with every tensor of the model, and `first` with those that sites exchange (the same file
unless layers stay local or frozen). Both are as little trusted as any payload. The steps, each harmless to repeat:

    checked -> copied to models/ -> job.json -> log -> announced -> answered (tasks/requests.py) -> uploads deleted

job.json is written once and names its request: of two requests for one id, the first to write it wins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime

from federation import keys
from federation.errors import BadJob, BadPayload, NotFound
from federation.governance import Announcement
from federation.ids import is_name, is_update_id
from federation.jobs import Job, JobSpec, ModelRef, read_spec
from federation.layout import Layout, is_moment
from federation.points import Point, reach
from federation.requests import Answer, Request, SubmitJob
from federation.types import SERVER, Head, ModelVersion
from federation.wire import JobAnnounced
from storage.control import announce
from storage.jobs import load_job, save_job
from storage.models import load_upload, save_model
from storage.tensors import TensorFile
from tasks import celery
from tasks.context import Context
from tasks.members import first_hold
from tasks.requests import RequestRefused
from tasks.tell import hint

log = logging.getLogger("fedqueue.jobs")

UPDATE_SLACK_BYTES = 64 * 1024
"""An update has the size of its version, but its header may be spelt with more room."""
MAX_TENSORS_NAMED = 10


def submit(context: Context, request: Request) -> str:
    """Make the job. Raises RequestRefused with everything that is wrong."""
    asked = request.what
    assert isinstance(asked, SubmitJob)
    spec, errors = read_spec(asked.document)
    known = _known(context, asked.job)
    if known is not None and known.request_id == request.request_id and _has_begun(context, known):
        _make_known(context, known)  # what a worker that died may not have done
        return _done(context, known)
    if known is not None and known.request_id != request.request_id:
        errors.append(_taken(known))
    if spec is not None and spec.stop.deadline is not None and spec.stop.deadline <= datetime.now(UTC):
        errors.append(f"stop.deadline: {spec.stop.deadline} is over")
    files: dict[ModelRef, TensorFile] = {}
    for field, ref in (("initial", asked.initial), ("first", asked.first)):
        try:
            files[ref] = files.get(ref) or _load(context, request, ref)
        except BadPayload as exc:
            errors.append(f"{field}: {exc}")
    if files.keys() == {asked.initial, asked.first}:
        errors += _misfits(spec, files[asked.initial].layout, files[asked.first].layout)
    if spec is not None and spec.plan.shared_moments:
        needed, limit = _update_bytes(spec, asked.first), context.settings.max_update_bytes
        if needed > limit:
            errors.append(
                f"plan.optimizer_state: with shared moments an update has up to {needed} bytes, and this server"
                f" reads at most {limit}: use another state or a smaller model, or raise max_update_bytes at the server"
            )
    if spec is None or errors:
        raise RequestRefused(*errors)
    models = {ref: save_model(context.store, spec.id, file) for ref, file in files.items()}
    reach(Point.MODELS_COPIED)
    job = create(
        context,
        spec,
        models[asked.initial],
        models[asked.first],
        submitted_by=request.who,
        request_id=request.request_id,
    )
    return _done(context, job)


def create(
    context: Context,
    spec: JobSpec,
    initial: ModelRef,
    first: ModelRef,
    *,
    submitted_by: str = SERVER,
    request_id: str | None = None,
) -> Job:
    """Begin a job whose models are stored. Doing it again is harmless; raises BadJob if another one has its id."""
    job = Job(
        spec=spec,
        initial=initial,
        max_update_bytes=min(
            _update_bytes(spec, first) + UPDATE_SLACK_BYTES, context.settings.max_update_bytes
        ),
        submitted_by=submitted_by,
        request_id=request_id,
        created_at=datetime.now(UTC),
    )
    if not save_job(context.store, job):
        existing = load_job(context.store, spec.id)
        same = (existing.spec, existing.initial) == (spec, initial) if request_id is None else True
        if existing.request_id != request_id or not same:
            raise BadJob(_taken(existing))
        job = existing
    reach(Point.JOB_WRITTEN)
    context.log(job.id).create(Head(current=ModelVersion(version=0, model=first), hold=first_hold(job)))
    log.info("%s: created for %s, at most %d bytes per update", job.id, submitted_by, job.max_update_bytes)
    _make_known(context, job)
    return job


def _update_bytes(spec: JobSpec, first: ModelRef) -> int:
    """Of an update: as large as its version, and at most once more for each moment that travels with it."""
    return first.nbytes * (1 + spec.plan.shared_moments)


def discard_uploads(context: Context, request: Request, answer: Answer) -> None:
    """Delete what came with a submission that is answered, unless it may be needed. Raises StoreUnavailable.

    What lies in a job of somebody else, or is named by the log, may be an update, too: retention judges it.
    """
    asked = request.what
    assert isinstance(asked, SubmitJob)
    for key in {asked.initial.key, asked.first.key}:
        job_id, update_id = _own_upload(request, key)
        if not job_id:
            continue
        known = _known(context, job_id)
        if known is None or (
            answer.ok
            and known.request_id == request.request_id
            and context.log(job_id).find(update_id) is None
        ):
            context.store.delete(key)


def _make_known(context: Context, job: Job) -> None:
    announce(context.store, Announcement(job=job.id, submitted_by=job.submitted_by, at=job.created_at))
    hint(context, JobAnnounced(job=job.id))
    if job.spec.evaluation.every and context.log(job.id).head().head.version == 0:
        context.send(celery.EVALUATE, {"job": job.id, "version": "0"})


def _done(context: Context, job: Job) -> str:
    """In words, with what may be a mistake and need not be one."""
    done = f"job {job.id} is there, at version 0, for updates of at most {job.max_update_bytes} bytes"
    heard_of = {
        key.removeprefix(keys.SITES_PREFIX).removesuffix(".json")
        for key in context.store.list(keys.SITES_PREFIX)
    }
    strangers = [site for site in job.spec.participants or () if site not in heard_of]
    return done + (
        f"; participants that have never joined a job yet: {', '.join(strangers)}" * bool(strangers)
    )


def _known(context: Context, job_id: str | None) -> Job | None:
    try:
        return None if job_id is None else context.job(job_id)
    except NotFound:
        return None


def _has_begun(context: Context, job: Job) -> bool:
    try:
        context.log(job.id).head()
    except NotFound:
        return False
    return True


def _taken(job: Job) -> str:
    return f"id: there is a job {job.id!r} already, of {job.submitted_by}: choose another"


def _own_upload(request: Request, key: str) -> tuple[str, str]:
    """Job and id of an upload of whoever asks; empty, if the key is none."""
    job_id = key.removeprefix(keys.JOBS_PREFIX).partition("/")[0]
    update_id = key.rpartition("/")[2].removesuffix(".safetensors")
    if is_name(job_id) and is_update_id(update_id) and key == keys.update_key(job_id, request.who, update_id):
        return job_id, update_id
    return "", ""


def _load(context: Context, request: Request, ref: ModelRef) -> TensorFile:
    """Raises BadPayload."""
    asked = request.what
    assert isinstance(asked, SubmitJob)
    job_id, _ = _own_upload(request, ref.key)
    if not job_id or job_id != asked.job:
        # what others uploaded must not become a model, which everybody may read
        must_be = keys.update_key(asked.job or "<job>", request.who, "<UUID version 7>")
        raise BadPayload(f"its key must be {must_be}")
    return load_upload(context.store, ref, context.settings.max_update_bytes)


def _misfits(spec: JobSpec | None, initial: Layout, first: Layout) -> Iterator[str]:
    """What is wrong with the models, looked at together. spec: None if that is wrong itself."""
    whole = {tensor.name: tensor for tensor in initial.tensors}
    strange = [tensor.name for tensor in first.tensors if whole.get(tensor.name) != tensor]
    if strange:
        yield f"first: not in the initial model, or of another type or shape: {_some(strange)}"
    reserved = [tensor.name for tensor in initial.tensors if is_moment(tensor.name)]
    if reserved:
        yield f"initial: names that are kept for the moments of optimisers: {_some(reserved)}"
    if not first.weight_count:
        yield "first: holds no weights, so there is nothing to train together"
    if spec is None:
        return
    frozen = [tensor.name for tensor in first.tensors if spec.plan.freezes(tensor.name)]
    if frozen:
        yield f"plan.freeze: frozen, and yet among the tensors that sites exchange: {_some(frozen)}"
    for layer in spec.plan.freeze:
        only = spec.plan.model_copy(update={"freeze": (layer,)})
        if not any(only.freezes(name) for name in whole):
            yield f"plan.freeze: the model has no layer {layer!r}"


def _some(names: list[str]) -> str:
    more = len(names) - MAX_TENSORS_NAMED
    return ", ".join(names[:MAX_TENSORS_NAMED]) + (f" and {more} more" if more > 0 else "")
