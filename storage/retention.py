"""Retention: which objects of a job may go, and how they go without anybody missing them.

What goes, each after a grace time:

    models/    what no record names: left behind by a worker that died before its record
               a superseded version with its optimiser state, unless it is version 0, one of the newest
               `keep_versions`, measured (metrics/<version>/), due for a central evaluation, proposed for release
               or released (releases/<version>/), stable, or offered while newer ones are in quarantine. After a
               rollback several versions have one model: it stays for the sake of any of them
    updates/   the payload of a refused update
               what no record names, if no message about it could be accepted any more (`_why_orphan_upload`)
    metrics/   without a grace time: what was measured of a version whose model has gone. A report that comes in the
               instant in which its version is collected is so treated as one that comes later, and is refused

Never: job.json, the initial model, log, other metrics, rejected/, the payloads of merged and pending updates, and keys
that federation/keys.py does not describe. From the log and those payloads `fedqueue replay` makes every version
again. Of a job that has no log nothing goes at all: it may be about to be created.

Order: read the log to its head, decide, append Collected by compare-and-swap on that head, delete. So the log
itself orders a deletion against publishes, and no clock has to be right for that. A publish whose record comes
first makes the append a Conflict, and each key of the batch is judged again by the new records. One whose record
comes second meets the Collected record, and stores its model anew if that names it. A process may die anywhere:
what was collected and is still there belongs to nothing any more, so the next run finds, records and deletes it.

Ages only choose candidates, and come from one clock, the store's: when an object or a log record was written. A
worker with a wrong clock deletes nothing.
"""

from __future__ import annotations

import functools
import re
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from federation.errors import Conflict, NotFound
from federation.ids import UUID7_PATTERN, is_name
from federation.jobs import Job
from federation.keys import (
    PROBE_PREFIX,
    log_key,
    metrics_prefix,
    models_prefix,
    releases_prefix,
    updates_prefix,
)
from federation.points import Point, reach
from federation.types import Accepted, Collected, Head, LogRecord, ModelVersion
from storage.blob import BlobStore
from storage.log import VersionLog, named, refusals

ORPHAN_MODEL = "no version consists of it"
SUPERSEDED = "its version is superseded"
REFUSED = "its update was refused"
MODEL_GONE = "the model that it measures has gone"
CLOSED = "no record names it, and the job is closed"
TOO_STALE = "no record names it, and whatever it is based on is too stale"

_MODEL = re.compile(r"[0-9a-f]{64}(-[0-9a-z]+)?\.safetensors\Z")
_METRICS = re.compile(r"(?P<version>[0-9]{10})/(?P<who>[^/]+)\.json\Z")
_UUID7 = UUID7_PATTERN.removeprefix("^").removesuffix(r"\Z")
_UPLOAD = re.compile(rf"(?P<site>[^/]+)/(?P<id>{_UUID7})\.safetensors\Z")

