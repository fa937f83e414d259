"""Models of a job for use: pulled and verified while the store answers, used from disk while it does not.

    <cache>/<store>/<job>/known.json             the job, and what each version that was asked for meant at that time
    <cache>/<store>/<job>/<sha256>.safetensors   the models behind it (storage.models.ModelCache)

`<store>` stands for the store's URL, since two stores may each have a job of one name. Channels (storage/channels.py)
are asked anew every time; without the store they mean what they meant when it answered last. Every model is verified
by its digest before every use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime

from federation.base import Value
from federation.errors import BadJob, BadPayload, NotFound, Rejected, StoreUnavailable
from federation.ids import is_name
from federation.jobs import Job, ModelRef
from federation.types import ModelVersion
from producers.local import Arrays, LocalModel, assemble, has_own_norm
from storage.blob import BlobStore
from storage.channels import resolve
from storage.files import replace_durably
from storage.jobs import load_job
from storage.models import ModelCache
from storage.tensors import TensorFile, decode

KEPT_MODELS = 8
"""Files per job, one of them the initial model: the version in use and some that were, should one be wanted back."""


class Answer(Value):
    """Which version was meant. `reason` says why it is the best, or what speaks against it."""

    current: ModelVersion
    reason: str = ""
    asked_at: AwareDatetime


class Known(Value):
    """`known.json`: what the store said when it answered last."""

    schema_version: Literal[1] = 1
    store_url: str
    job: Job
    answers: dict[str, Answer]


@dataclass(frozen=True, eq=False)
class Pulled:
    """A version with all its tensors. `away`: why the store was not asked, and the answer is an older one."""

    job: Job
    answer: Answer
    weights: Arrays
    away: str
    own_norm: bool

    @property
    def version(self) -> int:
        return self.answer.current.version

    @property
    def sha256(self) -> str:
        """Of the version's file."""
        return self.answer.current.model.sha256


class OfflineModels:
    """One job's versions as this machine knows them. `site_folder` may hold norm layers of this site's own."""

    def __init__(self, store_url: str, job_id: str, cache: Path, site_folder: Path) -> None:
        """Raises BadJob for a name that no job can have."""
        if not is_name(job_id):
            raise BadJob(f"{job_id!r} cannot be a job: names have lower-case letters, digits and hyphens")
        self._store_url, self._job_id, self._site_folder = store_url, job_id, site_folder
        self._folder = cache / hashlib.sha256(store_url.encode()).hexdigest()[:16] / job_id
        self._cache = ModelCache(self._folder, KEPT_MODELS)

    def pull(self, wanted: str, connect: Callable[[], BlobStore]) -> Pulled:
        """The version that `wanted` (check_wanted) means now; if the store is away, what it meant before.

        Raises StoreUnavailable if the store is away and the version is not, whole, in the cache; NotFound for a
        job or version that there is not; Fatal as the store does.
        """
        try:
            store = connect()
            job, answer = self._ask(store, wanted)
            model = LocalModel(job, store, self._cache, self._site_folder)
            initial, version = model.pull(job.initial), self._pull_version(model, answer.current)
            self._remember(job, wanted, answer)
        except StoreUnavailable as exc:
            return self.from_cache(wanted, str(exc))
        weights = assemble(job, initial, version, self._site_folder)
        return Pulled(job, answer, weights, "", has_own_norm(job, self._site_folder))

    def from_cache(self, wanted: str, away: str) -> Pulled:
        """The same from the cache alone; `away` says why. Raises StoreUnavailable naming what is missing."""
        known = self._known()
        if known is None:
            raise StoreUnavailable(
                f"{away}; no version of {self._job_id} has been pulled here while the store answered, so there is "
                f"nothing to use without it ({self._folder})"
            )
        answer = known.answers.get(wanted) or next(
            (a for a in known.answers.values() if str(a.current.version) == wanted), None
        )
        if answer is None:
            there = ", ".join(f"{w} ({a.current.version})" for w, a in sorted(known.answers.items()))
            raise StoreUnavailable(f"{away}; version {wanted} was not pulled before, only {there or 'none'}")
        initial, version = (self._read(ref, away) for ref in (known.job.initial, answer.current.model))
        weights = assemble(known.job, initial, version, self._site_folder)
        return Pulled(known.job, answer, weights, away, has_own_norm(known.job, self._site_folder))

    def _read(self, ref: ModelRef, away: str) -> TensorFile:
        path = self._cache.path(ref)
        try:
            if not self._cache.holds(ref):
                what = "is damaged: its sha256 is not its name" if path.is_file() else "is gone"
                raise StoreUnavailable(
                    f"{away}; {path} {what}, so it has to be downloaded again before it is used"
                )
            return decode(path.read_bytes())
        except (OSError, BadPayload) as exc:
            raise StoreUnavailable(f"{away}; {path} cannot be read: {exc}") from exc

    def _ask(self, store: BlobStore, wanted: str) -> tuple[Job, Answer]:
        try:
            job = load_job(store, self._job_id)
        except NotFound as exc:
            raise NotFound(f"there is no job {self._job_id!r} in {self._store_url}") from exc
        now, meant = datetime.now(UTC), resolve(store, self._job_id, wanted)
        return job, Answer(current=meant.current, reason=meant.reason, asked_at=now)

    def _pull_version(self, model: LocalModel, current: ModelVersion) -> TensorFile:
        try:
            return model.pull(current.model)
        except NotFound as exc:
            raise NotFound(
                f"{exc}: retention has removed version {current.version}; the newest ones are kept, and "
                f"`fedqueue replay {self._job_id} --to {current.version} --out FILE` makes this one again"
            ) from exc

    def _known(self) -> Known | None:
        try:
            return Known.from_json((self._folder / "known.json").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, Rejected) as exc:
            raise StoreUnavailable(f"{self._folder / 'known.json'} cannot be used: {exc}; delete it") from exc

    def _remember(self, job: Job, wanted: str, answer: Answer) -> None:
        """Keep the answer, and those before it whose models are still here."""
        try:
            before = self._known()
        except StoreUnavailable:
            before = None
        answers = before.answers if before is not None and before.job == job else {}
        answers = {
            **{w: a for w, a in answers.items() if self._cache.path(a.current.model).exists()},
            wanted: answer,
        }
        known = Known(store_url=self._store_url, job=job, answers=answers)
        try:
            replace_durably(self._folder / "known.json", known.to_json())
        except OSError as exc:
            raise StoreUnavailable(f"the model cache {self._folder} cannot be used: {exc}") from exc
