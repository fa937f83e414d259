"""The periodic task in real processes, and retention over a real S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from broker.sqlite import SqliteBroker
from federation.jobs import Job
from federation.keys import log_key, models_prefix
from federation.settings import Settings, env_name
from federation.types import ClientUpdate, Collected
from storage.audit import audit
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.log import VersionLog
from storage.models import save_model
from storage.open import create_bucket, open_store
from storage.retention import Policy, Retention, store_time
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import evaluation_due, publish_pending
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import Server, embedded, real, running, until
from tests.servers.rgw import Rgw

OFTEN = {env_name("gc_every_s"): "1", env_name("keep_versions"): "1"}


@pytest.fixture(
    params=["embedded", pytest.param("real", marks=[pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.s3])]
)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """One that looks at its jobs every second."""
    if request.param == "embedded":
        made = embedded(tmp_path)
    else:
        names = ("rabbitmq_server", "redis_server", "s3_server")
        made = real(tmp_path, *map(request.getfixturevalue, names))
    made.environment |= OFTEN
    with running(made) as started:
        yield started


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """A worker whose requests are lost. `store` is to be set."""
    broker = SqliteBroker(str(tmp_path / "lost.db"), lease_s=60, delivery_limit=20)
    broker.declare(("site-a",))
    yield Context(
        Settings(), open_store(Settings(store_url=f"file:{tmp_path}/none")), broker, lambda *task: None
    )
    broker.close()


def uploaded(store: BlobStore, job: str, value: float, base: int) -> ClientUpdate:
    payload = payload_of(toy_arrays(value))
    update = client_update(payload, job=job, base_version=base)
    store.put_if_absent(update.payload_key, payload)
    return update


def test_a_publish_whose_request_a_broker_lost_is_made(server: Server, context: Context) -> None:
    job = f"lost-{os.urandom(4).hex()}"
    server.create_job(job_spec(job))
    context.store = server.store
    accept(context, uploaded(server.store, job, 1.0, 0))  # its request to publish goes nowhere
    until("the version", lambda: (head := server.head(job)) is not None and head.version == 1)
    assert server.alive()


def test_the_worker_removes_what_is_old(tmp_path: Path, context: Context) -> None:
    made = embedded(tmp_path)
    made.environment |= OFTEN
    with running(made) as server:
        server.create_job(job_spec("toy"))
        context.store = server.store
        job = load_job(server.store, "toy")
        for value in range(1, 5):
            accept(context, uploaded(server.store, "toy", value, value - 1))
            publish_pending(context, job)
        head = server.head("toy")
        assert head is not None
        assert head.version == 4
        save_model(server.store, "toy", from_arrays(toy_arrays(0.125)))
        for path in (tmp_path / "store" / "jobs").rglob("*.*"):
            past = path.stat().st_mtime - 8 * 86_400
            os.utime(path, (past, past))
        until("the rest to go", lambda: len(list(server.store.list(models_prefix("toy")))) == 2)
        assert server.alive()
        assert [finding for finding in audit(server.store, "toy") if finding.level == "error"] == []


@pytest.mark.s3
def test_over_a_real_s3_server(s3_server: Rgw, context: Context) -> None:
    settings = Settings(
        store_url=s3_server.url(f"retention-{os.urandom(4).hex()}"),
        store_access_key=s3_server.admin.access_key,
        store_secret_key=s3_server.admin.secret_key,
    )
    create_bucket(settings)
    store = context.store = open_store(settings)
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    job = create(context, job_spec("toy"), ref, ref)
    for value in range(1, 5):
        accept(context, uploaded(store, "toy", value, value - 1))
        publish_pending(context, job)
    save_model(store, "toy", from_arrays(toy_arrays(0.125)))
    accept(context, uploaded(store, "toy", 9.0, 77))  # refused: it comes from the future
    newest = log_key("toy", context.log("toy").head().seq)
    # the server tells times in whole seconds, and nothing of this second is older than no time at all
    until("the next second", lambda: store_time(store) > store.modified(newest))
    retention = Retention(store, VersionLog(store, "toy"), job, no_grace(job))
    planned = retention.plan()
    assert len(planned) == 5
    assert retention.collect() == planned
    assert len(list(store.list(models_prefix("toy")))) == 2
    assert list(store.list("_probe/")) == []
    events = [record.event for record in context.log("toy").history()]
    assert events[-1] == Collected(keys=tuple(item.key for item in planned))
    assert [finding for finding in audit(store, "toy") if finding.level == "error"] == []


def no_grace(job: Job) -> Policy:
    return Policy(
        grace=timedelta(),
        keep_versions=1,
        too_stale=lambda version, base: False,
        due=partial(evaluation_due, job),
    )
