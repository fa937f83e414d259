"""The site agent where a real server would be too kind: what it does when the store changes under it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker.sqlite import SqliteBroker
from federation.errors import AccessDenied, CorruptLog, NotFound
from federation.jobs import JobSpec
from federation.settings import Settings
from producers.agent import SiteAgent
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import save_model
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
