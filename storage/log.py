"""The version log of a job: what happened, in one order that nobody can change afterwards.

    jobs/<job>/log/00000000000000000000.json     Created: version 0
    jobs/<job>/log/00000000000000000001.json     each record holds one event and the whole head after it
    …

The next sequence number is the current one plus one, and put-if-absent of that key is the compare-and-swap: of
all writers that decided on the same head exactly one appends, the others get Conflict and decide again.

The lost reply. A write can succeed while its answer is lost; sent again, it meets its own object and looks
refused. So each record carries a random nonce. Whoever is refused reads the record that is there: with our
nonce it is ours, and the append succeeded; with another it is a Conflict. When even that cannot be found out,
StoreUnavailable goes to the caller, and the same append, called again, sends the same record with the same
nonce. A caller that gives up instead loses nothing either: it reads the head and finds its event in it, or not.

The newest record is found by listing what follows the newest one seen, never by asking for the key that comes
next: an account that may list only the log gets 403, not 404, for an object that does not exist.
"""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from federation.errors import (
    BadPayload,
    BadSettings,
    Conflict,
    CorruptLog,
    NotFound,
    Rejected,
    StoreUnavailable,
)
from federation.keys import log_key, log_prefix, log_seq
from federation.types import (
    Accepted,
    Collected,
    Created,
    Event,
    Head,
    LogRecord,
    ModelVersion,
    Published,
    Refusal,
    Refused,
    RolledBack,
)
from storage.blob import BlobStore
from storage.reading import confirm

MAX_RECORD_BYTES = 64 << 20
"""No larger record is read, so none is written either."""


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_nonce() -> str:
    return uuid.uuid4().hex


