"""Reading a log that may be broken: as much of it as can be read, and what is wrong with the rest.

`storage.log` stops at the first thing that is wrong, as who writes must. An audit goes on behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from federation.errors import CorruptLog, NotFound, Rejected
from federation.keys import log_key, log_prefix, log_seq
from federation.types import LogRecord
from storage.blob import BlobStore
from storage.log import MAX_RECORD_BYTES


@dataclass(frozen=True)
class Unreadable:
    """In place of a record."""

    key: str
    problem: str


class LogReader:
    """Records of one job in order, each once; `next_seq` is the number after the newest that was listed."""

    def __init__(self, store: BlobStore, job: str) -> None:
        self._store, self._job = store, job
        self.next_seq = 0

    def read(self) -> Iterator[LogRecord | Unreadable]:
        """What was appended since the last reading. Raises StoreUnavailable; what was yielded is then read."""
        start_after = log_key(self._job, self.next_seq - 1) if self.next_seq else ""
        for key in self._store.list(log_prefix(self._job), start_after=start_after):
            seq = self._seq(key)
            if seq is None:
                yield Unreadable(key, "is not the key of a log record: move it out of the log's prefix")
                continue
            # a listing that runs while others append may show a record and not the one before it
            while self.next_seq < seq and (missed := self._get(self.next_seq)) is not None:
                self.next_seq += 1
                yield missed
            if self.next_seq < seq:
                missing = str(self.next_seq) if self.next_seq == seq - 1 else f"{self.next_seq} to {seq - 1}"
                problem = f"log record {missing} missing, though {seq} is there: restore it from a backup"
                yield Unreadable(log_key(self._job, self.next_seq), problem)
            self.next_seq = seq + 1
            yield self._get(seq) or Unreadable(
                key, "was there, and is not any more: restore it from a backup"
            )

    def _seq(self, key: str) -> int | None:
        try:
            seq = log_seq(key)
        except CorruptLog:
            return None
        return seq if key == log_key(self._job, seq) else None

    def _get(self, seq: int) -> LogRecord | Unreadable | None:
        """None: it is not there. What looks wrong is read twice."""
        record = self._get_once(seq)
        return record if isinstance(record, LogRecord) else self._get_once(seq)

    def _get_once(self, seq: int) -> LogRecord | Unreadable | None:
        key = log_key(self._job, seq)
        try:
            record = LogRecord.from_json(self._store.get(key, max_bytes=MAX_RECORD_BYTES))
        except NotFound:
            return None
        except Rejected as exc:
            return Unreadable(key, f"is no log record ({exc}): restore it from a backup")
        if (record.job, record.seq) != (self._job, seq):
            problem = f"says that it is record {record.seq} of job {record.job!r}: restore it from a backup"
            return Unreadable(key, problem)
        return record
