"""Accepting and publishing, one worker after the other. test_interleavings.py has what they do at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from aggregator import transitions
from broker.sqlite import SqliteBroker
from federation.errors import BadJob, CorruptLog, StoreUnavailable
from federation.jobs import AggregationPolicy, EvaluationPolicy, Job, JobSpec, StopRule
from federation.points import Point, watch
from federation.settings import Settings
from federation.types import Accepted, ClientUpdate, Collected, Event, Head, ModelVersion, Published
from storage.audit import audit
from storage.jobs import list_refusals
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.tensors import from_arrays
from tasks import celery
from tasks.accept import ASK_AGAIN_EVERY, accept
from tasks.context import Context
from tasks.evaluate import evaluate
from tasks.jobs import create
from tasks.publish import evaluation_due, publish_pending
from tasks.replay import replay
from tests.factories import client_update, job_spec, payload_of, toy_arrays


class HookedStore(MemoryStore):
    """Another worker's moments: runs `before_log_put` once, just before the next log record is written, and
    `before_model_get` before the next model is read."""

    def __init__(self) -> None:
        super().__init__()
        self.before_log_put: Callable[[], None] | None = None
        self.before_model_get: Callable[[], None] | None = None
        self.models_written = 0

    def get(self, key: str, *, max_bytes: int) -> bytes:
        if self.before_model_get is not None and "/models/" in key:
            hook, self.before_model_get = self.before_model_get, None
            hook()
        return super().get(key, max_bytes=max_bytes)

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        if "/models/" in key:
            self.models_written += 1
        if self.before_log_put is not None and "/log/" in key:
            hook, self.before_log_put = self.before_log_put, None
            hook()
        return super().put_if_absent(key, data)


class Worker(Context):
    """A worker's context whose sent tasks are kept in `sent`."""

    def __init__(self, store: MemoryStore, folder: Path) -> None:
        broker = SqliteBroker(str(folder / "queue.db"), lease_s=60, delivery_limit=20)
        broker.declare(("site-a", "site-b"))
        self.sent: list[tuple[str, Mapping[str, str]]] = []
        super().__init__(
            Settings(), store, broker, lambda name, arguments: self.sent.append((name, arguments))
        )


@pytest.fixture
def store() -> HookedStore:
    return HookedStore()


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    watch(None)


