"""Every version again, from job.json, version 0, the log and the stored updates: `fedqueue replay`. Writes nothing.

Each record's head is made anew from the head before it (`aggregator.transitions`), each update's numbers from the
policy (`aggregator.weighting`), each version by folding the payloads that its record names (`Merge.replay`); and all
of it is compared with what the log says, models and optimiser states bit for bit by their digest. So a version
whose file retention has removed is compared too. In memory: the model, one accumulator, one payload; and each version
that was rolled back to, if its file is gone.

    differences = [step for step in replay(store, "street") if not step.equal]     # none, or one: the first
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aggregator import decide, transitions
from aggregator.merge import Merge
from aggregator.server_opt import OptimizerState
from aggregator.stopping import last_version
from aggregator.weighting import assign
from federation.errors import BadPayload, NotFound
from federation.jobs import ModelRef
from federation.types import (
    Accepted,
    Cleared,
    Closed,
    Collected,
    Contribution,
    Created,
    Event,
    Head,
    Held,
    LogRecord,
    ModelVersion,
    Promoted,
    Published,
    Quarantined,
    Refused,
    Resumed,
    RolledBack,
)
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import load_model, load_payload, save_model
from storage.readonly import ReadOnlyStore
from storage.tensors import TensorFile
from tasks.state import load_state, save_state

WEIGHT_TOLERANCE = 1e-12
"""Relative. Another machine's power function may round differently; the fold takes the recorded weight."""


@dataclass(frozen=True)
class Replayed:
    """A version that was made again, or the record at which that failed."""

    seq: int
    version: int
    expected: str  # sha256 of the version's file, as recorded
    recomputed: str  # as made here; the last one before a difference that is not in the model
    updates: int = 0  # folded into it
    difference: str = ""  # what is not as recorded, in words

    @property
    def equal(self) -> bool:
        return not self.difference


def replay(store: BlobStore, job_id: str, to: int | None = None) -> Iterator[Replayed]:
    """Every stored version in order, up to version `to`; at the first difference it ends, with that.

    Raises NotFound if there is no such job, or version `to` was never stored; CorruptLog; StoreUnavailable if the
    store does not answer for some 8 seconds.
    """
    return Replay(store, job_id).steps(to)


Snapshot = tuple[TensorFile, OptimizerState | None]
"""A version's model, and the optimiser's state beside it."""


class _Differs(ValueError):
    """What is not as recorded."""


