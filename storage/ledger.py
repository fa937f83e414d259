"""What a log says of every update and every object, and what in it contradicts itself. Reads nothing: it is told.

Some 200 bytes are kept per update, however large the records are.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from federation.jobs import JobSpec
from federation.keys import rejected_key
from federation.types import (
    Accepted,
    ClientUpdate,
    Collected,
    LogRecord,
    ModelVersion,
    Promoted,
    Published,
    Quarantined,
    RolledBack,
)
from storage.log import refusals
from storage.succession import begins, breaks


class Ledger:
    """The records of one job, told in order; one that cannot be read is left out."""

    def __init__(self, job_id: str, spec: JobSpec | None) -> None:
        """spec None: job.json cannot be read."""
        self._job_id = job_id
        self._max_staleness = None if spec is None else spec.aggregation.max_staleness
        self._nonces: set[bytes] = set()
        self._accepted: dict[bytes, int] = {}  # update id -> record
        self._ended: dict[bytes, int] = {}
        self._has_gaps = False
        self.newest: LogRecord | None = None
        self.records = self.merged = self.rejected = 0
        self.versions: dict[int, ModelVersion] = {}  # that were ever stored
        self.named: set[str] = set()  # keys of models and uploads
        self.refusals: set[str] = set()  # keys of the objects below rejected/ that belong to this log
        self.collected: dict[
            str, int
        ] = {}  # key -> record that gives it to retention, and none named it since

    def add(self, record: LogRecord) -> Iterator[str]:
        """Yields what is wrong with the next record, in words. To be exhausted."""
        before = self.newest
        if before is not None and before.seq + 1 < record.seq:
            before = None  # the one between cannot be read
            self._has_gaps = True
        self.newest = record
        self.records += 1
        nonce = bytes.fromhex(record.nonce)
        if nonce in self._nonces:
            yield "has the nonce of an earlier record, so it is a copy"
        self._nonces.add(nonce)
        if record.seq == 0:
            yield from begins(record.event, record.head)
        elif before is None:
            self._assume(record)
        else:
            yield from breaks(before.head, record.event, record.head, self._max_staleness)
        yield from self._count(record)
        yield from self._refer(record)
        if before is None or record.head.current != before.head.current:
            current = record.head.current
            self.versions[current.version] = current
            self._name_anew(current.model.key)
            if current.server_state is not None:
                self._name_anew(current.server_state.key)
        if isinstance(record.event, Collected):
            self.collected |= dict.fromkeys(record.event.keys, record.seq)

    def record_of(self, update_id: str) -> int | None:
        """The number of the newest record that tells the fate of this update; None: there is none."""
        known = _id(update_id)
        return self._ended.get(known, self._accepted.get(known))

    def _assume(self, record: LogRecord) -> None:
        """The records before this one cannot be read: take it that they were right, and report nothing twice."""
        merged = record.event.merged if isinstance(record.event, Published) else ()
        accepted = record.event.contribution if isinstance(record.event, Accepted) else None
        for contribution in (*record.head.pending, *merged):
            if contribution != accepted:
                self._accepted.setdefault(_id(contribution.update.update_id), record.seq)
                self.named.add(contribution.update.payload_key)

    def _count(self, record: LogRecord) -> Iterator[str]:
        """Each update is accepted at most once and ends at most once."""
        event, seq = record.event, record.seq
        if isinstance(event, Accepted):
            update = event.contribution.update
            yield from self._name(update)
            self._name_anew(update.payload_key)
            earlier = self.record_of(update.update_id)
            if earlier is not None:
                yield f"accepts {update.update_id}, which record {earlier} has: it counts twice"
            self._accepted[_id(update.update_id)] = seq
        merged = [c.update for c in event.merged] if isinstance(event, Published) else []
        refused = [refusal.update for refusal in refusals(event)]
        self.merged += len(merged)
        self.rejected += len(refused)
        self.refusals |= {rejected_key(u.job, u.site, u.update_id) for u in refused}
        for update in merged:
            if _id(update.update_id) not in self._accepted:
                yield f"merges {update.update_id}, which was never accepted"
        for update in (*merged, *refused):
            yield from self._name(update)
            earlier = self._ended.get(_id(update.update_id))
            if earlier is not None:
                yield f"ends {update.update_id}, which record {earlier} has ended: it counts twice"
            self._ended[_id(update.update_id)] = seq

    def _refer(self, record: LogRecord) -> Iterator[str]:
        """A head names older versions; they have to be what they were when they were made."""
        event, head = record.event, record.head
        meant = [head.stable] if isinstance(event, Promoted) else []
        if isinstance(event, Quarantined) and head.quarantine is not None:
            meant.append(head.quarantine.offered)
        if isinstance(event, RolledBack):
            meant.append(head.current.model_copy(update={"version": event.to}))
        for version in meant:
            if version is not None and self._is_another(version):
                yield f"names a version {version.version} that is not the one that was made"

    def _is_another(self, version: ModelVersion) -> bool:
        known = self.versions.get(version.version)
        return known != version if known is not None else not self._has_gaps

    def _name(self, update: ClientUpdate) -> Iterator[str]:
        if update.job != self._job_id:
            yield f"names {update.update_id}, an update of job {update.job!r}"
        self.named.add(update.payload_key)

    def _name_anew(self, key: str) -> None:
        """The object is there, whatever was given to retention under this key before."""
        self.named.add(key)
        self.collected.pop(key, None)


def _id(update_id: str) -> bytes:
    return uuid.UUID(update_id).bytes
