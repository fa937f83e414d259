"""The folder from which an inference process takes its model. docs/deploy.md is for whoever reads it.

    versions/<version>/model.safetensors    all tensors of the model; model.onnx beside it if that was asked for
    versions/<version>/manifest.json        Manifest: what they are, with their digests
    current, previous                       links to two of these folders; each is replaced in one step
    deployments.json                        Note: what is being tried, what failed, what was done

A version's folder appears whole and synced, under a name that no other content ever had while a link led to it. A
swap is noted before the first link changes, and settled after its check: so whoever opens the folder after a kill
knows whether what `current` leads to has passed, and where to go back to.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field

from federation.base import Value
from federation.errors import BadPayload, BadSettings, Rejected
from federation.ids import Name, Sha256
from federation.jobs import MAX_VERSION, ClassName
from federation.types import Metrics, ModelVersion
from storage.files import CHUNK_BYTES, TEMPORARY_MARK, replace_durably, sync_folder

MODEL, ONNX, MANIFEST = "model.safetensors", "model.onnx", "manifest.json"
CURRENT, PREVIOUS, VERSIONS, NOTE, LOCK = "current", "previous", "versions", "deployments.json", ".lock"
KEPT_ENTRIES = 100


class DeployedFile(Value):
    sha256: Sha256
    nbytes: int = Field(ge=1)


class InputConvention(Value):
    """What the model is fed: the whole image, squeezed into the square. `mean` and `std` are applied by the caller."""

    shape: tuple[int, int, int, int]
    layout: Literal["NCHW"] = "NCHW"
    colour: Literal["RGB"] = "RGB"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


class Manifest(Value):
    """`manifest.json`: everything that a program must know of the files beside it."""

    schema_version: Literal[1] = 1
    job: Name
    channel: str
    version: int = Field(ge=0, le=MAX_VERSION)
    version_sha256: Sha256 = Field(
        description="of the version's file in the store, which may hold fewer tensors"
    )
    previous: int | None = Field(default=None, description="the version that was deployed before this one")
    files: dict[str, DeployedFile]
    arch: str
    classes: tuple[ClassName, ...] = Field(description="label 1 is the first")
    image_size: int = Field(description="side of the input, pixels")
    input: InputConvention
    own_norm: bool = Field(default=False, description="BatchNorm layers are this site's own")
    metrics: dict[Name, Metrics] = Field(default_factory=dict, description="of this version, by who measured")
    deployed_at: AwareDatetime


class Trial(Value):
    """A swap that is not settled: the folder that `current` is to lead to, and where the links led before."""

    folder: str
    current: str | None
    previous: str | None


class Failure(Value):
    """A version that did not pass: it is not tried again until somebody says so."""

    version: int
    version_sha256: Sha256
    reason: str
    at: AwareDatetime


class Entry(Value):
    """One line of the history. undone: swapped in, and out again before its check had ended."""

    what: Literal["deployed", "failed", "undone"]
    version: int
    channel: str
    reason: str = ""
    at: AwareDatetime


class Note(Value):
    """`deployments.json`."""

    schema_version: Literal[1] = 1
    job: Name
    trial: Trial | None = None
    failures: tuple[Failure, ...] = ()
    history: tuple[Entry, ...] = ()


class DeployedFolder:
    """One job's folder. To be changed by one process at a time, which holds `locked()`; read by anybody."""

    def __init__(self, root: Path, job: str) -> None:
        self.root, self.job = root.absolute(), job

    # --- reading -------------------------------------------------------------------------------------------

    def note(self) -> Note:
        """Raises BadSettings if the folder is another job's, or its note cannot be read; OSError."""
        note = read_note(self.root)
        if note is None:
            return Note(job=self.job)
        if note.job != self.job:
            raise BadSettings(f"{self.root} holds job {note.job}: choose another folder for {self.job}")
        return note

    def target(self, link: str) -> str | None:
        """The name of the version's folder that `link` leads to; None if there is no such link."""
        try:
            return os.path.basename(os.readlink(self.root / link))
        except FileNotFoundError:
            return None

    def path(self, name: str) -> Path:
        """Where a version's folder lies."""
        return self.root / VERSIONS / name

    def manifest(self, name: str) -> Manifest:
        """Of one version's folder. Raises OSError, Rejected."""
        return Manifest.from_json((self.path(name) / MANIFEST).read_bytes())

    def deployed(self, link: str = CURRENT) -> Manifest | None:
        """What a link leads to; None if it leads nowhere, or to what is broken."""
        name = self.target(link)
        if name is None:
            return None
        try:
            return self.manifest(name)
        except (OSError, Rejected):
            return None

    def verify(self, name: str) -> Manifest:
        """The manifest, if every file is as it says. Raises BadPayload."""
        try:
            manifest = self.manifest(name)
            for file, declared in manifest.files.items():
                path = self.path(name) / file
                if path.stat().st_size != declared.nbytes or _sha256(path) != declared.sha256:
                    raise BadPayload(f"{path} is not what its manifest says", "wrong-digest")
        except (OSError, Rejected) as exc:
            if isinstance(exc, BadPayload):
                raise
            raise BadPayload(f"{self.path(name)} cannot be read: {exc}") from exc
        return manifest

    # --- changing ------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers away. Raises BadSettings if there is one, OSError."""
        (self.root / VERSIONS).mkdir(parents=True, exist_ok=True)
        fd = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadSettings(
                    f"another process deploys into {self.root}: stop that one, or choose another folder"
                ) from None
            yield
        finally:
            os.close(fd)

    def add(self, manifest: Manifest, files: Mapping[str, bytes]) -> str:
        """A new version's folder with `files`, which are those that the manifest names. Returns its name.

        What `current` and `previous` lead to is never touched: if one has the version's plain name, a number follows.
        """
        name = self._free_name(manifest.version)
        draft = self.root / VERSIONS / f"{TEMPORARY_MARK}{uuid.uuid4().hex}"
        draft.mkdir()
        for file, data in {**files, MANIFEST: manifest.to_json()}.items():
            replace_durably(draft / file, data)
        os.rename(draft, self.path(name))
        sync_folder(self.root / VERSIONS)
        return name

    def find(self, version: ModelVersion, files: frozenset[str]) -> str | None:
        """The folder that a link leads to and that holds `version` whole, with these files; None if none does."""
        for name in (self.target(CURRENT), self.target(PREVIOUS)):
            if name is None:
                continue
            try:
                manifest = self.manifest(name)
                same = (manifest.version, manifest.version_sha256) == (version.version, version.model.sha256)
                if same and files == manifest.files.keys():
                    self.verify(name)
                    return name
            except (OSError, Rejected):
                continue
        return None

    def describe(self, name: str, manifest: Manifest) -> None:
        """Replace a folder's manifest, in one step: the files are the same, what is said of them is newer."""
        replace_durably(self.path(name) / MANIFEST, manifest.to_json())

    def swap(self, name: str) -> None:
        """Lead `current` to this folder and `previous` to the one before, until `settle` or `undo`."""
        current = self.target(CURRENT)
        trial = Trial(folder=name, current=current, previous=self.target(PREVIOUS))
        self._write(self.note().model_copy(update={"trial": trial}))
        self._lead(PREVIOUS, current)
        self._lead(CURRENT, name)

    def settle(self) -> None:
        """What was swapped in has passed; older folders are removed."""
        note = self.note()
        assert note.trial is not None
        manifest = self.manifest(note.trial.folder)
        entry = _entry("deployed", manifest)
        self._write(note.model_copy(update={"trial": None, "history": _newest((*note.history, entry))}))
        self.tidy()

    def undo(self, reason: str, *, failed: bool) -> None:
        """Lead the links where they led before the swap. failed: and remember that this version did not pass."""
        note = self.note()
        trial = note.trial
        assert trial is not None
        try:
            manifest = self.manifest(trial.folder)
        except (OSError, Rejected):
            manifest = None
        if manifest is not None:
            note = _with(note, "failed" if failed else "undone", manifest, reason)
        try:
            self._write(note)  # before the links: a kill between them must not forget that it failed
        finally:
            self._lead(CURRENT, trial.current)
            self._lead(PREVIOUS, trial.previous)
        self._write(note.model_copy(update={"trial": None}))
        self.tidy()

    def reject(self, manifest: Manifest, reason: str) -> None:
        """Remember that a version did not pass, which was not swapped in."""
        self._write(_with(self.note(), "failed", manifest, reason))
        self.tidy()

    def forget_failures(self) -> None:
        """Let versions that failed be tried again; the history keeps what happened."""
        note = self.note()
        if note.failures:
            self._write(note.model_copy(update={"failures": ()}))

    def recover(self) -> Manifest | None:
        """Tidy up after a process that was killed. Returns what `current` leads to if that is still on trial."""
        note = self.note()
        trial = note.trial
        if trial is not None:
            if self.target(CURRENT) == trial.folder and not self._is_lost(note, trial.folder):
                return self.manifest(trial.folder)
            self._lead(CURRENT, trial.current)
            self._lead(PREVIOUS, trial.previous)
            self._write(note.model_copy(update={"trial": None}))
        self.tidy()
        return None

    def tidy(self) -> None:
        """Remove what no link leads to, and what killed processes left behind. Not during a trial."""
        kept = {self.target(CURRENT), self.target(PREVIOUS)}
        for path in (self.root / VERSIONS).iterdir():
            if path.name in kept:
                continue
            gone = path
            if not path.name.startswith(TEMPORARY_MARK):  # a folder with a version's name is always whole
                gone = path.with_name(f"{TEMPORARY_MARK}{uuid.uuid4().hex}")
                os.rename(path, gone)
            shutil.rmtree(gone)
        for left in self.root.glob(f"{TEMPORARY_MARK}*"):
            left.unlink()

    def _is_lost(self, note: Note, name: str) -> bool:
        """True if this folder has failed already, or is not whole."""
        try:
            manifest = self.verify(name)
        except BadPayload:
            return True
        return failed_before(note, manifest.version, manifest.version_sha256) is not None

    def _free_name(self, version: int) -> str:
        name, number = str(version), 1
        while self.path(name).exists():
            number += 1
            name = f"{version}-{number}"
        return name

    def _lead(self, link: str, name: str | None) -> None:
        """In one step; relative, so that the folder may be moved, or mounted elsewhere."""
        if name is None:
            (self.root / link).unlink(missing_ok=True)
        elif self.target(link) != name:
            draft = self.root / f"{TEMPORARY_MARK}{uuid.uuid4().hex}"
            os.symlink(f"{VERSIONS}/{name}", draft)
            os.replace(draft, self.root / link)
        sync_folder(self.root)

    def _write(self, note: Note) -> None:
        replace_durably(self.root / NOTE, note.to_json())


