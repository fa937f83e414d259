"""The site agent where a real server would be too kind: what it does when the store changes under it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.sqlite import SqliteBroker
from broker.topology import UPDATES
from federation.errors import AccessDenied, CorruptLog, NotFound
from federation.jobs import JobSpec, TrainingPlan
from federation.layout import MOMENT_SUFFIXES
from federation.settings import Settings
from federation.wire import decode_update
from producers.agent import SiteAgent
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.toy_site import ToyTrained, ToyTrainer


@dataclass
class OneTraining(ToyTrainer):
    """Ends the agent after its first training."""

    stop: threading.Event = field(default_factory=threading.Event)

    def train(self, spec: JobSpec, weights: Mapping[str, Any], **more: Any) -> ToyTrained:
        trained = super().train(spec, weights, **more)
        self.stop.set()
        return trained


class Deployment:
    """A store with job toy at version 0, a queue, and a site."""

    def __init__(self, store: MemoryStore, folder: Path) -> None:
        self.store = store
        self.queue = folder / "queue.db"
        broker = self.connect()
        broker.declare(("site-a",))
        self.worker = Context(Settings(), store, broker, lambda name, arguments: None)
        ref = save_model(store, "toy", from_arrays(toy_arrays()))
        extra = {"head.weight": toy_arrays()["norm.bias"]}  # so that it is an object of its own, which stays
        initial = save_model(store, "toy", from_arrays(toy_arrays() | extra))
        self.job = create(self.worker, job_spec(), initial, ref)
        self.version_0 = ref
        self.trainer = OneTraining()
        settings = Settings(site="site-a", site_state=folder, backoff_limit_s=0.01)
        self.agent = SiteAgent(
            settings, ["toy"], store, self.connect, lambda spec: self.trainer, self.trainer.stop
        )

    def connect(self) -> SqliteBroker:
        return SqliteBroker(str(self.queue), lease_s=60, delivery_limit=20)

    def publish_version_1(self) -> None:
        payload = payload_of(toy_arrays(1.0))
        update = client_update(payload)
        self.store.put(update.payload_key, payload)
        accept(self.worker, update)
        publish_pending(self.worker, self.job)


class SleepyStore(MemoryStore):
    """`while_asleep` happens between the agent's look at the log and its first download of a version."""

    while_asleep: Callable[[], None] | None = None
    missing: type[Exception] = NotFound

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        hook, self.while_asleep = self.while_asleep, None
        if hook:
            hook()
        try:
            super().get_to_file(key, path, nbytes=nbytes, sha256=sha256)
        except NotFound as exc:
            raise self.missing(*exc.args) from exc


@pytest.mark.parametrize("answer", [NotFound, AccessDenied], ids=["told", "not told"])
def test_a_site_that_overslept_its_version_takes_a_newer_one(tmp_path: Path, answer: type[Exception]) -> None:
    store = SleepyStore()
    store.missing = answer
    deployment = Deployment(store, tmp_path)

    def retire() -> None:
        deployment.publish_version_1()
        store.delete(deployment.version_0.key)

    store.while_asleep = retire
    deployment.agent.run()
    assert deployment.trainer.bases == [1]


@pytest.mark.parametrize(
    ("answer", "error"), [(NotFound, CorruptLog), (AccessDenied, AccessDenied)], ids=["told", "not told"]
)
def test_a_newest_version_that_cannot_be_had_ends_the_agent(
    tmp_path: Path, answer: type[Exception], error: type[Exception]
) -> None:
    store = SleepyStore()
    store.missing = answer
    deployment = Deployment(store, tmp_path)
    store.delete(deployment.version_0.key)
    with pytest.raises(error):
        deployment.agent.run()
    assert deployment.trainer.bases == []
    assert VersionLog(store, "toy").head().head.version == 0


@dataclass
class SharingTrainer(ToyTrainer):
    """One whose optimiser has moments: those that it was given, or zeros, plus one."""

    given: list[set[str]] = field(default_factory=list)

    def train(self, spec: JobSpec, weights: Mapping[str, Any], **more: Any) -> ToyTrained:
        moments = {
            parameter + suffix: np.zeros(toy_arrays()[parameter].shape, np.float32)
            for parameter in ("conv.weight", "norm.bias", "norm.weight")
            for suffix in MOMENT_SUFFIXES
        }
        self.given.append({name for name in weights if name in moments})
        return super().train(spec, moments | dict(weights), **more)


def test_a_site_goes_on_with_the_moments_that_the_sites_made_together(tmp_path: Path) -> None:
    """Two trainings, each merged: the first begins without moments, the second with those of version 1."""
    store = MemoryStore()
    broker = SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20)
    broker.declare(("site-a",))
    worker = Context(Settings(), store, broker, lambda name, arguments: None)
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    spec = job_spec(plan=TrainingPlan(optimizer_state="shared"))
    job = create(worker, spec, ref, ref)
    trainer, stop = SharingTrainer(), threading.Event()
    settings = Settings(site="site-a", site_state=tmp_path, backoff_limit_s=0.01, poll_s=0.05)
    agent = SiteAgent(
        settings,
        ["toy"],
        store,
        lambda: SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20),
        lambda spec: trainer,
        stop,
    )
    thread = threading.Thread(target=agent.run)
    thread.start()
    end = time.monotonic() + 60
    while (versions := VersionLog(store, "toy").head().head.version) < 2 and time.monotonic() < end:
        for delivery in broker.drain(UPDATES):
            if delivery.routing_key == "updates.site-a":
                accept(worker, decode_update(delivery))
        publish_pending(worker, job)
        time.sleep(0.02)
    stop.set()
    thread.join(timeout=30)
    assert versions == 2
    assert [len(names) for names in trainer.given[:2]] == [0, 6]
    state = VersionLog(store, "toy").head().head.current.server_state
    assert state is not None
    stored = load_model(store, state).arrays()
    assert np.allclose(stored["m"], 1.5), "1 in version 1, and half way to 2"
    assert np.allclose(stored["v"], 1.5)
