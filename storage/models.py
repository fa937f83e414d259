"""Models and payloads in the store: written under their own digest, read with size and digest checked."""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from federation.errors import BadPayload, CorruptLog, NotFound, StoreUnavailable
from federation.ids import new_update_id
from federation.jobs import Job, ModelRef
from federation.keys import model_key, update_key
from federation.layout import Layout
from federation.types import ClientUpdate
from storage.blob import BlobStore
from storage.files import remove_stale
from storage.reading import confirm
from storage.tensors import TensorFile, decode, encode, from_arrays


def save_model(store: BlobStore, job: str, file: TensorFile, *, own: bool = False) -> ModelRef:
    """Store a model under its digest; saving the same tensors again changes nothing. Raises StoreUnavailable.

    own: under a name that nothing had before and nothing will have again. What lies under the plain name may be
    what a worker left behind that died long ago; retention may be about to delete it, or somebody who was
    stopped in the middle of that may delete whatever has that name later.
    """
    data = encode(file)
    digest = hashlib.sha256(data).hexdigest()
    key = model_key(job, digest, uuid.uuid4().hex[:16] if own else "")
    ref = ModelRef(key=key, sha256=digest, nbytes=len(data))
    if store.put_if_absent(ref.key, data):
        return ref
    if store.size(ref.key) != ref.nbytes:
        raise CorruptLog(f"{ref.key} has not the size of its content: delete it and run this again")
    return ref


def load_model(store: BlobStore, ref: ModelRef, expected: Layout | None = None) -> TensorFile:
    """Read a model. Raises NotFound; BadPayload ("too-large" | "wrong-size" | "wrong-digest" | as decode)."""
    return decode(_read_verified(store, ref.key, ref.nbytes, ref.sha256), expected)


def load_full_model(store: BlobStore, job: Job, ref: ModelRef) -> TensorFile:
    """A version with all tensors of the job's model: those that are not exchanged come from `job.initial`.

    Raises NotFound, BadPayload.
    """
    try:
        version = load_model(store, ref)
    except NotFound as exc:
        raise NotFound(
            f"{exc}: if retention has removed this version, "
            f"`fedqueue replay {job.id} --to VERSION --out FILE` makes it again"
        ) from exc
    initial = load_model(store, job.initial)
    if version.layout == initial.layout:
        return version
    return from_arrays({**initial.arrays(), **version.arrays()})


def load_payload(store: BlobStore, update: ClientUpdate, layout: Layout, max_bytes: int) -> TensorFile:
    """Read what a site uploaded, trusting nothing; its size is checked before a byte is read.

    Raises BadPayload: "missing-payload", "too-large", "wrong-size", "wrong-digest", and as `decode`.
    """
    declared = ModelRef(key=update.payload_key, sha256=update.payload_sha256, nbytes=update.payload_bytes)
    return load_upload(store, declared, max_bytes, layout)


def describe_upload(job: str, who: str, data: bytes) -> ModelRef:
    """A new place for `data` where a site may write; nothing is written."""
    key = update_key(job, who, new_update_id())
    return ModelRef(key=key, sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))


def load_upload(
    store: BlobStore, declared: ModelRef, max_bytes: int, expected: Layout | None = None
) -> TensorFile:
    """Read what somebody uploaded and declared to be such; raises like `load_payload`."""
    key = declared.key
    if declared.nbytes > max_bytes:
        raise BadPayload(f"{key}: {declared.nbytes} bytes, at most {max_bytes} are read", "too-large")
    try:
        nbytes = store.size(key)
        if nbytes != declared.nbytes:
            raise BadPayload(f"{key} has {nbytes} bytes, declared are {declared.nbytes}", "wrong-size")
        data = _read_verified(store, key, declared.nbytes, declared.sha256)
    except NotFound as exc:
        raise BadPayload(f"{key} is not in the store: upload before publishing", "missing-payload") from exc
    return decode(data, expected)


def _read_verified(store: BlobStore, key: str, nbytes: int, sha256: str) -> bytes:
    """The object, if size and digest are as declared. Raises NotFound, BadPayload, StoreUnavailable."""
    data = store.get(key, max_bytes=nbytes)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) == nbytes and digest == sha256:
        return data
    confirm(store, key, data, nbytes)
    if len(data) != nbytes:
        raise BadPayload(f"{key} has {len(data)} bytes, declared are {nbytes}", "wrong-size")
    raise BadPayload(f"{key} has sha256 {digest}, declared is {sha256}", "wrong-digest")


@dataclass(frozen=True)
class ModelCache:
    """A site's downloaded models, `<folder>/<sha256>.safetensors`; the least recently used ones are deleted."""

    folder: Path
    max_files: int

    def fetch(self, store: BlobStore, ref: ModelRef) -> Path:
        """The model's file, downloaded if it is not there, or not what it was. Verified every time.

        Raises NotFound, BadPayload ("wrong-size" | "wrong-digest"), StoreUnavailable.
        """
        path = self.path(ref)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.holds(ref):
                store.get_to_file(ref.key, path, nbytes=ref.nbytes, sha256=ref.sha256)
            os.utime(path)
            self._prune(path)
        except OSError as exc:
            raise StoreUnavailable(f"the model cache {self.folder} cannot be used: {exc}") from exc
        return path

    def path(self, ref: ModelRef) -> Path:
        """Where the model's file lies, if it does."""
        return self.folder / f"{ref.sha256}.safetensors"

    def holds(self, ref: ModelRef) -> bool:
        """True if the file is there and its bytes are the model's. Raises OSError if it cannot be read."""
        path = self.path(ref)
        if not path.is_file() or path.stat().st_size != ref.nbytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == ref.sha256

    def _prune(self, newest: Path) -> None:
        others = [path for path in self.folder.glob("*.safetensors") if path != newest]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in others[max(0, self.max_files - 1) :]:
            path.unlink(missing_ok=True)
        remove_stale(self.folder)