BATCH = 200
"""Objects in one record. So a run that has little time gets something done, and is soon at its end when told to."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Policy:
    """How long things stay. The predicates are the aggregator's and the tasks', which storage does not know."""

    grace: timedelta
    keep_versions: int
    too_stale: Callable[[int, int], bool]
    """(newest version, base version): no update from that base is accepted any more. Then none from an older one is."""
    due: Callable[[int, Head], bool]
    """(version before, head): the server evaluates the version of this head."""


@dataclass(frozen=True)
class Garbage:
    """An object that may go. `age` is the time since it was written."""

    key: str
    why: str
    nbytes: int
    age: timedelta


@dataclass(slots=True)
class Stored:
    """A model version in the log, made by record `seq`; `index` counts from the first."""

    version: int
    index: int
    seq: int
    model: str
    """Its key."""
    due: bool = False
    superseded: int | None = None
    """The record that made the next one."""


class History:
    """What the log says of objects. Kept between runs, so that a process reads each record once.

    Some 100 bytes per update and per version.
    """

    def __init__(self, due: Callable[[int, Head], bool]) -> None:
        self._due = due
        self._newest: LogRecord | None = None
        self.versions: list[Stored] = []
        self.namers: dict[str, list[Stored]] = {}  # model key -> the versions that consist of it
        self.pending: set[bytes] = set()
        self.merged: set[bytes] = set()
        self.refused: dict[bytes, int] = {}  # update id -> the record that refuses it

    @property
    def newest(self) -> LogRecord:
        assert self._newest is not None, "nothing is read yet"
        return self._newest

    @property
    def head(self) -> Head:
        return self.newest.head

    def read(self, log: VersionLog, stop: Callable[[], bool] = _never) -> bool:
        """Read what is new. False if `stop()` came before the end. Raises NotFound, CorruptLog, StoreUnavailable."""
        start = 0 if self._newest is None else self._newest.seq + 1
        for record in log.history(start):
            self.add(record)
            if stop():
                return False
        return True

    def add(self, record: LogRecord) -> None:
        """The next record."""
        event, current = record.event, record.head.current
        refused = {_id(refusal.update.update_id) for refusal in refusals(event)}
        decided = {_id(update_id) for update_id in named(event)}
        if isinstance(event, Accepted):
            self.pending |= decided
        else:
            self.pending -= decided
            self.merged |= decided - refused
            self.refused |= dict.fromkeys(refused, record.seq)
        if isinstance(event, Collected):
            for key in event.keys:
                self.namers.pop(key, None)
        if self._newest is None or self._newest.head.current != current:
            made = Stored(current.version, len(self.versions), record.seq, current.model.key)
            if self.versions:
                self.versions[-1].superseded = record.seq
            self.versions.append(made)
            for key in _keys(current):
                self.namers.setdefault(key, []).append(made)
        previous = self.versions[-2].version if len(self.versions) > 1 else 0
        self.versions[-1].due = self._due(
            previous, record.head
        )  # a job's last one is, as soon as it is the last
        self._newest = record

    def has_lost(self, version: int) -> bool:
        """Whether this version was stored and its model was collected."""
        index = bisect_left(self.versions, version, key=lambda stored: stored.version)
        found = self.versions[index : index + 1]
        return bool(found) and found[0].version == version and found[0].model not in self.namers


@dataclass(frozen=True)
class Survey:
    """What a decision goes by: the log as far as it is read, and what the store said once."""

    job: Job
    policy: Policy
    history: History
    now: datetime
    horizon: int
    """The newest log record that is older than the grace time; -1: none."""
    bases_since: datetime | None
    """When the oldest version was published that an update may still come from; None: every one may."""
    measured: frozenset[int]
    """Versions with metrics."""
    released: frozenset[int]
    """Versions of which sites were asked whether they may be given away."""
    modified: Callable[[str], datetime]
    """When an object was written, asked for where its own age counts. Raises NotFound."""

    def why(self, key: str) -> str | None:
        """Why the object with this key may go; None: it stays."""
        if key == self.job.initial.key:
            return None
        if _MODEL.match(key.removeprefix(models_prefix(self.job.id))):
            return self._why_model(key)
        if upload := _UPLOAD.match(key.removeprefix(updates_prefix(self.job.id))):
            return self._why_upload(key, _id(upload["id"])) if is_name(upload["site"]) else None
        if metrics := _METRICS.match(key.removeprefix(metrics_prefix(self.job.id))):
            gone = self.history.has_lost(int(metrics["version"])) and is_name(metrics["who"])
            return MODEL_GONE if gone else None
        return None

    def _why_model(self, key: str) -> str | None:
        namers = self.history.namers.get(key)
        pinned = {self.history.head.offered, self.history.head.stable}
        if any(key in _keys(version) for version in pinned if version is not None):
            return None
        if namers is None:
            return ORPHAN_MODEL if self._is_old(key) else None
        newest = len(self.history.versions) - self.policy.keep_versions
        stays = any(
            stored.version == 0
            or stored.index >= newest
            or stored.due
            or stored.version in self.measured
            or stored.version in self.released
            or stored.superseded is None
            or stored.superseded > self.horizon
            for stored in namers
        )
        return None if stays else SUPERSEDED

    def _why_upload(self, key: str, update_id: bytes) -> str | None:
        history = self.history
        if update_id in history.merged or update_id in history.pending:
            return None
        if update_id in history.refused:
            return REFUSED if history.refused[update_id] <= self.horizon else None
        return self._why_orphan_upload(key)

    def _why_orphan_upload(self, key: str) -> str | None:
        """A payload that no record names. Its age alone says nothing: the broker may hold the message about it for
        days while no worker runs, or an operator requeue it from the dead letters, and then it must be there.

        So it goes when every such message would be refused: the job is closed, or the base is too stale. The base
        was published before the payload was uploaded, because training comes in between. If all versions that were
        published up to a grace time after the upload are too stale now, so is the base, and it stays so. A site
        uploads again before it publishes again, but that changes neither the update nor its base.
        """
        if self.history.head.closed is not None:
            return CLOSED if self._is_old(key) else None
        if self.bases_since is None or not self._is_old(key):
            return None
        return TOO_STALE if self.modified(key) + self.policy.grace < self.bases_since else None

    def _is_old(self, key: str) -> bool:
        return self.modified(key) < self.now - self.policy.grace


class Retention:
    """One job's retention as one process sees it. Remembers what it has read of the log."""

    def __init__(self, store: BlobStore, log: VersionLog, job: Job, policy: Policy) -> None:
        self._store, self._log, self._job, self._policy = store, log, job, policy
        self.history = History(policy.due)
        """As far as `plan` and `collect` have read."""

    def plan(self) -> list[Garbage]:
        """What may go now.

        Changes nothing, but for an object below _probe/, written and removed to learn the store's time.
        Raises NotFound if the job has no log, CorruptLog, StoreUnavailable.
        """
        self.history.read(self._log)
        return list(self._garbage(self._survey(), _never))

    def collect(self, stop: Callable[[], bool] = _never) -> list[Garbage]:
        """Remove what may go, in batches, until `stop()`; the next call goes on. Returns what was removed.

        Raises like `plan`.
        """
        if not self.history.read(self._log, stop):
            return []
        survey = self._survey()
        gone: list[Garbage] = []
        found = self._garbage(survey, stop)
        while batch := list(islice(found, BATCH)):
            batch = self._record(survey, batch)
            reach(Point.COLLECTED)
            for item in batch:
                self._store.delete(item.key)
                reach(Point.DELETED)
            gone += batch
        return gone

    def _record(self, survey: Survey, batch: list[Garbage]) -> list[Garbage]:
        """Say in the log that `batch` goes. Returns what of it still may, where others wrote first."""
        history = self.history
        while batch:
            event = Collected(keys=tuple(item.key for item in batch))
            try:
                history.add(self._log.append(history.newest, event, history.head))
            except Conflict:
                history.read(self._log)
                batch = [item for item in batch if survey.why(item.key)]
            else:
                return batch
        return []

    def _survey(self) -> Survey:
        history, policy, job_id = self.history, self._policy, self._job.id
        now = store_time(self._store)
        modified = functools.cache(self._store.modified)

        def written(seq: int) -> datetime:
            return modified(log_key(job_id, seq))

        def may_be_base(stored: Stored) -> bool:
            return not policy.too_stale(history.head.version, stored.version)

        # the order of the log is that of time, so two searches ask for few of its records' times
        horizon = bisect_left(range(history.newest.seq + 1), now - policy.grace, key=written) - 1
        oldest = bisect_left(history.versions, True, key=may_be_base)
        return Survey(
            job=self._job,
            policy=policy,
            history=history,
            now=now,
            horizon=horizon,
            bases_since=written(history.versions[oldest].seq) if oldest else None,
            measured=frozenset(_versions_below(self._store, metrics_prefix(job_id))),
            released=frozenset(_versions_below(self._store, releases_prefix(job_id))),
            modified=modified,
        )

    def _garbage(self, survey: Survey, stop: Callable[[], bool]) -> Iterator[Garbage]:
        job_id = self._job.id
        for prefix in (models_prefix(job_id), updates_prefix(job_id), metrics_prefix(job_id)):
            for key in self._store.list(prefix):
                if stop():
                    return
                try:
                    if why := survey.why(key):
                        age = survey.now - survey.modified(key)
                        yield Garbage(key, why, self._store.size(key), age)
                except NotFound:
                    continue  # somebody else has just removed it


def _keys(version: ModelVersion) -> set[str]:
    return {ref.key for ref in (version.model, version.server_state) if ref is not None}


def _versions_below(store: BlobStore, prefix: str) -> Iterator[int]:
    for key in store.list(prefix):
        version = key.removeprefix(prefix).partition("/")[0]
        if version.isascii() and version.isdigit():
            yield int(version)


def store_time(store: BlobStore) -> datetime:
    """What time it is for the store: when an object is written that is written now. Raises StoreUnavailable."""
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    try:
        store.put(key, b"what time is it")
        return store.modified(key)
    finally:
        store.delete(key)


def _id(update_id: str) -> bytes:
    return uuid.UUID(update_id).bytes
