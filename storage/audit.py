"""Is everything there, and does everything count once? `fedqueue audit`, from the object store alone.

Read-only, and safe beside running workers. What makes it so is the order in which things are written, and read:

    written                                     read here
    upload, then its record                     uploads are listed before the log is read
    refusal in the log, then rejected/…         likewise: what is there already has its record
    version in the log, then metrics/…          likewise
    Collected in the log, then the deletion     what is missing once the log is read to its end is looked up in
                                                what was appended meanwhile, and looked at once more

In memory: the keys of the job, the ids of its updates, and one object. The log is streamed.

What an audit cannot see: that the newest records of a log are gone, if nothing else in the store tells of them.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64decode
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from federation import keys
from federation.base import Value
from federation.errors import BadPayload, CorruptLog, NotFound, Rejected
from federation.ids import NAME_PATTERN, UUID7_PATTERN
from federation.jobs import Job, ModelRef
from federation.types import Collected, Contribution, Evaluation, LogRecord, Published, Refusal
from storage.blob import BlobStore
from storage.jobs import list_dead_letters, load_job
from storage.ledger import Ledger
from storage.log import refusals, utc_now
from storage.reading import MAX_OBJECT_BYTES
from storage.readonly import ReadOnlyStore
from storage.releases import defects
from storage.salvage import LogReader

V = TypeVar("V", bound=Value)

_NAME, _ID = NAME_PATTERN[1:-2], UUID7_PATTERN[1:-2]
_ANY_ID = re.compile(_ID)
_KINDS = {  # what lies below jobs/<job>/<kind>/, besides the log
    "invitations": re.compile(rf"{_NAME}\.json\Z"),
    "members": re.compile(rf"{_NAME}\.json\Z"),
    "releases": re.compile(r"[0-9]{10}/(proposal\.json|answers/[0-9]{6}\.json|bundle/[^/]+)\Z"),
    "metrics": re.compile(rf"[0-9]{{10}}/{_NAME}\.json\Z"),
    "models": re.compile(r"[0-9a-f]{64}(-[0-9a-z]+)?\.safetensors\Z"),
    "rejected": re.compile(rf"{_NAME}/{_ID}\.json\Z"),
    "updates": re.compile(rf"{_NAME}/{_ID}\.safetensors\Z"),
}
_RESTORE = "restore it from a backup"


@dataclass(frozen=True)
class Finding:
    """One line of an audit. An error is a promise broken; a note is what an operator may want to know."""

    level: Literal["error", "note"]
    subject: str  # an object key
    message: str  # what is the matter with it, and what to do


@dataclass
class Tally:
    """What an audit has seen so far."""

    records: int = 0
    versions: int = 0
    merged: int = 0
    rejected: int = 0
    pending: int = 0
    orphaned: int = 0
    bytes: int = 0  # whose digest was computed
    errors: int = 0
    notes: int = 0


@dataclass(frozen=True)
class _Declared:
    """An object that has to be there, and what it must be."""

    key: str
    nbytes: int
    sha256: str
    seq: int  # of the record that says so; -1: job.json
    what: str
    pending: str = ""  # the id of the update that waits for its merge


def audit(store: BlobStore, job_id: str, *, digests: bool = True) -> Iterator[Finding]:
    """All findings about a job; without an error among them it passes. Writes nothing.

    digests=False: of models and payloads only the sizes are compared.
    Raises NotFound if there is no such job; StoreUnavailable if the store does not answer for some 8 seconds.
    """
    return Audit(store, job_id, digests=digests).findings()


class Audit:
    """One audit of one job. `findings` may be read once; `tally` is complete after it."""

    def __init__(
        self,
        store: BlobStore,
        job_id: str,
        *,
        digests: bool = True,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`clock`: the age of an object is this machine's time minus the store's time of writing."""
        self.tally = Tally()
        self._store = ReadOnlyStore(store)
        self._job_id = job_id
        self._digests = digests
        self._clock = clock
        self._log = LogReader(self._store, job_id)
        self._listed: dict[str, set[str]] = {kind: set() for kind in _KINDS}
        self._suspects: list[_Declared] = []

    def findings(self) -> Iterator[Finding]:
        """See `audit`."""
        for finding in self._findings():
            self.tally.errors += finding.level == "error"
            self.tally.notes += finding.level == "note"
            yield finding

    def _findings(self) -> Iterator[Finding]:
        job = yield from self._read_job()
        yield from self._list_objects()
        ledger = Ledger(self._job_id, job.spec if job else None)
        if job is not None:
            self._expect(_model(job.initial, -1, "the initial model"))
        yield from self._read_log(ledger)
        if ledger.newest is None:
            yield from self._no_log()
            return
        # of a head that cannot be read nothing is known
        if ledger.newest.seq + 1 == self._log.next_seq:
            yield from self._check_head(job, ledger, ledger.newest)
        yield from self._settle(ledger)
        yield from self._check_refusals(ledger)
        yield from self._check_metrics(ledger)
        yield from self._check_releases(ledger)
        yield from self._check_leftovers(job, ledger)

    # --- job.json and the listing -----------------------------------------------------------------------------

    def _read_job(self) -> Generator[Finding, None, Job | None]:
        key = keys.job_key(self._job_id)
        try:
            job = load_job(self._store, self._job_id)
        except NotFound:
            if next(self._store.list(keys.log_prefix(self._job_id)), None) is None:
                raise NotFound(f"there is no job {self._job_id!r}") from None
            yield Finding("error", key, f"is missing, but the job has a log: {_RESTORE}")
            return None
        except CorruptLog as exc:
            yield Finding("error", key, f"cannot be read ({exc}): {_RESTORE}")
            return None
        if job.id != self._job_id:
            yield Finding("error", key, f"describes job {job.id!r}: {_RESTORE}")
        return job

    def _list_objects(self) -> Iterator[Finding]:
        prefix = keys.job_prefix(self._job_id)
        for key in self._store.list(prefix):
            kind, _, rest = key.removeprefix(prefix).partition("/")
            if kind in _KINDS and _KINDS[kind].match(rest):
                self._listed[kind].add(key)
            elif kind != "log" and key != keys.job_key(self._job_id):
                yield Finding(
                    "note", key, "is nothing that fedqueue writes: look at it, and move it elsewhere"
                )

    def _no_log(self) -> Iterator[Finding]:
        prefix = keys.log_prefix(self._job_id)
        if self._log.next_seq or any(self._listed[kind] for kind in ("updates", "rejected", "metrics")):
            yield Finding(
                "error", prefix, f"has no record that can be read, but sites worked on this job: {_RESTORE}"
            )
        else:
            yield Finding(
                "note", prefix, "has not begun: a worker begins it when it gets the job's message again"
            )

    # --- the log, and what it needs ---------------------------------------------------------------------------

    def _read_log(self, ledger: Ledger) -> Iterator[Finding]:
        for item in self._log.read():
            if not isinstance(item, LogRecord):
                yield Finding("error", item.key, item.problem)
                continue
            before = ledger.newest
            for problem in ledger.add(item):
                key = keys.log_key(self._job_id, item.seq)
                yield Finding("error", key, f"{problem}: restore the log, or give it up for a new job")
            self._expect_all(before, item)
            self.tally.records, self.tally.versions = ledger.records, len(ledger.versions)
            self.tally.merged, self.tally.rejected = ledger.merged, ledger.rejected

    def _expect_all(self, before: LogRecord | None, record: LogRecord) -> None:
        """What a record names for the first time."""
        current, seq = record.head.current, record.seq
        if before is None or current != before.head.current:
            self._expect(_model(current.model, seq, f"the model of version {current.version}"))
            if current.server_state is not None:
                what = f"the optimiser's state of version {current.version}"
                self._expect(_model(current.server_state, seq, what))
        if isinstance(record.event, Published):
            for contribution in record.event.merged:
                self._expect(_payload(contribution, seq, "the payload of a merged update"))

    def _check_head(self, job: Job | None, ledger: Ledger, newest: LogRecord) -> Iterator[Finding]:
        """What the next decision and the next merge need."""
        head, collected = newest.head, ledger.collected
        self.tally.pending = len(head.pending)
        needed = {c.update.payload_key for c in head.pending}
        for version in (head.current, head.offered, head.stable or head.current):
            needed |= {ref.key for ref in (version.model, version.server_state) if ref is not None}
        if job is not None:
            needed.add(job.initial.key)
        for key in sorted(needed & collected.keys()):
            message = f"is needed, but record {collected[key]} gives it to retention: {_RESTORE}"
            yield Finding("error", key, message)
        for contribution in head.pending:
            if contribution.update.payload_key not in collected:
                update_id = contribution.update.update_id
                self._expect(_payload(contribution, newest.seq, "the payload of a pending update", update_id))
        if head.closed is not None and head.pending:
            message = (
                f"the job is closed, and {len(head.pending)} updates still wait to be refused: start a worker"
            )
            yield Finding("note", keys.log_key(self._job_id, newest.seq), message)

    def _expect(self, declared: _Declared) -> None:
        if self._compare(declared):
            self._suspects.append(declared)

    def _compare(self, declared: _Declared) -> Finding | None:
        """In what the object is not as declared; None if it is."""

        def error(message: str) -> Finding:
            return Finding("error", declared.key, f"{declared.what} {message}")

        said = f"record {declared.seq}" if declared.seq >= 0 else "job.json"
        try:
            if self._digests:
                data = self._store.get(declared.key, max_bytes=declared.nbytes)
                nbytes, digest = len(data), hashlib.sha256(data).hexdigest()
                self.tally.bytes += nbytes
            else:
                nbytes, digest = self._store.size(declared.key), declared.sha256
        except NotFound:
            return error(f"is missing, and no later record says that retention took it: {_RESTORE}")
        except BadPayload as exc:
            return error(f"is not as {said} says ({exc}): {_RESTORE}")
        if nbytes != declared.nbytes:
            return error(f"has {nbytes} bytes, but {said} says {declared.nbytes}: {_RESTORE}")
        if digest == declared.sha256:
            return None
        if declared.pending:  # nobody has read it before: it may be the site that declared another one
            message = f"has sha256 {digest}, not {declared.sha256}: it will be refused, the site may ask why"
            return Finding("note", declared.key, f"{declared.what} {message}")
        return error(f"has sha256 {digest}, but {said} says {declared.sha256}: {_RESTORE}")

    def _settle(self, ledger: Ledger) -> Iterator[Finding]:
        """Objects that were not as declared: retention or a refusal may have come in between, after all."""
        if not self._suspects:
            return
        collected, refused = dict(ledger.collected), set()
        for item in self._log.read():
            if isinstance(item, LogRecord):
                refused |= {refusal.update.update_id for refusal in refusals(item.event)}
                if isinstance(item.event, Collected):
                    collected |= dict.fromkeys(item.event.keys, item.seq)
        for declared in self._suspects:
            if collected.get(declared.key, -2) > declared.seq >= 0 or declared.pending in refused:
                continue
            finding = self._compare(declared)
            if finding is not None:
                yield finding

    # --- what the log needs no more, or never did -------------------------------------------------------------

    def _check_refusals(self, ledger: Ledger) -> Iterator[Finding]:
        for key in sorted(self._listed["rejected"]):
            try:
                update = self._load(key, Refusal).update
            except NotFound:
                continue
            except Rejected as exc:
                yield Finding("error", key, f"cannot be read ({exc}): {_RESTORE}")
                continue
            if key != keys.rejected_key(update.job, update.site, update.update_id):
                yield Finding(
                    "error", key, f"tells of update {update.update_id} of {update.site}: {_RESTORE}"
                )
            elif key not in ledger.refusals:
                yield Finding("error", key, "tells of a refusal that the log does not: look for lost records")
        for key in sorted(ledger.refusals - self._listed["rejected"]):
            if not self._exists(key):
                message = "is not written, though the log refuses the update; nothing is lost, the log has the reason"
                yield Finding("note", key, message)

    def _check_metrics(self, ledger: Ledger) -> Iterator[Finding]:
        for key in sorted(self._listed["metrics"]):
            try:
                found = self._load(key, Evaluation)
            except NotFound:
                continue
            except Rejected as exc:
                yield Finding("error", key, f"cannot be read ({exc}): delete it")
                continue
            if key != keys.metrics_key(found.job, found.version, found.who):
                yield Finding("error", key, f"measures version {found.version} of {found.job!r}: delete it")
            elif found.version not in ledger.versions:
                message = f"measures version {found.version}, which never was: look for lost records"
                yield Finding("error", key, message)

    def _check_releases(self, ledger: Ledger) -> Iterator[Finding]:
        prefix = keys.releases_prefix(self._job_id)
        for version in sorted({int(key.removeprefix(prefix)[:10]) for key in self._listed["releases"]}):
            if version not in ledger.versions:
                key = keys.release_prefix(self._job_id, version)
                yield Finding(
                    "error", key, f"is of version {version}, which never was: look for lost records"
                )
            for key, problem in defects(self._store, self._job_id, version, digests=self._digests):
                yield Finding("error", key, f"{problem}: {_RESTORE}")

    def _check_leftovers(self, job: Job | None, ledger: Ledger) -> Iterator[Finding]:
        collected = ledger.collected
        for key in sorted(set().union(*self._listed.values()) & collected.keys()):
            if self._exists(key):
                message = (
                    f"record {collected[key]} gave it to retention, but it is still there: run `fedqueue gc`"
                )
                yield Finding("note", key, message)
        letters: dict[str, str] = {}
        yield from self._read_dead_letters(ledger, letters)
        for key in sorted(self._listed["updates"] - ledger.named - collected.keys()):
            if (age := self._age(key)) is not None:
                self.tally.orphaned += 1
                letter = letters.get(key.rpartition("/")[2].removesuffix(".safetensors"))
                why = f"its message is {letter}" if letter else "its message is on its way, or never was sent"
                yield Finding("note", key, f"an upload, {age} old, that no record names: {why}")
        named = ledger.named | {job.initial.key} if job else ledger.named
        for key in sorted(self._listed["models"] - named - collected.keys()):
            if (age := self._age(key)) is not None:
                message = "a publish is about to name it, or died before it did"
                yield Finding("note", key, f"a model, {age} old, that no record names: {message}")

    def _read_dead_letters(self, ledger: Ledger, letters: dict[str, str]) -> Iterator[Finding]:
        """Fills `letters`: the id of an update -> the key of the dead letter whose message has it."""
        try:
            for letter in list_dead_letters(self._store):
                key = keys.deadletter_key(letter.id)
                for update_id in sorted(set(_ANY_ID.findall(_text(letter.body_base64)))):
                    letters[update_id] = key
                    seq = ledger.record_of(update_id)
                    if seq is not None:
                        message = (
                            f"holds update {update_id}, which record {seq} has: it counts, delete the letter"
                        )
                        yield Finding("note", key, message)
        except CorruptLog as exc:
            yield Finding("error", keys.DEADLETTERS_PREFIX, f"{exc}: move it elsewhere")

    def _load(self, key: str, kind: type[V]) -> V:
        """Raises NotFound if it was removed since it was listed; Rejected."""
        return kind.from_json(self._store.get(key, max_bytes=MAX_OBJECT_BYTES))

    def _exists(self, key: str) -> bool:
        try:
            self._store.size(key)
        except NotFound:
            return False
        return True

    def _age(self, key: str) -> timedelta | None:
        """In whole seconds; None if it was removed since it was listed."""
        try:
            age = self._clock() - self._store.modified(key)
        except NotFound:
            return None
        return timedelta(seconds=max(0, int(age.total_seconds())))


def _model(ref: ModelRef, seq: int, what: str) -> _Declared:
    return _Declared(ref.key, ref.nbytes, ref.sha256, seq, what)


def _payload(contribution: Contribution, seq: int, what: str, pending: str = "") -> _Declared:
    update = contribution.update
    return _Declared(update.payload_key, update.payload_bytes, update.payload_sha256, seq, what, pending)


def _text(body_base64: str) -> str:
    try:
        return b64decode(body_base64).decode("ascii", "replace")
    except ValueError:
        return ""
