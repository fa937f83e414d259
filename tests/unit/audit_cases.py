"""Real jobs, made by the tasks themselves, and ways to break what they leave behind."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from aggregator import transitions
from broker.port import Handler
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, Job, JobSpec, StopRule, TrainingPlan
from federation.keys import log_key
from federation.layout import is_moment
from federation.requests import Answer, Request, SteerJob, SteerModel, What
from federation.settings import Settings
from federation.types import (
    SERVER,
    Accepted,
    Cleared,
    ClientUpdate,
    Collected,
    Held,
    LogRecord,
    Promoted,
    Published,
    Quarantined,
    Resumed,
    RolledBack,
)
from federation.wire import Delivery, Message
from storage.audit import Finding, audit
from storage.blob import BlobStore
from storage.folder import FolderStore
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.requests import handle
from tests.factories import client_update, job_spec, payload_of, toy_arrays

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SITES = ("site-a", "site-b")

POLICIES = {
    "fedasync": {"strategy": "fedasync", "max_staleness": 6},
    "fedasync-hinge": {"strategy": "fedasync", "staleness": {"kind": "hinge", "b": 1.0}, "max_staleness": 6},
    "fedbuff": {"strategy": "fedbuff", "buffer_size": 2, "max_staleness": 4},
    "fedbuff-examples": {"strategy": "fedbuff", "buffer_size": 3, "weight_by_examples": True},
    "fedbuff-objects": {"strategy": "fedbuff", "buffer_size": 3, "weight_by_objects": True},
    "fedbuff-participation": {
        "strategy": "fedbuff",
        "buffer_size": 2,
        "staleness": {"kind": "participation"},
    },
    "fedbuff-fedavgm": {"strategy": "fedbuff", "buffer_size": 2, "server_optimizer": {"kind": "fedavgm"}},
    "fedbuff-fedadam": {"strategy": "fedbuff", "buffer_size": 2, "server_optimizer": {"kind": "fedadam"}},
    "fedbuff-fedyogi": {"strategy": "fedbuff", "buffer_size": 2, "server_optimizer": {"kind": "fedyogi"}},
    "fedbuff-shared": {"strategy": "fedbuff", "buffer_size": 2},
    "fedavg": {"strategy": "fedavg", "server_learning_rate": 0.7},
    "fedavg-fedadam": {"strategy": "fedavg", "server_optimizer": {"kind": "fedadam"}},
}


class NoBroker:
    """Broker without queues: hints go nowhere, as they may."""

    def publish(self, exchange: str, message: Message) -> None:
        pass

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        raise NotImplementedError

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        return []

    def close(self) -> None:
        pass


def worker(store: BlobStore) -> Context:
    return Context(Settings(), store, NoBroker(), lambda name, arguments: None)


def spec_of(policy: str, max_versions: int = 1000) -> JobSpec:
    return job_spec(
        plan=TrainingPlan(optimizer_state="shared" if policy.endswith("-shared") else "fresh"),
        aggregation=AggregationPolicy.from_json(json.dumps(POLICIES[policy])),
        participants=SITES,
        stop=StopRule(max_versions=max_versions),
        max_inflight=1 if policy.endswith("-participation") else None,
    )


def noisy_arrays(rng: np.random.Generator) -> dict[str, Any]:
    """A toy model of numbers that no rounding leaves as they are."""
    drawn = {name: rng.normal(size=a.shape).astype(np.float32) for name, a in toy_arrays().items()}
    drawn["norm.running_var"] = np.abs(drawn["norm.running_var"])
    drawn["norm.num_batches_tracked"] = np.array(rng.integers(0, 100), np.int64)
    return drawn


Change = Callable[[dict[str, Any]], None]


@dataclass
class ToyJob:
    """A job in memory, and one worker on it."""

    store: MemoryStore
    context: Context
    job: Job
    rng: np.random.Generator

    def copy(self) -> ToyJob:
        store = MemoryStore()
        for key in self.store.list(""):
            store.put(key, self.store.get(key, max_bytes=1 << 20))
        return ToyJob(store, worker(store), self.job, copy.deepcopy(self.rng))

    @property
    def log(self) -> VersionLog:
        return self.context.log("toy")

    def records(self) -> list[LogRecord]:
        return list(VersionLog(self.store, "toy").history())

    def upload(self, **changes: Any) -> ClientUpdate:
        head = self.log.head().head
        arrays = noisy_arrays(self.rng)
        layout = from_arrays(arrays).layout.with_moments(self.job.spec.plan.shared_moments)
        for tensor in layout.tensors:
            if is_moment(tensor.name):  # of any size ≥ 0, which a second moment has to have
                arrays[tensor.name] = np.abs(self.rng.normal(size=tensor.shape)).astype(np.float32)
        payload = payload_of(arrays)
        values = {
            "base_version": head.version,
            "payload_kind": self.job.spec.aggregation.payload_kind,
            "num_examples": int(self.rng.integers(1, 100)),
            "metrics": {"objects": float(self.rng.integers(0, 100))},
        }
        update = client_update(payload, **values | changes)
        self.store.put_if_absent(update.payload_key, payload)
        return update

    def accept(self, **changes: Any) -> ClientUpdate:
        update = self.upload(**changes)
        accept(self.context, update)
        return update

    def publish(self) -> None:
        publish_pending(self.context, self.job)

    def round(self) -> None:
        """What makes at least one version, under each policy: up to three updates of each site."""
        for _ in range(3):
            for site in SITES:
                self.accept(site=site)
        self.publish()

    def ask(self, what: What) -> Answer:
        """What an operator asks for."""
        request = Request(request_id=new_update_id(), who=SERVER, what=what, at=datetime.now(UTC))
        return handle(self.context, request)

    def versions(self) -> list[int]:
        return sorted({record.head.version for record in self.records()})

    def quarantine(self, version: int, offered: int) -> None:
        """As the gate does."""
        record, old = self.log.head(), self.log.version(offered)
        event = Quarantined(version=version, reason="it is worse")
        self.log.append(record, event, transitions.quarantine(record.head, version, "it is worse", old))

    def steer(self, move: str, draw: random.Random) -> None:
        """One thing that may be done or is refused, as the job stands."""
        head, made = self.log.head().head, self.versions()
        if move in ("pause", "resume"):
            self.ask(SteerJob(job="toy", action="pause" if move == "pause" else "resume"))
        elif move in ("promote", "rollback"):
            chosen = draw.choice(made[-4:])
            self.ask(
                SteerModel(job="toy", action="promote" if move == "promote" else "rollback", version=chosen)
            )
        elif move == "clear" and head.quarantine is not None:
            self.ask(SteerModel(job="toy", action="clear", version=head.quarantine.version))
        elif move == "quarantine":
            since = max(head.cleared, default=0)
            good = [version for version in made if not head.withdrawn(version) and version >= since]
            if len(good) > 1:
                self.quarantine(good[-1], good[-2])

    def collect(self, *keys: str, delete: bool = True) -> None:
        """As retention does."""
        record = self.log.head()
        self.log.append(record, Collected(keys=keys), record.head)
        for key in keys if delete else ():
            self.store.delete(key)

    def edit(self, seq: int, change: Change) -> str:
        """Rewrite a log record. Returns its key."""
        key = log_key("toy", seq)
        content = json.loads(self.store.get(key, max_bytes=1 << 20))
        change(content)
        self.store.put(key, json.dumps(content).encode())
        return key

    def flip(self, key: str) -> str:
        """Change one bit of an object, in its last byte. Returns the key."""
        data = bytearray(self.store.get(key, max_bytes=1 << 20))
        data[-1] ^= 1
        self.store.put(key, data)
        return key


def new_job(policy: str = "fedasync", max_versions: int = 1000, seed: int = 1) -> ToyJob:
    store, rng = MemoryStore(), np.random.default_rng(seed)
    context = worker(store)
    spec = spec_of(policy, max_versions)
    ref = save_model(store, spec.id, from_arrays(noisy_arrays(rng)))
    return ToyJob(store, context, create(context, spec, ref, ref), rng)


def seasoned_job(policy: str = "fedasync") -> ToyJob:
    """Two publishes at least, a refused update, a bad payload, and one update pending."""
    return _seasoned_job(policy).copy()


@functools.cache
def _seasoned_job(policy: str) -> ToyJob:
    toy = new_job(policy)
    toy.round()
    toy.accept(base_version=toy.log.head().head.version + 5)  # of the future: refused at once
    bad = toy.upload(site="site-b")
    toy.flip(bad.payload_key)  # accepted by its size, refused when it is read
    accept(toy.context, bad)
    toy.publish()
    toy.round()
    toy.round()
    toy.accept()
    return toy


MOVES = ("accept", "accept", "accept", "again", "bad", "orphan", "publish")
STEERING = ("pause", "resume", "promote", "rollback", "quarantine", "clear")


def play(toy: ToyJob, seed: int, moves: int) -> None:
    """A random history: updates of any age, some twice, some bad, some lost before their message; publishes; and
    whatever an operator and the gate may do to a job and its versions."""
    draw = random.Random(seed)
    known: list[ClientUpdate] = []
    for _ in range(moves):
        move = draw.choice((*MOVES, *MOVES, *STEERING))
        newest = toy.log.head().head.version
        base = max(0, newest - draw.choice((0, 0, 0, 1, 2, 5)))
        site = draw.choice(SITES)
        if move == "publish":
            toy.publish()
        elif move in STEERING:
            toy.steer(move, draw)
        elif move == "again" and known:
            accept(toy.context, draw.choice(known))
        else:
            update = toy.upload(site=site, base_version=base)
            if move == "bad":
                toy.flip(update.payload_key)
            if move != "orphan":
                accept(toy.context, update)
                known.append(update)


def findings(store: BlobStore, **options: Any) -> list[Finding]:
    return list(audit(store, "toy", **options))


def errors(store: BlobStore, **options: Any) -> list[Finding]:
    return [finding for finding in findings(store, **options) if finding.level == "error"]


def seq_of(toy: ToyJob, kind: type, which: int = -1) -> int:
    """The number of the newest record with such an event, or of another one of them."""
    return [record.seq for record in toy.records() if isinstance(record.event, kind)][which]


def at(path: str, change: Callable[[Any], Any]) -> Change:
    """Replace what lies at `path` (a.b.0) by what `change` makes of it."""

    def edit(record: dict[str, Any]) -> None:
        *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = record
        for part in folders:
            place = place[part]
        place[last] = change(place[last])

    return edit


def on_disk(toy: ToyJob, folder: Path) -> str:
    """Copy the job to a folder store. Returns its URL."""
    store = FolderStore(folder)
    for key in toy.store.list(""):
        store.put(key, toy.store.get(key, max_bytes=1 << 20))
    return f"file:{folder}"


def steered_job() -> ToyJob:
    """Held and resumed, promoted, a version in quarantine and cleared, rolled back, in quarantine again."""
    toy = new_job("fedbuff-fedadam")
    toy.round()
    toy.round()
    toy.ask(SteerJob(job="toy", action="pause"))
    toy.ask(SteerJob(job="toy", action="resume"))
    toy.ask(SteerModel(job="toy", action="promote", version=3))
    toy.quarantine(6, 3)
    toy.ask(SteerModel(job="toy", action="clear", version=6))
    toy.ask(SteerModel(job="toy", action="rollback", version=3))
    toy.round()
    toy.accept()
    toy.quarantine(toy.log.head().head.version, 7)
    return toy


def other_model(ref: dict[str, Any]) -> dict[str, Any]:
    return ref | {"nbytes": ref["nbytes"] + 1}


BROKEN_DECISIONS: dict[str, tuple[type, Change, str]] = {
    "a hold of another reason": (Held, at("head.hold", lambda _: "other"), "'hold'"),
    "resumed and still held": (Resumed, at("head.hold", lambda _: "still"), "'hold'"),
    "held by no event": (Promoted, at("head.hold", lambda _: "why"), "'hold'"),
    "another version is stable": (Promoted, at("event.version", lambda _: 0), "another one is stable"),
    "stable is a version that never was": (
        Promoted,
        at("head.stable.model", other_model),
        "not the one that was made",
    ),
    "stable by no event": (Cleared, at("head.stable", lambda _: None), "'stable'"),
    "a quarantine of another version": (
        Quarantined,
        at("event.version", lambda v: v - 1),
        "the head says otherwise",
    ),
    "a quarantine that offers what never was": (
        Quarantined,
        at("head.quarantine.offered.model", other_model),
        "not the one that was made",
    ),
    "a quarantine that offers itself": (
        Quarantined,
        at("head.quarantine.offered.version", lambda _: 1000),
        "is offered instead",
    ),
    "out of quarantine by no event": (
        Accepted,
        at(
            "head.quarantine",
            lambda _: {
                "version": 1,
                "reason": "",
                "offered": {
                    "version": 0,
                    "server_state": None,
                    "model": {"key": "k", "sha256": "0" * 64, "nbytes": 1},
                },
            },
        ),
        "'quarantine'",
    ),
    "cleared what was not in quarantine": (Cleared, at("event.version", lambda v: v - 1), "was not what was"),
    "cleared and not remembered": (Cleared, at("head.cleared", lambda _: []), "'cleared'"),
    "cleared and still in quarantine": (
        Quarantined,
        at("head.cleared", lambda _: [10**6]),
        "'cleared'",
    ),
    "rolled back to another model": (
        RolledBack,
        at("head.current.model", other_model),
        "not the one that was made",
    ),
    "rolled back without the optimiser's state": (
        RolledBack,
        at("head.current.server_state", lambda _: None),
        "not the one that was made",
    ),
    "rolled back to the same number": (RolledBack, at("head.current.version", lambda v: v - 1), "a rollback"),
    "rolled back to a newer one": (RolledBack, at("event.to", lambda _: 100), "a rollback to version 100"),
    "the abandoned line is too short": (
        RolledBack,
        at("head.abandoned.0.first", lambda v: v + 1),
        "rolled back, against",
    ),
    "the abandoned line is too long": (
        RolledBack,
        at("head.abandoned.0.last", lambda v: v + 1),
        "rolled back, against",
    ),
    "nothing is abandoned": (RolledBack, at("head.abandoned", lambda _: []), "rolled back, against"),
    "abandoned by no event": (
        Published,
        at("head.abandoned", lambda _: []),
        "'abandoned'",
    ),
}
