"""The log against the journals, by a reading of its own: nothing lost, nothing counted twice.

This repeats on purpose what `fedqueue audit` checks, in few lines and from outside: the audit knows nothing of
what the sites were promised, and a mistake in it must not hide one in the log.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from federation import keys
from federation.types import Contribution, Head, Published, Refusal, Refused
from storage.blob import BlobStore
from storage.jobs import list_dead_letters
from storage.log import VersionLog

SHOWN = 5
UPDATE_ID = re.compile(rb'update_id\\*":\s*\\*"([0-9a-f-]{36})')
"""In the body of a dead letter: an update's own message, or the task that carries it as JSON within JSON."""


@dataclass(frozen=True)
class DeadLetters:
    """Ids of the updates in them, and how many carry no update."""

    ids: set[str]
    others: int


@dataclass
class Ledger:
    """What the store says at the end."""

    head: Head
    times: list[float] = field(default_factory=list)
    """Unix time of each record of the log."""
    merged: list[Contribution] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    published: int = 0
    """Records that made a new version."""
    dead: DeadLetters = field(default_factory=lambda: DeadLetters(set(), 0))
    uploads: dict[str, str] = field(default_factory=dict)
    """Update id -> key of its payload."""
    models: int = 0
    """Model files that were written."""

    def names(self) -> Counter[str]:
        """How many records give each id its fate."""
        fates = [c.update for c in self.merged] + [r.update for r in self.refused]
        return Counter(update.update_id for update in fates)


def read(store: BlobStore, job: str) -> Ledger:
    """Raises CorruptLog for a gap in the log."""
    log = VersionLog(store, job)
    ledger = Ledger(head=log.head().head)
    for record in log.history():
        ledger.times.append(record.at.timestamp())
        if isinstance(record.event, Published):
            ledger.merged += record.event.merged
            ledger.refused += record.event.refused
            ledger.published += bool(record.event.merged)
        elif isinstance(record.event, Refused):
            ledger.refused.append(record.event.refusal)
    ledger.dead = dead_letters(store)
    for key in store.list(f"{keys.job_prefix(job)}updates/"):
        ledger.uploads[key.rpartition("/")[2].removesuffix(".safetensors")] = key
    ledger.models = sum(1 for _ in store.list(f"{keys.job_prefix(job)}models/"))
    return ledger


def dead_letters(store: BlobStore) -> DeadLetters:
    found = [UPDATE_ID.search(base64.b64decode(letter.body_base64)) for letter in list_dead_letters(store)]
    ids = {match[1].decode() for match in found if match}
    return DeadLetters(ids, others=found.count(None))


def problems(ledger: Ledger, confirmed: Collection[str], kept: Collection[str]) -> Iterator[str]:
    """What contradicts the promise. `confirmed`: ids in the journals; `kept`: ids in the sites' outboxes."""
    names = ledger.names()
    lost = [i for i in confirmed if i not in names and i not in ledger.dead.ids]
    if lost:
        yield f"{len(lost)} confirmed updates are neither in the log nor dead letters: {_some(lost)}"
    twice = [i for i, count in names.items() if count > 1]
    if twice:
        yield f"{len(twice)} updates are named by more than one record: {_some(twice)}"
    orphans = [
        key for i, key in ledger.uploads.items() if not (i in names or i in ledger.dead.ids or i in kept)
    ]
    if orphans:
        yield f"{len(orphans)} uploads belong to no update that anybody knows: {_some(orphans)}"
    missing = [c.update.update_id for c in ledger.merged if c.update.update_id not in ledger.uploads]
    if missing:
        yield f"{len(missing)} merged updates have no payload: {_some(missing)}"
    if [c.version for c in ledger.merged] != list(range(1, ledger.head.version + 1)):
        yield "the merged updates do not count the versions up one by one to the head's"
    if ledger.head.pending:
        yield f"{len(ledger.head.pending)} updates are still pending"
    if ledger.head.closed:
        yield f"the job closed: {ledger.head.closed}"


def _some(items: list[str]) -> str:
    return ", ".join(sorted(items)[:SHOWN]) + (" …" if len(items) > SHOWN else "")