class VersionLog:
    """One process's view of one job's log. Keeps the newest record seen; not for sharing between threads."""

    def __init__(
        self,
        store: BlobStore,
        job: str,
        *,
        clock: Callable[[], datetime] = utc_now,
        nonce: Callable[[], str] = new_nonce,
    ) -> None:
        self._store, self._job = store, job
        self._clock, self._nonce = clock, nonce
        self._newest: LogRecord | None = None
        self._unproven: LogRecord | None = None  # sent, with no answer that proves anything
        self._index: dict[
            bytes, int
        ] = {}  # update id -> newest record that names it, of those before _indexed
        self._indexed = 0

    def create(self, head: Head) -> LogRecord:
        """Begin the log with `head` and return its newest record; beginning it again with the same is harmless.

        Raises Conflict if the log began with another head; StoreUnavailable.
        """
        try:
            self._commit(0, Created(), head)
        except Conflict:
            if self._get(0).head != head:
                raise
        return self.head()

    def head(self) -> LogRecord:
        """The newest record. Raises NotFound if the job has no log, CorruptLog, StoreUnavailable."""
        after = -1 if self._newest is None else self._newest.seq
        newest = max(self._sequence(after), default=after)
        if newest > after:
            self._newest = self._get(newest)
        if self._newest is None:
            raise NotFound(f"job {self._job!r} has no log")
        return self._newest

    @property
    def seen(self) -> LogRecord | None:
        """The newest record that this object has read or written. Asks nothing of the store."""
        return self._newest

    def append(self, after: LogRecord, event: Event, head: Head) -> LogRecord:
        """Write the record that follows `after`.

        Raises Conflict if another one does; StoreUnavailable if that cannot be known now: the same call may
        then be repeated, on this object, and will not append twice.
        """
        return self._commit(after.seq + 1, event, head)

    def history(self, start: int = 0) -> Iterator[LogRecord]:
        """Records from sequence number `start` to the newest, oldest first.

        Raises NotFound if the job has no log, CorruptLog, StoreUnavailable.
        """
        seq = start - 1
        for seq in self._sequence(start - 1):
            yield self._get(seq)
        if seq < 0:
            raise NotFound(f"job {self._job!r} has no log")

    def follow(self, after_seq: int) -> list[LogRecord]:
        """What was appended after sequence number `after_seq`; empty if nothing."""
        return list(self.history(after_seq + 1))

    def find(self, update_id: str) -> LogRecord | None:
        """The newest record whose event names the update, or None.

        The first call reads the whole log, a later one what is new since; some hundred bytes are kept per update.
        """
        for record in self.history(self._indexed):
            self._add_to_index(record)
        seq = self._index.get(uuid.UUID(update_id).bytes)
        return None if seq is None else self._get(seq)

    def version(self, version: int) -> ModelVersion:
        """A stored model version by its number.

        Raises NotFound if it was never stored: one publish may advance the number by more than one.
        """
        record = self.first_at(version)
        if record.head.version != version:
            raise NotFound(
                f"job {self._job!r} has no stored version {version}; the newest is {self.head().head.version}"
            )
        return record.head.current

    def is_collected(self, version: ModelVersion, since: int) -> bool:
        """True if retention takes what `version` consists of, by a record after `since`. Reads all of them.

        While it has not, a record that names it comes before one that takes it, which then is not written.
        """
        keys = {ref.key for ref in (version.model, version.server_state) if ref is not None}
        events = (record.event for record in self.history(since + 1))
        return any(isinstance(event, Collected) and keys.intersection(event.keys) for event in events)

    def first_at(self, version: int) -> LogRecord:
        """The first record whose head has reached `version`, or the newest if none has. Reads few of them.

        No record before it can name an update that started from `version`.
        """
        newest = self.head()
        low, high = 0, newest.seq  # versions never fall along the log
        while low < high:
            middle = (low + high) // 2
            if self._get(middle).head.version < version:
                low = middle + 1
            else:
                high = middle
        return newest if low == newest.seq else self._get(low)

    def first_since(self, at: datetime) -> int:
        """The sequence number of the first record that was written at `at` or later; one above the newest if none was.

        By the clocks of the writers. Reads few records.
        """
        return bisect_left(range(self.head().seq + 1), at, key=lambda seq: self._get(seq).at)

    def _commit(self, seq: int, event: Event, head: Head) -> LogRecord:
        record = self._unproven
        if record is None or (record.seq, record.event, record.head) != (seq, event, head):
            record = LogRecord(
                job=self._job, seq=seq, nonce=self._nonce(), at=self._clock(), event=event, head=head
            )
        data = record.to_json()
        if len(data) > MAX_RECORD_BYTES:
            raise BadSettings(
                f"log record {seq} of job {self._job!r} would have {len(data)} bytes, at most {MAX_RECORD_BYTES} "
                "can be read: too many updates are pending or remembered (aggregation.max_pending, max_staleness)"
            )
        self._unproven = record
        if (
            not self._store.put_if_absent(log_key(self._job, seq), data)
            and self._get(seq).nonce != record.nonce
        ):
            self._unproven = None
            raise Conflict(f"log record {seq} of job {self._job!r} was appended by another writer")
        self._unproven = None
        if self._newest is None or self._newest.seq < seq:
            self._newest = record
        if self._indexed == seq > 0:
            self._add_to_index(record)  # a worker that searches for each update need not read its own records
        return record

    def _add_to_index(self, record: LogRecord) -> None:
        self._index.update((uuid.UUID(known).bytes, record.seq) for known in named(record.event))
        self._indexed = record.seq + 1

    def _sequence(self, after: int) -> Iterator[int]:
        """Sequence numbers above `after` that the store lists, each one more than the last, or CorruptLog."""
        start_after = log_key(self._job, after) if after >= 0 else ""
        expected = after + 1
        for key in self._store.list(log_prefix(self._job), start_after=start_after):
            seq = log_seq(key)
            if key != log_key(self._job, seq):
                raise CorruptLog(f"{key} is not the key of a log record: move it out of the log's prefix")
            for missed in range(expected, seq):
                # a listing that runs while others append may show a record and not the one before it
                try:
                    self._store.size(log_key(self._job, missed))
                except NotFound as exc:
                    raise CorruptLog(
                        f"job {self._job!r}: log record {missed} is missing, {seq} is there: restore it"
                    ) from exc
                yield missed
            yield seq
            expected = seq + 1

    def _get(self, seq: int) -> LogRecord:
        key = log_key(self._job, seq)
        try:
            data = self._store.get(key, max_bytes=MAX_RECORD_BYTES)
            record = LogRecord.from_json(data)
        except NotFound as exc:  # asked for only after a listing or a refused write has shown it
            raise StoreUnavailable(f"{key} is there and is not") from exc
        except BadPayload as exc:
            raise CorruptLog(f"{key}: {exc}") from exc
        except Rejected as exc:
            confirm(self._store, key, data, MAX_RECORD_BYTES)
            raise CorruptLog(f"{key} is no log record: {exc}") from exc
        if (record.job, record.seq) != (self._job, seq):
            raise CorruptLog(f"{key} says that it is record {record.seq} of job {record.job!r}")
        return record


def named(event: Event) -> set[str]:
    """The ids of the updates whose fate `event` tells."""
    match event:
        case Accepted():
            return {event.contribution.update.update_id}
        case Refused():
            return {event.refusal.update.update_id}
        case Published():
            merged = {contribution.update.update_id for contribution in event.merged}
            return merged | {refusal.update.update_id for refusal in event.refused}
        case RolledBack():
            return {refusal.update.update_id for refusal in event.refused}
    return set()


def refusals(event: Event) -> tuple[Refusal, ...]:
    """The refusals that `event` tells."""
    match event:
        case Refused():
            return (event.refusal,)
        case Published() | RolledBack():
            return event.refused
    return ()