def read_note(root: Path) -> Note | None:
    """None if nothing was ever deployed into this folder. Raises BadSettings if it cannot be read; OSError."""
    path = root / NOTE
    try:
        return Note.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except Rejected as exc:
        raise BadSettings(f"{path} cannot be used: {exc}; delete it, and what failed is forgotten") from exc


def failed_before(note: Note, version: int, version_sha256: str) -> Failure | None:
    """The newest failure of this very version."""
    for failure in reversed(note.failures):
        if (failure.version, failure.version_sha256) == (version, version_sha256):
            return failure
    return None


def described(data: bytes) -> DeployedFile:
    """What a manifest says of a file with this content."""
    return DeployedFile(sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))


def _with(note: Note, what: Literal["failed", "undone"], manifest: Manifest, reason: str) -> Note:
    """`note` and one more entry, once."""
    if what == "failed" and failed_before(note, manifest.version, manifest.version_sha256):
        return note
    changes: dict[str, object] = {"history": _newest((*note.history, _entry(what, manifest, reason)))}
    if what == "failed":
        failure = Failure(
            version=manifest.version,
            version_sha256=manifest.version_sha256,
            reason=reason,
            at=datetime.now(UTC),
        )
        changes["failures"] = (*note.failures, failure)[-KEPT_ENTRIES:]
    return note.model_copy(update=changes)


def _entry(what: Literal["deployed", "failed", "undone"], manifest: Manifest, reason: str = "") -> Entry:
    return Entry(
        what=what, version=manifest.version, channel=manifest.channel, reason=reason, at=datetime.now(UTC)
    )


def _newest(history: tuple[Entry, ...]) -> tuple[Entry, ...]:
    return history[-KEPT_ENTRIES:]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