class Replay:
    """One replay of one job. `steps` may be read once; then `model` is the last version that was made."""

    def __init__(self, store: BlobStore, job_id: str, remade: dict[int, Snapshot] | None = None) -> None:
        """Raises NotFound, CorruptLog, StoreUnavailable."""
        self._store = ReadOnlyStore(store)
        self._job = load_job(self._store, job_id)
        self._log = VersionLog(self._store, job_id)
        self._head: Head | None = None
        self._state: OptimizerState | None = None
        self._model: TensorFile | None = None
        self._digest = ""
        self._versions: dict[int, ModelVersion] = {}  # as they were made here
        self._remade = {} if remade is None else remade
        """Versions that were rolled back to and whose files are gone."""

    @property
    def model(self) -> TensorFile:
        assert self._model is not None, "read a step first"
        return self._model

    def steps(self, to: int | None = None) -> Iterator[Replayed]:
        """See `replay`."""
        if to is not None:
            self._require_stored(to)
        for record in self._log.history():
            try:
                self._repeat(record)
                difference = ""
            except ValueError as exc:  # _Differs, or what aggregator says of an event that cannot be
                difference = str(exc)
            merged = record.event.merged if isinstance(record.event, Published) else ()
            is_made = merged or record.seq == 0 or isinstance(record.event, RolledBack)
            if is_made or difference:
                current = record.head.current
                yield Replayed(
                    record.seq, current.version, current.model.sha256, self._digest, len(merged), difference
                )
                if difference or current.version == to:
                    return

    def _require_stored(self, version: int) -> None:
        def reached(seq: int) -> int:
            return next(self._log.history(seq)).head.version

        newest = self._log.head()
        first = bisect_left(range(newest.seq + 1), version, key=reached)  # versions never fall along the log
        if first > newest.seq:
            raise NotFound(f"version {version} is not made yet: the newest is {newest.head.version}")
        if reached(first) != version:
            raise NotFound(
                f"version {version} was never stored: one publish led from {reached(first - 1)} to {reached(first)}"
            )

    def _repeat(self, record: LogRecord) -> None:
        """Make the head of `record` anew. Raises ValueError if it is another."""
        event = record.event
        if self._head is None:
            expected = self._begin(record)
        elif isinstance(event, Accepted):
            update, waiting = event.contribution.update, len(self._head.pending)
            _compare(assign(self._job.spec, update, self._head.version, waiting), event.contribution)
            expected = transitions.accept(self._head, event.contribution)
        elif isinstance(event, Refused):
            expected = transitions.refuse(self._job.spec, self._head, event.refusal)
        elif isinstance(event, Published):
            expected = self._publish(self._head, event, record)
        elif isinstance(event, Closed):
            expected = transitions.close(self._head, event.reason)
        elif isinstance(event, Collected):
            expected = self._head
        elif isinstance(event, RolledBack):
            expected = self._roll_back(self._head, event, record)
        else:
            expected = self._steer(self._head, event, record)
        if expected != record.head:
            fields = [
                name for name in Head.model_fields if getattr(expected, name) != getattr(record.head, name)
            ]
            raise _Differs(
                f"the head's {' and '.join(fields)} is not what {event.type!r} makes of the head before it"
            )
        self._head = record.head
        self._versions[record.head.version] = record.head.current

    def _steer(self, before: Head, event: Event, record: LogRecord) -> Head:
        match event:
            case Held():
                return transitions.hold(before, event.reason)
            case Resumed():
                return transitions.resume(before)
            case Promoted():
                return transitions.promote(before, self._version(event.version))
            case Quarantined():
                offered = -1 if record.head.quarantine is None else record.head.quarantine.offered.version
                return transitions.quarantine(before, event.version, event.reason, self._version(offered))
            case Cleared():
                if before.quarantine is None or before.quarantine.version != event.version:
                    raise _Differs(f"version {event.version} is cleared, which was not in quarantine")
                return transitions.clear(before)
        raise _Differs(f"a log is not {event.type} twice")

    def _version(self, number: int) -> ModelVersion:
        """One that was made here before."""
        if number not in self._versions:
            raise _Differs(f"version {number}, which is named, was never stored")
        return self._versions[number]

    def _roll_back(self, before: Head, event: RolledBack, record: LogRecord) -> Head:
        stranded = decide.stranded(before, event.to)
        closed = self._closed(before.version + 1, record)
        gone = event.refused if closed is None else event.refused[: len(stranded)]
        if gone != stranded:
            raise _Differs("the refused updates are not those that were trained from what is rolled back")
        to = self._version(event.to)
        model, self._state = self._stored(to) or self._again(event.to)
        self._model = TensorFile(model.layout, np.array(model.flat), np.array(model.ints))  # writable
        self._digest = to.model.sha256
        return transitions.roll_back(self._job.spec, before, to, event.refused, closed)

    def _closed(self, version: int, record: LogRecord) -> str | None:
        """The record that makes the last version closes the job, whatever words an older release had for it."""
        closed = last_version(self._job.spec.stop, version)
        return None if closed is None else record.head.closed or closed

    def _stored(self, version: ModelVersion) -> Snapshot | None:
        """Its files, if they are there: by their digests they are what was made here before."""
        try:
            return load_model(self._store, version.model), load_state(self._store, version.server_state)
        except (NotFound, BadPayload):
            return None

    def _again(self, number: int) -> Snapshot:
        """The same from the beginning. Each is made once, or rollbacks of rollbacks would take for ever."""
        if number not in self._remade:
            replay = Replay(self._store, self._job.id, self._remade)
            for step in replay.steps(number):
                if not step.equal:
                    raise _Differs(f"version {number}, made once more: {step.difference}")
            self._remade[number] = replay.model, replay._state
        return self._remade[number]

    def _begin(self, record: LogRecord) -> Head:
        if not isinstance(record.event, Created) or record.head.version != 0:
            raise _Differs(f"the log begins with {record.event.type!r} and version {record.head.version}")
        ref = record.head.current.model
        try:
            model = load_model(self._store, ref)
        except (NotFound, BadPayload) as exc:
            raise _Differs(
                f"version 0, with which everything begins: {exc}{self._advice(ref.key, 0)}"
            ) from exc
        self._model = TensorFile(model.layout, np.array(model.flat), np.array(model.ints))  # writable
        self._digest = ref.sha256
        return Head(current=ModelVersion(version=0, model=ref), hold=record.head.hold)

    def _publish(self, before: Head, event: Published, record: LogRecord) -> Head:
        spec = self._job.spec
        refused = {refusal.update.update_id for refusal in event.refused}
        queue = [c.update for c in before.pending if c.update.update_id not in refused]
        if queue[: len(event.merged)] != [c.update for c in event.merged]:
            raise _Differs("the merged updates are not the first that were pending, in the order of the log")
        if not event.merged:
            return transitions.publish(spec, before, event, before.current)
        for position, contribution in enumerate(event.merged):
            _compare(assign(spec, contribution.update, before.version, position), contribution)
        current = self._fold(before, event, record)
        return transitions.publish(spec, before, event, current, self._closed(current.version, record))

    def _fold(self, before: Head, event: Published, record: LogRecord) -> ModelVersion:
        """The new version, its model and state as recorded: made here, too, and the same."""
        model, recorded = self.model, record.head.current
        merge = Merge(self._job.spec, model.layout, model.flat, model.ints, self._state, before.version)
        sent = model.layout.with_moments(self._job.spec.plan.shared_moments)
        for contribution in event.merged:
            update = contribution.update
            try:
                payload = load_payload(self._store, update, sent, self._job.max_update_bytes)
            except BadPayload as exc:
                raise _Differs(f"{exc}{self._advice(update.payload_key, record.seq)}") from exc
            merge.replay(contribution, payload.flat, payload.ints)
            del payload
        result = merge.finish()
        if result.merged != event.merged:
            raise _Differs(f"{len(event.merged)} updates do not complete a version, {len(result.merged)} do")
        self._state = result.state
        scratch = MemoryStore()
        made = save_model(scratch, self._job.id, model)
        self._digest = made.sha256
        _same("the model", recorded.model, made)
        _same(
            "the optimiser's state",
            recorded.server_state,
            save_state(scratch, self._job, result.state),
        )
        return recorded.model_copy(update={"version": result.version})

    def _advice(self, key: str, seq: int) -> str:
        """Why an object that record `seq` needs may be missing, and what to do."""
        for record in self._log.history(seq + 1):
            if isinstance(record.event, Collected) and key in record.event.keys:
                return (
                    f": retention removed it with record {record.seq}, so nothing after it can be made again"
                )
        return ": restore it from a backup"


def _compare(computed: Contribution, recorded: Contribution) -> None:
    """Raises _Differs unless the numbers are alike."""
    for name in ("staleness", "version"):
        mine, theirs = getattr(computed, name), getattr(recorded, name)
        if mine != theirs:
            raise _Differs(
                f"update {recorded.update.update_id}: {name} {theirs} is recorded, {mine} is right"
            )
    if not math.isclose(computed.weight, recorded.weight, rel_tol=WEIGHT_TOLERANCE):
        raise _Differs(
            f"update {recorded.update.update_id}: weight {recorded.weight!r} is recorded, {computed.weight!r} is right"
        )


def _same(what: str, recorded: ModelRef | None, made: ModelRef | None) -> None:
    """Raises _Differs unless size and digest are alike; the key may have a copy's name."""
    if _content(recorded) != _content(made):
        raise _Differs(f"{what} is recorded as {_content(recorded)}, and made again it is {_content(made)}")


def _content(ref: ModelRef | None) -> str:
    return "none" if ref is None else f"{ref.nbytes} bytes, sha256 {ref.sha256}"
