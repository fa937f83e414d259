"""How a site that starts again learns what became of what it had sent, from a long log and over a bad line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.sqlite import SqliteBroker
from federation.errors import StoreUnavailable
from federation.jobs import AggregationPolicy
from federation.settings import Settings
from producers.follow import Follower
from producers.outbox import Outbox
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tests.factories import client_update, job_spec, payload_of, toy_arrays

VERSIONS = 50


class Line(MemoryStore):
    """Counts readings, and fails every so-many-th."""

    reads = 0
    fail_every = 0

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self.reads += 1
        if self.fail_every and self.reads % self.fail_every == 0:
            raise StoreUnavailable("the line is bad")
        return super().get(key, max_bytes=max_bytes)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Context]:
    broker = SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20)
    broker.declare(("site-a",))
    yield Context(Settings(), Line(), broker, lambda name, arguments: None)
    broker.close()


def merged(worker: Context, outbox: Outbox, site: str = "site-a") -> str:
    """One more version, from an update that the outbox knows to be sent."""
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload, site=site, base_version=worker.log("toy").head().head.version)
    worker.store.put(update.payload_key, payload)
    if site == "site-a":
        outbox.put(update, payload)
        outbox.confirmed(update)
    accept(worker, update)
    publish_pending(worker, worker.job("toy"))
    return update.update_id


def test_a_restarted_site_reads_no_more_of_a_long_log_than_it_must(worker: Context, tmp_path: Path) -> None:
    assert isinstance(worker.store, Line)
    ref = save_model(worker.store, "toy", from_arrays(toy_arrays()))
    create(worker, job_spec(aggregation=AggregationPolicy(max_staleness=1000)), ref, ref)
    outbox = Outbox(tmp_path / "site")
    for _ in range(VERSIONS):
        merged(worker, outbox, "site-b")
    sent = {merged(worker, outbox) for _ in range(2)}
    assert {update.update_id for update in outbox.sent()} == sent
    worker.store.reads = 0
    head = Follower(VersionLog(worker.store, "toy"), outbox).look()
    assert head.version == VERSIONS + 2
    assert outbox.sent() == []
    assert worker.store.reads < 20, "a bisection of a hundred records, and the last few"


def test_a_reading_that_fails_costs_only_itself(worker: Context, tmp_path: Path) -> None:
    assert isinstance(worker.store, Line)
    ref = save_model(worker.store, "toy", from_arrays(toy_arrays()))
    create(worker, job_spec(aggregation=AggregationPolicy(max_staleness=1000)), ref, ref)
    outbox = Outbox(tmp_path / "site")
    merged(worker, outbox)
    for _ in range(VERSIONS):
        merged(worker, outbox, "site-b")
    follower = Follower(VersionLog(worker.store, "toy"), outbox)
    worker.store.reads, worker.store.fail_every = 0, 15
    looks = 0
    while True:
        looks += 1
        try:
            head = follower.look()
            break
        except StoreUnavailable:
            continue
    assert head.version == VERSIONS + 1
    assert outbox.sent() == []
    assert looks < 15, "each look goes on where the one before it was"