@pytest.fixture
def worker(store: HookedStore, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(store, tmp_path)
    yield made
    made.broker.close()


@pytest.fixture
def other(store: HookedStore, tmp_path: Path) -> Iterator[Worker]:
    """A second worker on the same store, with a view of the log of its own."""
    made = Worker(store, tmp_path)
    yield made
    made.broker.close()


def new_job(worker: Worker, spec: JobSpec | None = None) -> Job:
    spec = spec or job_spec()
    ref = save_model(worker.store, spec.id, from_arrays(toy_arrays()))
    return create(worker, spec, ref, ref)


def uploaded(worker: Worker, value: float = 1.0, **changes: object) -> ClientUpdate:
    payload = payload_of(toy_arrays(value))
    update = client_update(payload, **changes)
    worker.store.put_if_absent(update.payload_key, payload)
    return update


def events(worker: Worker) -> list[Event]:
    return [record.event for record in worker.log("toy").history()]


def head(worker: Worker) -> Head:
    return worker.log("toy").head().head


def merged_ids(worker: Worker) -> list[str]:
    return [c.update.update_id for e in events(worker) if isinstance(e, Published) for c in e.merged]


def weight(worker: Worker) -> float:
    return float(load_model(worker.store, head(worker).current.model).arrays()["conv.weight"].flat[0])


def test_accept_appends_one_record_and_asks_for_a_publish(worker: Worker) -> None:
    new_job(worker)
    update = uploaded(worker)
    accept(worker, update)
    (_, accepted) = events(worker)
    assert isinstance(accepted, Accepted)
    assert (accepted.contribution.update, accepted.contribution.staleness) == (update, 0)
    assert accepted.contribution.weight == 0.5
    assert worker.sent == [(celery.PUBLISH, {"job": "toy"})]


def test_an_update_that_the_head_has_forgotten_counts_once(
    worker: Worker, other: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that has seen the whole log, and by one that has not."""
    monkeypatch.setattr(transitions, "REMEMBERED_LIMIT", 2)
    job = new_job(worker, job_spec(aggregation=AggregationPolicy(max_staleness=1000)))
    updates = [uploaded(worker, base_version=0) for _ in range(6)]
    for update in updates:
        accept(worker, update)
        publish_pending(worker, job)
    before = head(worker)
    assert len(before.remembered) <= 2
    for update in updates:
        accept(worker, update)
        accept(other, update)
    assert head(worker) == before
    assert merged_ids(worker) == [update.update_id for update in updates]
    assert [finding for finding in audit(worker.store, "toy") if finding.level == "error"] == []
    assert all(step.equal for step in replay(worker.store, "toy"))


def test_a_backlog_asks_for_few_publishes(worker: Worker) -> None:
    new_job(worker)
    updates = [uploaded(worker, base_version=0) for _ in range(4)]
    for update in updates[:2]:
        accept(worker, update)
    assert worker.sent == [(celery.PUBLISH, {"job": "toy"})], "the first one's"
    accept(worker, updates[1])
    assert len(worker.sent) == 2, "a redelivered one asks: its first delivery may not have come to it"


def test_a_request_for_a_publish_that_was_lost_is_made_again(worker: Worker) -> None:
    policy = AggregationPolicy(max_staleness=1000)
    new_job(worker, job_spec(aggregation=policy))
    for _ in range(ASK_AGAIN_EVERY - 1):
        accept(worker, uploaded(worker, base_version=0))
    worker.sent.clear()  # the broker lost its disk
    accept(worker, uploaded(worker, base_version=0))
    assert worker.sent == [(celery.PUBLISH, {"job": "toy"})]


def test_an_accept_during_a_publish_costs_no_second_model(
    worker: Worker, other: Worker, store: HookedStore
) -> None:
    job = new_job(worker)
    first, late = uploaded(worker), uploaded(worker, site="site-b")
    accept(worker, first)
    before = store.models_written
    store.before_log_put = lambda: accept(other, late)
    record = publish_pending(worker, job)
    assert record is not None
    assert merged_ids(worker) == [first.update_id]
    assert [c.update for c in record.head.pending] == [late]
    assert store.models_written == before + 1
    assert (celery.PUBLISH, {"job": "toy"}) in worker.sent  # for the late one


def collect(worker: Worker, *keys: str) -> None:
    """As retention does: the record first, then the deletion."""
    versions = worker.log("toy")
    record = versions.head()
    versions.append(record, Collected(keys=keys), record.head)
    for key in keys:
        worker.store.delete(key)


def test_a_publish_does_not_care_for_other_collected_objects(
    worker: Worker, other: Worker, store: HookedStore
) -> None:
    job = new_job(worker)
    accept(worker, uploaded(worker))
    before = store.models_written
    store.before_log_put = lambda: collect(other, "jobs/toy/models/other.safetensors")
    assert publish_pending(worker, job) is not None
    assert store.models_written == before + 1


def test_a_publish_whose_base_is_superseded_and_collected_meanwhile_looks_again(
    worker: Worker, other: Worker, store: HookedStore
) -> None:
    job = new_job(worker)
    accept(worker, first := uploaded(worker, 1.0))
    publish_pending(worker, job)
    version_1 = head(worker).current.model.key
    accept(worker, second := uploaded(worker, 1.0))
    late = uploaded(worker, 1.0)

    def supersede_and_collect() -> None:
        publish_pending(other, job)
        accept(other, late)
        collect(other, version_1)

    store.before_model_get = supersede_and_collect
    assert publish_pending(worker, job) is not None
    assert merged_ids(worker) == [update.update_id for update in (first, second, late)]
    assert weight(worker) == 0.875


def test_a_newest_version_that_is_missing_stops_the_publish_and_says_what_to_do(worker: Worker) -> None:
    job = new_job(worker)
    accept(worker, update := uploaded(worker))
    key = head(worker).current.model.key
    model = worker.store.get(key, max_bytes=1 << 20)
    worker.store.delete(key)
    with pytest.raises(CorruptLog, match=f"{key}.* restore it"):
        publish_pending(worker, job)
    worker.store.put(key, model)
    assert publish_pending(worker, job) is not None
    assert merged_ids(worker) == [update.update_id]


def test_a_refusal_that_was_recorded_but_not_told_is_told_at_the_redelivery(worker: Worker) -> None:
    new_job(worker)
    update = uploaded(worker, base_version=7)

    def die(point: Point) -> None:
        if point is Point.REFUSED:
            raise KeyboardInterrupt

    watch(die)
    with pytest.raises(KeyboardInterrupt):
        accept(worker, update)
    watch(None)
    assert list(list_refusals(worker.store, "toy")) == []
    accept(worker, update)
    assert [(r.update, r.reason) for r in list_refusals(worker.store, "toy")] == [(update, "future-base")]
    assert len(events(worker)) == 2


def test_group_commit_gives_the_same_model_as_one_by_one(tmp_path: Path) -> None:
    models = []
    for name, at_once in (("one", False), ("all", True)):
        (tmp_path / name).mkdir()
        store = HookedStore()
        worker = Worker(store, tmp_path / name)
        job = new_job(worker)
        for value in (1.0, 3.0, -2.0, 0.1):
            accept(worker, uploaded(worker, value, base_version=0))
            if not at_once:
                publish_pending(worker, job)
        publish_pending(worker, job)
        models.append((head(worker).current, store.models_written))
        worker.broker.close()
    (one, one_writes), (all_, all_writes) = models
    assert (one.version, one.model.sha256) == (all_.version, all_.model.sha256)  # the digest of every byte
    assert all_writes < one_writes


def test_a_bad_payload_is_refused_and_the_others_are_numbered_without_it(worker: Worker) -> None:
    job = new_job(worker)
    good, bad, last = uploaded(worker, 1.0), uploaded(worker, float("nan")), uploaded(worker, 3.0)
    for update in (good, bad, last):
        accept(worker, update)
    assert [c.staleness for c in head(worker).pending] == [0, 1, 2]
    record = publish_pending(worker, job)
    assert record is not None
    assert isinstance(record.event, Published)
    assert [(c.update, c.staleness, c.version) for c in record.event.merged] == [(good, 0, 1), (last, 1, 2)]
    assert [r.update for r in record.event.refused] == [bad]
    assert record.head.version == 2
    assert weight(worker) == pytest.approx(0.5 + 0.5 * 2.5)
    assert [r.reason for r in list_refusals(worker.store, "toy")] == ["not-finite"]


def test_only_bad_payloads_make_no_version(worker: Worker) -> None:
    job = new_job(worker)
    accept(worker, uploaded(worker, float("inf")))
    publish_pending(worker, job)
    assert head(worker).version == 0
    assert head(worker).pending == ()
    assert publish_pending(worker, job) is None


def test_a_full_head_is_published_before_another_update_is_accepted(worker: Worker) -> None:
    policy = job_spec().aggregation.model_copy(update={"max_pending": 3})
    new_job(worker, job_spec(aggregation=policy))
    for _ in range(10):
        accept(worker, uploaded(worker, base_version=head(worker).version))
        assert len(head(worker).pending) <= 3
    assert head(worker).version == 9


def test_the_last_version_closes_the_job_and_every_update_has_one_end(worker: Worker) -> None:
    job = new_job(worker, job_spec(stop=StopRule(max_versions=2)))
    updates = [uploaded(worker) for _ in range(4)]
    for update in updates:
        accept(worker, update)
    record = publish_pending(worker, job)
    assert record is not None
    assert record.head.closed is not None
    assert record.head.pending == ()
    accept(worker, late := uploaded(worker, base_version=2))
    ends = {r.update.update_id: r.reason for r in list_refusals(worker.store, "toy")}
    assert merged_ids(worker) == [u.update_id for u in updates[:2]]
    assert ends == dict.fromkeys([u.update_id for u in (*updates[2:], late)], "job-closed")


def test_fedbuff_waits_for_k_and_keeps_the_rest(worker: Worker) -> None:
    policy = AggregationPolicy(strategy="fedbuff", buffer_size=2)
    job = new_job(worker, job_spec(aggregation=policy))
    for number in range(3):
        accept(worker, uploaded(worker, 1.0, payload_kind="difference"))
        assert bool(worker.sent) == (number >= 1)
    record = publish_pending(worker, job)
    assert record is not None
    assert record.head.version == 1
    assert len(record.head.pending) == 1
    assert weight(worker) == 1.0


def test_the_optimisers_state_is_stored_with_the_version_and_used_by_the_next(worker: Worker) -> None:
    policy = AggregationPolicy.from_json(
        '{"strategy": "fedbuff", "buffer_size": 1, "server_optimizer": {"kind": "fedavgm", "beta1": 0.5}}'
    )
    job = new_job(worker, job_spec(aggregation=policy))
    for version in range(2):
        accept(worker, uploaded(worker, 1.0, payload_kind="difference", base_version=version))
        publish_pending(worker, job)
    state = head(worker).current.server_state
    assert state is not None
    assert np.allclose(load_model(worker.store, state).arrays()["m"], 1.5)
    assert weight(worker) == pytest.approx(1.0 + 1.5)


def test_a_store_that_fails_leaves_everything_as_it_was(worker: Worker, store: HookedStore) -> None:
    job = new_job(worker)
    update = uploaded(worker)

    def fail() -> None:
        raise StoreUnavailable("gone")

    store.before_log_put = fail
    with pytest.raises(StoreUnavailable):
        accept(worker, update)
    accept(worker, update)
    store.before_log_put = fail
    with pytest.raises(StoreUnavailable):
        publish_pending(worker, job)
    assert publish_pending(worker, job) is not None
    assert merged_ids(worker) == [update.update_id]


# --- jobs ----------------------------------------------------------------------------------------------------


def test_creating_the_same_job_again_changes_nothing_and_another_is_refused(worker: Worker) -> None:
    job = new_job(worker)
    accept(worker, uploaded(worker))
    assert new_job(worker) == job
    assert len(head(worker).pending) == 1
    with pytest.raises(BadJob, match="there is a job"):
        new_job(worker, job_spec(stop=StopRule(max_versions=7)))


# --- evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "previous", "version", "closed", "due"),
    [
        (0, 0, 5, None, False),
        (1, 0, 1, None, True),
        (4, 3, 4, None, True),
        (4, 4, 7, None, False),
        (4, 2, 9, None, True),
        (4, 4, 6, "done", True),
    ],
)
def test_when_a_version_is_evaluated(
    worker: Worker, every: int, previous: int, version: int, closed: str | None, due: bool
) -> None:
    job = new_job(worker, job_spec(evaluation=EvaluationPolicy(every=every)))
    current = ModelVersion(version=version, model=head(worker).current.model)
    assert evaluation_due(job, previous, Head(current=current, closed=closed)) is due


def test_an_overtaken_evaluation_is_skipped_without_work(worker: Worker) -> None:
    job = new_job(worker, job_spec(evaluation=EvaluationPolicy(every=1)))
    accept(worker, uploaded(worker))
    publish_pending(worker, job)
    assert evaluate(worker, "toy", 0) is None  # "toy" is no architecture: work would have failed


def test_a_task_that_runs_every_few_seconds_is_not_logged_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for name in ("celery.app.trace", "celery.worker.strategy"):
            for task in (celery.OVERSEE_JOBS, celery.PUBLISH):
                told = {"id": "1", "name": task}
                logging.getLogger(name).info("%(name)s[%(id)s] was done", told)
                logging.getLogger(name).error("%(name)s[%(id)s] was not done", told)
    done = [
        record.getMessage().partition("[")[0] for record in caplog.records if record.levelno == logging.INFO
    ]
    assert done == [celery.PUBLISH, celery.PUBLISH]
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 4
