"""Retention: what goes and what never does, in every order with publishes, interrupted anywhere, by any clock.

The store's clock is the test's: it stands still until `pass_time` moves it. Workers go on having the real one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from aggregator import transitions
from broker.sqlite import SqliteBroker
from cli.main import app
from federation import keys
from federation.errors import BadSettings, NotFound, StoreUnavailable
from federation.faults import Fault, Rule, Scripted
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, EvaluationPolicy, Job, JobSpec, ModelRef, StopRule
from federation.points import Point, watch
from federation.settings import Settings, env_name
from federation.types import (
    SERVER,
    Cleared,
    ClientUpdate,
    Closed,
    Collected,
    Evaluation,
    Event,
    Head,
    ModelVersion,
    Promoted,
    Published,
    Quarantined,
    RolledBack,
)
from storage.audit import audit
from storage.blob import BlobStore
from storage.channels import best_version
from storage.faulty import FaultyStore
from storage.folder import FolderStore
from storage.jobs import job_ids, list_evaluations, list_refusals, save_evaluation, save_report
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.retention import BATCH, MODEL_GONE, Garbage, Retention, store_time
from storage.tensors import from_arrays
from tasks import celery
from tasks.accept import accept
from tasks.context import Context
from tasks.ingress import FIRST_TICK_S, ticking
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.replay import replay
from tasks.retention import policy, tend
from tests.factories import client_update, job_spec, payload_of, toy_arrays

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
GRACE = 7 * DAY
START = datetime(2040, 1, 1, tzinfo=UTC)  # far from every worker's clock
KEEP = 2
SETTINGS = Settings(gc_grace_s=GRACE.total_seconds(), keep_versions=KEEP)


class Store(MemoryStore):
    """Its clock is `time`. Runs `before_log_put` once, just before the next log record is written."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: self.time)
        self.time = START
        self.before_log_put: Callable[[], object] | None = None

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        if self.before_log_put is not None and "/log/" in key:
            hook, self.before_log_put = self.before_log_put, None
            hook()
        return super().put_if_absent(key, data)

    def everything(self) -> dict[str, tuple[bytes, datetime]]:
        return {key: (self.get(key, max_bytes=1 << 30), self.modified(key)) for key in self.list("")}


class World:
    """A job `toy`, a worker and what it sends, and a clock."""

    def __init__(
        self, broker: SqliteBroker, spec: JobSpec | None = None, settings: Settings = SETTINGS
    ) -> None:
        self.store = Store()
        self.sent: list[tuple[str, Mapping[str, str]]] = []
        self.worker = Context(
            settings, self.store, broker, lambda name, arguments: self.sent.append((name, arguments))
        )
        self.values = iter(range(1, 10_000))
        self.job = self.new_job(spec or job_spec())

    def new_job(self, spec: JobSpec) -> Job:
        whole = {**toy_arrays(), "norm.count": toy_arrays()["norm.bias"]}
        initial = save_model(self.store, spec.id, from_arrays(whole))
        return create(self.worker, spec, initial, save_model(self.store, spec.id, from_arrays(toy_arrays())))

    def pass_time(self, time: timedelta) -> None:
        self.store.time += time

    @property
    def log(self) -> VersionLog:
        return self.worker.log("toy")

    @property
    def head(self) -> Head:
        return self.log.head().head

    @property
    def events(self) -> list[Event]:
        return [record.event for record in self.log.history()]

    def collected(self) -> list[str]:
        """Every key that the log gives to retention, in order."""
        return [key for event in self.events if isinstance(event, Collected) for key in event.keys]

    def upload(self, value: float | None = None, **changes: object) -> ClientUpdate:
        payload = payload_of(toy_arrays(next(self.values) if value is None else value))
        kind = self.job.spec.aggregation.payload_kind
        update = client_update(
            payload, **{"base_version": self.head.version, "payload_kind": kind, **changes}
        )
        self.store.put_if_absent(update.payload_key, payload)
        return update

    def publish(self, value: float | None = None) -> ModelVersion:
        """One update becomes a version, which is returned."""
        accept(self.worker, self.upload(value))
        publish_pending(self.worker, self.job)
        return self.head.current

    def versions(self, count: int, every: timedelta = timedelta()) -> list[ModelVersion]:
        """Version 0 and `count` more, with time before each."""
        made = [self.head.current]
        for _ in range(count):
            self.pass_time(every)
            made.append(self.publish())
        return made

    def retention(self, settings: Settings = SETTINGS, store: BlobStore | None = None) -> Retention:
        """As a process that has just started."""
        store = store or self.store
        return Retention(store, VersionLog(store, "toy"), self.job, policy(settings, self.job))

    def collect(self, settings: Settings = SETTINGS) -> set[str]:
        return {item.key for item in self.retention(settings).collect()}

    def exists(self, key: str) -> bool:
        return key in set(self.store.list(key))

    def sound(self) -> bool:
        """Nothing is missing that the log needs, and every version can be made again."""
        errors = [finding for finding in audit(self.store, "toy") if finding.level == "error"]
        assert errors == []
        assert [step for step in replay(self.store, "toy") if not step.equal] == []
        return True

    def close(self) -> None:
        record = self.log.head()
        self.log.append(record, Closed(reason="enough"), transitions.close(record.head, "enough"))


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteBroker]:
    made = SqliteBroker(str(tmp_path_factory.mktemp("queue") / "queue.db"), lease_s=60, delivery_limit=20)
    made.declare(("site-a", "site-b"))
    yield made
    made.close()


@pytest.fixture
def world(broker: SqliteBroker) -> World:
    return World(broker)


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    watch(None)


class Killed(BaseException):
    """What a crash point raises here: nothing catches it."""


def kill_at(wanted: Point) -> None:
    def die(point: Point) -> None:
        if point is wanted:
            raise Killed

    watch(die)


def killed(wanted: Point, action: Callable[[], object]) -> None:
    kill_at(wanted)
    with pytest.raises(Killed):
        action()
    watch(None)


# --- models ---------------------------------------------------------------------------------------


def test_a_model_that_no_record_names_goes_when_it_is_old(world: World) -> None:
    accept(world.worker, world.upload())
    before = set(world.store.list(keys.models_prefix("toy")))
    killed(Point.MODEL_STORED, lambda: publish_pending(world.worker, world.job))
    (left_behind,) = set(world.store.list(keys.models_prefix("toy"))) - before
    world.pass_time(GRACE)
    assert world.collect() == set()
    world.pass_time(HOUR)
    assert world.collect() == {left_behind}
    publish_pending(world.worker, world.job)
    assert world.head.version == 1
    assert world.sound()


def measured(world: World, version: int, who: str = "site-a") -> None:
    save_evaluation(
        world.store,
        Evaluation(job="toy", version=version, who=who, num_images=1, metrics={"mAP@0.5": 0.5}, at=START),
    )


def stored_versions(world: World, made: list[ModelVersion]) -> set[int]:
    return {version.version for version in made if world.exists(version.model.key)}


@pytest.mark.parametrize(
    ("keep", "every", "metrics", "stay"),
    [
        (1, 0, (), {0, 6}),
        (2, 0, (), {0, 5, 6}),
        (4, 0, (), {0, 3, 4, 5, 6}),
        (7, 0, (), {0, 1, 2, 3, 4, 5, 6}),
        (2, 0, (2,), {0, 2, 5, 6}),
        (2, 3, (), {0, 3, 5, 6}),
        (2, 4, (1,), {0, 1, 4, 5, 6}),
    ],
)
def test_of_superseded_versions_those_stay_that_the_policy_keeps(
    broker: SqliteBroker, keep: int, every: int, metrics: tuple[int, ...], stay: set[int]
) -> None:
    world = World(broker, job_spec(evaluation=EvaluationPolicy(every=every)))
    made = world.versions(6, every=DAY)
    for version in metrics:
        measured(world, version)
    world.pass_time(30 * DAY)
    world.collect(SETTINGS.model_copy(update={"keep_versions": keep}))
    assert stored_versions(world, made) == stay
    assert world.exists(world.job.initial.key)
    assert world.sound()


@pytest.mark.parametrize("who", [SERVER, "site-a"])
def test_the_best_version_stays_however_old_it_is(broker: SqliteBroker, who: str) -> None:
    """Also when it is due for nothing and neither first nor among the newest."""
    world = World(broker, job_spec(evaluation=EvaluationPolicy(sites_every=3)))
    made = world.versions(9, every=DAY)
    values = {3: 0.7, 6: 0.6, 9: 0.2}
    for version, value in values.items():
        report = Evaluation(
            job="toy", version=version, who=who, num_images=1, metrics={"mAP@0.5": value}, at=START
        )
        assert save_report(world.store, report)
    world.pass_time(365 * DAY)
    assert world.collect(SETTINGS.model_copy(update={"keep_versions": 1}))
    best = best_version(world.store, "toy")
    assert best is not None
    assert best.version == 3
    assert 3 in stored_versions(world, made)
    assert load_model(world.store, world.log.version(3).model)
    assert world.sound()


def test_what_is_stable_offered_or_proposed_for_release_stays(world: World) -> None:
    made = world.versions(12, every=DAY)
    record = world.log.head()
    world.log.append(record, Promoted(version=2), transitions.promote(record.head, made[2]))
    record = world.log.head()
    held = transitions.quarantine(record.head, 9, "worse", made[4])
    world.log.append(record, Quarantined(version=9, reason="worse"), held)
    world.store.put(keys.proposal_key("toy", 6), b"{}")
    world.pass_time(365 * DAY)
    settings = SETTINGS.model_copy(update={"keep_versions": 1})
    assert world.collect(settings)
    assert stored_versions(world, made) == {0, 2, 4, 6, 12}
    record = world.log.head()
    world.log.append(record, Cleared(version=9), transitions.clear(record.head))
    assert world.collect(settings) == {made[4].model.key}, "nobody is offered it any more"


def test_a_model_stays_for_the_sake_of_any_version_that_has_it(world: World) -> None:
    """Version 8 is version 2 again; when that is superseded, both may go."""
    made = world.versions(7, every=DAY)
    record = world.log.head()
    back = transitions.roll_back(world.job.spec, record.head, made[2], ())
    world.log.append(record, RolledBack(to=2), back)
    world.pass_time(365 * DAY)
    settings = SETTINGS.model_copy(update={"keep_versions": 1})
    assert world.collect(settings)
    assert stored_versions(world, made) == {0, 2}
    assert load_model(world.store, world.head.current.model)
    made.append(world.publish())
    world.pass_time(365 * DAY)
    assert world.collect(settings) == {made[2].model.key}
    assert stored_versions(world, made) == {0, 9}


def test_the_last_version_is_due_whatever_closed_the_job(broker: SqliteBroker) -> None:
    """Nobody may have asked for it: the worker that closed the job may have died."""
    world = World(broker, job_spec(evaluation=EvaluationPolicy(every=4)))
    world.versions(5)
    record = world.log.head()
    world.log.append(record, Closed(reason="over"), transitions.close(record.head, "over"))
    world.sent.clear()
    tend(world.worker, {}, lambda: False)
    assert world.sent == [(celery.EVALUATE, {"job": "toy", "version": "5"})]


def test_a_report_that_comes_while_its_version_is_collected_goes_in_the_next_run(world: World) -> None:
    """It was checked when the model was still there, and is stored when retention has looked for measurements."""
    made = world.versions(KEEP + 4, every=DAY)
    for version in (0, 3):
        measured(world, version)
    world.pass_time(30 * DAY)
    world.store.before_log_put = lambda: measured(world, 2)
    assert {made[1].model.key, made[2].model.key} <= world.collect()
    late = keys.metrics_key("toy", 2, "site-a")
    assert world.exists(late)
    assert [(item.key, item.why) for item in world.retention().plan()] == [(late, MODEL_GONE)]
    assert world.collect() == {late}
    assert world.collect() == set()
    assert {0, 3} <= stored_versions(world, made)
    assert [e.version for e in list_evaluations(world.store, "toy")] == [0, 3]
    assert world.sound()


def test_the_grace_time_of_a_version_begins_when_it_is_superseded(world: World) -> None:
    old = world.publish()
    world.pass_time(100 * DAY)
    world.versions(KEEP)
    world.pass_time(GRACE)
    assert world.collect() == set()
    world.pass_time(HOUR)
    assert world.collect() == {old.model.key}


def test_the_optimisers_state_goes_with_its_version(broker: SqliteBroker) -> None:
    with_state = AggregationPolicy.from_json(
        '{"strategy": "fedbuff", "buffer_size": 1, "server_optimizer": {"kind": "fedavgm", "beta1": 0.5}}'
    )
    world = World(broker, job_spec(aggregation=with_state))
    made = world.versions(4)
    states = [version.server_state.key for version in made if version.server_state]
    assert len(set(states)) == 4
    world.pass_time(GRACE + HOUR)
    assert world.collect() == {made[1].model.key, made[2].model.key, *states[:2]}
    assert world.sound()


def append_version(world: World, model: ModelRef) -> None:
    """A version that consists of an object that is there: a publish of today would make its own."""
    accept(world.worker, world.upload())
    record = world.log.head()
    version = record.head.version + 1
    event = Published(merged=record.head.pending)
    current = ModelVersion(version=version, model=model)
    world.log.append(record, event, transitions.publish(world.job.spec, record.head, event, current))


def test_an_object_stays_as_long_as_one_of_its_versions(world: World) -> None:
    shared = world.publish().model
    world.publish()
    append_version(world, shared)
    world.versions(1)
    world.pass_time(GRACE + HOUR)
    assert shared.key not in world.collect()  # version 3 is among the newest
    world.versions(1)
    assert shared.key in world.collect()


# --- uploads --------------------------------------------------------------------------------------


def test_the_payload_of_a_refused_update_goes_a_grace_time_after_the_refusal(world: World) -> None:
    bad, late = world.upload(float("nan")), world.upload(base_version=7)
    world.pass_time(30 * DAY)
    accept(world.worker, late)
    accept(world.worker, bad)
    publish_pending(world.worker, world.job)
    assert {r.reason for r in list_refusals(world.store, "toy")} == {"not-finite", "future-base"}
    world.pass_time(GRACE)
    assert world.collect() == set()
    world.pass_time(HOUR)
    assert world.collect() == {bad.payload_key, late.payload_key}
    assert world.sound()


def test_an_upload_without_a_record_stays_while_its_message_could_be_accepted(world: World) -> None:
    """max_staleness is 3. Nobody knows the base of an upload but that it was published before."""
    update = world.upload()
    world.pass_time(365 * DAY)
    assert world.collect() == set()  # no worker ran for a year: the message may still be in its queue
    world.versions(3)
    world.pass_time(365 * DAY)
    assert update.payload_key not in world.collect()
    accept(world.worker, update)
    publish_pending(world.worker, world.job)
    assert world.head.version == 4
    assert world.sound()


def test_an_upload_without_a_record_goes_when_every_base_of_its_time_is_too_stale(world: World) -> None:
    first = world.upload()
    world.versions(10)
    second = world.upload(base_version=10)
    world.pass_time(365 * DAY)
    world.versions(3)
    world.pass_time(365 * DAY)
    assert {first.payload_key, second.payload_key}.isdisjoint(world.collect())  # 10 is good enough for 13
    world.versions(1)
    # both: `first` lies there from before version 10, but the log does not say from how long before
    assert {first.payload_key, second.payload_key} <= world.collect()
    accept(world.worker, second)
    assert [r.reason for r in list_refusals(world.store, "toy")] == ["too-stale"]


@pytest.mark.parametrize(
    ("before", "goes"), [(GRACE, False), (GRACE + HOUR, True)], ids=["within grace", "after"]
)
def test_versions_within_a_grace_time_of_an_upload_count_as_its_base(
    world: World, before: timedelta, goes: bool
) -> None:
    """Clocks step, so what was published soon after the upload may have been published before it."""
    update = world.upload()
    world.pass_time(before)
    world.versions(4)
    world.pass_time(365 * DAY)
    assert (update.payload_key in world.collect()) is goes


@pytest.mark.parametrize(("age", "goes"), [(GRACE, False), (GRACE + HOUR, True)])
def test_in_a_closed_job_an_upload_without_a_record_goes_when_it_is_old(
    world: World, age: timedelta, goes: bool
) -> None:
    update = world.upload()
    world.close()
    world.pass_time(age)
    assert world.collect() == ({update.payload_key} if goes else set())
    accept(world.worker, update)
    assert [r.reason for r in list_refusals(world.store, "toy")] == ["job-closed"]


def test_what_still_waits_in_a_closed_job_stays(world: World) -> None:
    accept(world.worker, update := world.upload())
    world.close()
    world.pass_time(3000 * DAY)
    assert world.collect() == set()
    tend(world.worker, {}, lambda: False)  # refuses it
    world.pass_time(GRACE + HOUR)
    assert world.collect() == {update.payload_key}
    assert world.sound()


def test_an_upload_from_before_the_job_was_made_stays(world: World) -> None:
    """Its message is a dead letter, "unknown-job", and may be requeued."""
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload, job="late")
    world.store.put_if_absent(update.payload_key, payload)
    world.pass_time(365 * DAY)
    job = world.new_job(job_spec("late"))
    world.pass_time(365 * DAY)
    retention = Retention(world.store, VersionLog(world.store, "late"), job, policy(SETTINGS, job))
    assert retention.collect() == []


# --- what never goes ------------------------------------------------------------------------------

STRANGE = [
    "jobs/toy/models/README.md",
    "jobs/toy/models/0123.safetensors",
    f"jobs/toy/models/{'0' * 64}.safetensors.part",
    f"jobs/toy/models/old/{'0' * 64}.safetensors",
    "jobs/toy/updates/site-a/notes.txt",
    "jobs/toy/updates/site-a/0123.safetensors",
    f"jobs/toy/updates/{new_update_id()}.safetensors",
    f"jobs/toy/updates/Site_A/{new_update_id()}.safetensors",
    f"jobs/toy/updates/site-a/b/{new_update_id()}.safetensors",
    "jobs/toy/metrics/latest",
    "jobs/toy/metrics/0000000099/site-a.json",
    "jobs/toy/rejected/site-a/x.json",
    "jobs/toy/releases/1.json",
    f"jobs/toy-two/models/{'0' * 64}.safetensors",
    f"jobs/toy-two/updates/site-a/{new_update_id()}.safetensors",
    "deadletters/x.json",
    "_probe/x",
]


def test_what_the_log_needs_and_what_nobody_knows_stays_for_ever(world: World) -> None:
    merged = world.versions(8, every=30 * DAY)
    refused = world.upload(float("inf"))
    accept(world.worker, refused)
    publish_pending(world.worker, world.job)
    accept(world.worker, pending := world.upload())
    for key in STRANGE:
        world.store.put(key, b"")
    before = set(world.store.list(""))
    world.pass_time(3000 * DAY)
    gone = world.collect()
    log = set(world.store.list(keys.log_prefix("toy")))
    assert gone == {version.model.key for version in merged[1:-KEEP]} | {refused.payload_key}
    assert set(world.store.list("")) == (before | log) - gone
    assert world.exists(pending.payload_key)
    for key in STRANGE:  # the audit rightly complains about some
        world.store.delete(key)
    publish_pending(world.worker, world.job)
    assert world.head.version == 9
    assert world.sound()


def test_of_a_job_that_was_never_created_nothing_goes(world: World) -> None:
    save_model(world.store, "to-be", from_arrays(toy_arrays()))
    world.pass_time(3000 * DAY)
    assert list(job_ids(world.store)) == ["to-be", "toy"]
    job = world.job.model_copy(update={"spec": job_spec("to-be")})
    retention = Retention(world.store, VersionLog(world.store, "to-be"), job, policy(SETTINGS, job))
    for action in (retention.plan, retention.collect):
        with pytest.raises(NotFound):
            action()
    tend(world.worker, {}, lambda: False)
    assert len(list(world.store.list("jobs/to-be/"))) == 1


# --- beside others --------------------------------------------------------------------------------


def test_a_publish_that_records_its_model_first_keeps_it(world: World) -> None:
    """Its worker was stopped for a week, between storing and recording."""
    accept(world.worker, world.upload())
    model = save_model(world.store, "toy", from_arrays(toy_arrays(0.25)), own=True)
    world.pass_time(GRACE + HOUR)
    record = world.log.head()
    event = Published(merged=record.head.pending)
    head = transitions.publish(world.job.spec, record.head, event, ModelVersion(version=1, model=model))
    retention = world.retention()
    world.store.before_log_put = lambda: VersionLog(world.store, "toy").append(record, event, head)
    assert retention.collect() == []
    assert world.collected() == []
    assert load_model(world.store, world.head.current.model)


@pytest.mark.parametrize("wanted", [None, Point.COLLECTED, Point.DELETED])
def test_a_publish_that_comes_second_stores_its_model_anew(world: World, wanted: Point | None) -> None:
    """Retention takes the model for a leftover: all of it before the publish's record, or killed on the way."""
    accept(world.worker, world.upload())

    def collect() -> None:
        world.pass_time(GRACE + HOUR)
        if wanted is None:
            world.collect()
        else:
            killed(wanted, world.collect)

    world.store.before_log_put = collect
    assert publish_pending(world.worker, world.job) is not None
    (taken,) = world.collected()
    assert world.head.version == 1
    assert world.sound()
    world.pass_time(GRACE + HOUR)
    world.collect()
    assert not world.exists(taken) or taken == world.head.current.model.key
    assert world.sound()


def test_an_accept_between_decision_and_record_is_seen(world: World) -> None:
    """A refusal of long ago and an accept of now: the first goes, whatever is appended in between."""
    refused = world.upload(base_version=7)
    accept(world.worker, refused)
    world.pass_time(GRACE + HOUR)
    fresh = world.upload()
    retention = world.retention()
    world.store.before_log_put = lambda: accept(world.worker, fresh)
    assert [item.key for item in retention.collect()] == [refused.payload_key]
    assert [contribution.update for contribution in world.head.pending] == [fresh]
    assert world.sound()


def test_an_accept_in_the_middle_of_which_retention_runs_has_its_payload(world: World) -> None:
    update = world.upload()

    def collect() -> None:
        world.pass_time(3000 * DAY)
        world.collect()

    world.store.before_log_put = collect
    accept(world.worker, update)
    publish_pending(world.worker, world.job)
    assert world.head.version == 1
    assert world.sound()


def test_of_two_retentions_each_may_go_on_where_the_other_was(world: World) -> None:
    world.versions(6)
    world.pass_time(GRACE + HOUR)
    one, other = world.retention(), world.retention()
    world.store.before_log_put = other.collect
    one.collect()
    assert len(list(world.store.list(keys.models_prefix("toy")))) == 2 + KEEP
    assert world.sound()
    assert (one.collect(), other.collect()) == ([], [])


# --- interrupted ----------------------------------------------------------------------------------


def with_garbage(broker: SqliteBroker) -> World:
    """Superseded versions, a refused payload, a leftover model and an upload without hope."""
    world = World(broker)
    world.upload()
    world.pass_time(GRACE + HOUR)
    world.versions(6)
    accept(world.worker, world.upload(float("nan")))
    save_model(world.store, "toy", from_arrays(toy_arrays(0.125)))
    publish_pending(world.worker, world.job)
    world.pass_time(GRACE + HOUR)
    return world


def remains(world: World) -> set[str]:
    return {key for key in world.store.list("") if "/log/" not in key}


@pytest.mark.parametrize("point", [Point.COLLECTED, Point.DELETED])
def test_killed_anywhere_the_store_is_sound_and_the_next_run_finishes(
    broker: SqliteBroker, point: Point
) -> None:
    world = with_garbage(broker)
    planned = {item.key for item in world.retention().plan()}
    assert len(planned) == 7
    killed(point, world.collect)
    left = planned & remains(world)
    assert len(left) == len(planned) - (point is Point.DELETED)
    assert set(world.collected()) == planned
    assert world.sound()
    world.versions(1)
    assert left <= world.collect()
    assert not planned & remains(world)
    assert world.sound()


def test_what_the_log_gave_to_retention_goes_whatever_the_policy_says_now(world: World) -> None:
    world.versions(6)
    world.pass_time(GRACE + HOUR)
    killed(Point.COLLECTED, world.collect)
    taken = set(world.collected())
    assert world.collect(SETTINGS.model_copy(update={"keep_versions": 100})) == taken


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
@pytest.mark.parametrize(
    ("operation", "target", "nth"),
    [
        ("put", "_probe/*", 1),
        ("modified", "_probe/*", 1),
        ("delete", "_probe/*", 1),
        ("list", "jobs/toy/log/", 1),
        ("list", "jobs/toy/updates/", 1),
        ("modified", "jobs/toy/updates/*", 1),
        ("put_if_absent", "jobs/toy/log/*", 1),
        ("delete", "jobs/toy/*", 1),
        ("delete", "jobs/toy/*", 4),
    ],
)
def test_a_store_that_fails_is_tried_again(
    broker: SqliteBroker, fault: Fault, operation: str, target: str, nth: int
) -> None:
    world = with_garbage(broker)
    planned = {item.key for item in world.retention().plan()}
    faulty = FaultyStore(world.store, Scripted([Rule(operation, fault, target=target, nth=nth)]))
    retention = world.retention(store=faulty)
    with pytest.raises(StoreUnavailable):
        retention.collect()
    assert world.sound()
    retention.collect()  # the same process, as the task does it again
    assert not planned & remains(world)
    assert world.sound()


def test_a_dry_run_changes_nothing_and_says_what_a_run_does(broker: SqliteBroker) -> None:
    world = with_garbage(broker)
    before = world.store.everything()
    planned = world.retention().plan()
    assert world.store.everything() == before
    assert world.retention().collect() == planned
    reasons = {item.why for item in planned}
    assert len(reasons) == 4
    assert all(item.nbytes > 0 and item.age > GRACE for item in planned)


def test_a_second_run_finds_nothing_and_writes_nothing(broker: SqliteBroker) -> None:
    world = with_garbage(broker)
    retention = world.retention()
    assert retention.collect()
    before = world.store.everything()
    assert retention.collect() == []
    assert world.collect() == set()
    assert world.store.everything() == before


def test_a_run_that_is_told_to_stop_ends_after_a_batch_and_the_next_goes_on(world: World) -> None:
    for number in range(2 * BATCH + 50):
        world.store.put(keys.model_key("toy", f"{number:064x}"), b"left behind")
    world.pass_time(GRACE + HOUR)
    retention = world.retention()
    runs: list[list[Garbage]] = []
    while not runs or runs[-1]:
        calls = iter(range(10**6))
        runs.append(retention.collect(lambda calls=calls: next(calls) > 300))  # type: ignore[misc]
    assert [len(run) for run in runs] == [300, 150, 0]
    assert max(len(event.keys) for event in world.events if isinstance(event, Collected)) == BATCH


def test_a_long_log_is_read_in_several_runs(world: World) -> None:
    world.versions(6)
    world.pass_time(GRACE + HOUR)
    retention = world.retention()
    runs = 1
    while not (gone := retention.collect(calls_until_stop := _stop_after(4))):
        runs += 1
        assert calls_until_stop() is True
    assert runs == 3  # of 13 records
    assert len(gone) <= 4
    assert world.sound()


def _stop_after(calls: int) -> Callable[[], bool]:
    left = iter(range(calls))
    return lambda: next(left, None) is None


# --- clocks ---------------------------------------------------------------------------------------


def test_a_worker_with_a_wrong_clock_deletes_nothing(broker: SqliteBroker) -> None:
    """All that this test's worker records says 20xx by its own clock, which is not the store's."""
    world = World(broker)
    log = VersionLog(world.store, "toy", clock=lambda: START - 9999 * DAY)
    world.worker._logs["toy"] = log
    made = world.versions(6)
    assert log.head().at < START - 9000 * DAY
    world.pass_time(GRACE)
    assert world.collect() == set()
    world.pass_time(HOUR)
    assert len(world.collect()) == len(made) - 1 - KEEP


@pytest.mark.parametrize("step", [-HOUR, HOUR])
def test_a_step_of_the_stores_clock_by_an_hour_takes_nothing_that_is_younger_than_an_hour(
    broker: SqliteBroker, step: timedelta
) -> None:
    shortest = Settings(gc_grace_s=7200, keep_versions=1)
    world = World(broker)
    world.versions(3)
    save_model(world.store, "toy", from_arrays(toy_arrays(0.125)))
    accept(world.worker, world.upload(base_version=7))
    world.pass_time(HOUR + step)
    assert world.collect(shortest) == set()
    world.pass_time(2 * HOUR - step)
    assert len(world.collect(shortest)) == 4


def test_the_stores_time_leaves_no_object(world: World) -> None:
    world.pass_time(DAY)
    before = world.store.everything()
    assert store_time(world.store) == START + DAY
    assert world.store.everything() == before


# --- everything at once ---------------------------------------------------------------------------

STEPS = st.sampled_from(
    [
        *("upload", "deliver", "deliver", "publish", "publish", "publish_killed", "bad", "measure", "close"),
        *("hours", "days", "days", "clock", "collect", "collect", "collect_killed", "collect_within"),
    ]
)


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.tuples(STEPS, st.integers(0, 10**6)), max_size=60))
def test_whatever_happens_nothing_is_missed(broker: SqliteBroker, steps: list[tuple[str, int]]) -> None:
    """Messages wait and come twice, workers die, the store's clock steps by an hour and back, grace is shortest."""
    settings = Settings(gc_grace_s=7200, keep_versions=1)
    world = World(broker, settings=settings)
    sent: list[ClientUpdate] = []
    stepped = False
    for step, number in steps:
        update = sent[number % len(sent)] if sent else None
        if step == "upload":
            sent.append(world.upload(number % 7, base_version=max(0, world.head.version - number % 3)))
        elif step == "bad":
            sent.append(world.upload(float("nan")))
        elif step == "deliver" and update is not None:
            accept(world.worker, update)
        elif step == "publish":
            publish_pending(world.worker, world.job)
        elif step == "publish_killed" and world.head.pending and not world.head.closed:
            watch(_dies_once(Point.MODEL_STORED if number % 2 else Point.PUBLISHED))
            with suppress(Killed):
                publish_pending(world.worker, world.job)
            watch(None)
        elif step == "measure":
            versions = sorted({record.head.version for record in world.log.history()})
            measured(world, versions[number % len(versions)])
        elif step == "close" and number % 5 == 0 and not world.head.pending and not world.head.closed:
            world.close()
        elif step == "hours":
            world.pass_time(HOUR)
        elif step == "days":
            world.pass_time(DAY)
        elif step == "clock":
            world.pass_time(-HOUR if stepped else HOUR)
            stepped = not stepped
        elif step == "collect":
            world.collect(settings)
        elif step == "collect_killed":
            watch(_dies_once(Point.COLLECTED if number % 2 else Point.DELETED))
            with suppress(Killed):
                world.collect(settings)
            watch(None)
        elif step == "collect_within":
            world.store.before_log_put = lambda: world.collect(settings)
            publish_pending(world.worker, world.job)
            world.store.before_log_put = None
    for update in sent:
        accept(world.worker, update)
    publish_pending(world.worker, world.job)
    world.pass_time(30 * DAY)
    world.collect(settings)
    assert world.sound()
    for refusal in list_refusals(world.store, "toy"):
        assert refusal.reason != "missing-payload"


def _dies_once(wanted: Point) -> Callable[[Point], None]:
    def die(point: Point) -> None:
        if point is wanted:
            raise Killed

    return die


# --- the periodic task ----------------------------------------------------------------------------


def test_a_publish_whose_request_was_lost_is_asked_for_again(world: World) -> None:
    accept(world.worker, world.upload())
    world.sent.clear()
    tend(world.worker, {}, lambda: False)
    assert world.sent == [(celery.PUBLISH, {"job": "toy"})]
    publish_pending(world.worker, world.job)
    world.sent.clear()
    tend(world.worker, {}, lambda: False)
    assert world.sent == []


def test_a_refusal_that_only_the_log_knows_is_told(world: World) -> None:
    """Recorded by a publish that died before it told, with other records after it."""
    good, bad = world.upload(), world.upload()
    for update in (good, bad):
        accept(world.worker, update)
    world.store.put(bad.payload_key, b"x" * bad.payload_bytes)
    killed(Point.PUBLISHED, lambda: publish_pending(world.worker, world.job))
    accept(world.worker, world.upload())
    assert list(list_refusals(world.store, "toy")) == []
    tend(world.worker, {}, lambda: False)
    assert [(r.update, r.reason) for r in list_refusals(world.store, "toy")] == [(bad, "wrong-digest")]
    before = world.store.everything()
    tend(world.worker, {}, lambda: False)
    assert world.store.everything() == before


def test_an_evaluation_whose_request_was_lost_is_asked_for_again(broker: SqliteBroker) -> None:
    world = World(broker, job_spec(evaluation=EvaluationPolicy(every=2)))
    world.versions(5)
    world.sent.clear()
    tend(world.worker, {}, lambda: False)
    assert world.sent == [(celery.EVALUATE, {"job": "toy", "version": "4"})], "the newest that is due"
    measured(world, 4, SERVER)
    world.sent.clear()
    tend(world.worker, {}, lambda: False)
    assert world.sent == []


def test_what_waits_in_a_closed_job_is_refused_even_if_others_write_meanwhile(world: World) -> None:
    updates = [world.upload() for _ in range(3)]
    for update in updates:
        accept(world.worker, update)
    world.close()
    other = Context(SETTINGS, world.store, world.worker.broker, world.worker.send)
    world.store.before_log_put = lambda: tend(other, {}, lambda: True)
    tend(world.worker, {}, lambda: False)
    assert world.head.pending == ()
    refused = {refusal.update.update_id: refusal.reason for refusal in list_refusals(world.store, "toy")}
    assert refused == dict.fromkeys([update.update_id for update in updates], "job-closed")
    assert world.sound()


def test_a_job_that_cannot_be_tended_stops_no_other(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.versions(6)
    for name in ("away", "broken"):
        world.new_job(job_spec(name))
    world.store.put(keys.log_key("broken", 0), b"{}")
    world.store.put(
        keys.job_key("unborn"), world.job.model_copy(update={"spec": job_spec("unborn")}).to_json()
    )
    world.pass_time(GRACE + HOUR)
    rules = [Rule("list", Fault.FAIL_BEFORE, target="jobs/away/log/*", times=None)]
    worker = Context(
        SETTINGS, FaultyStore(world.store, Scripted(rules)), world.worker.broker, world.worker.send
    )
    caplog.set_level("INFO")
    with pytest.raises(StoreUnavailable, match="jobs/away"):
        tend(worker, {}, lambda: False)
    assert len(world.collected()) == 4
    for expected in ("away: not tended", "broken: not tended: CorruptLog", "unborn: not tended"):
        assert any(expected in message for message in caplog.messages), expected


def test_the_task_remembers_what_it_has_read_and_only_of_its_own_store(
    broker: SqliteBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.retention.REST", 0)
    first, second = World(broker), World(broker)
    for world in (first, first, second, first):
        monkeypatch.setattr("tasks.retention.current", lambda world=world: world.worker)
        world.versions(6)
        world.pass_time(GRACE + HOUR)
        result = celery.app.tasks[celery.TEND_JOBS].apply(throw=True)
        assert result.state == "SUCCESS"
        assert len(list(world.store.list(keys.models_prefix("toy")))) == 2 + KEEP
    assert len([event for event in first.events if isinstance(event, Collected)]) == 3


def test_a_worker_that_is_asked_too_often_does_something_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, runs = 100.0, []

    def tend_for_a_while(*arguments: object) -> None:
        nonlocal now
        runs.append(now)
        now += 2.0

    monkeypatch.setattr("tasks.retention.current", lambda: world.worker)
    monkeypatch.setattr("tasks.retention.tend", tend_for_a_while)
    monkeypatch.setattr("tasks.retention.time", SimpleNamespace(monotonic=lambda: now))
    for _ in range(41):
        celery.app.tasks[celery.TEND_JOBS].apply(throw=True)
        now += 1.0
    assert runs == [100.0, 120.0, 140.0]


def test_the_ingress_asks_soon_after_its_start_and_then_regularly() -> None:
    now, sent = [1000.0], []
    broken = False

    def send(name: str, arguments: Mapping[str, str]) -> None:
        if broken:
            raise StoreUnavailable("no broker")
        sent.append((name, dict(arguments), now[0]))

    stopped = False
    tick = ticking(lambda: stopped, send, every_s={celery.TEND_JOBS: 3600.0}, clock=lambda: now[0])

    def run(seconds: int) -> list[float]:
        sent.clear()
        for _ in range(seconds):
            now[0] += 1
            assert tick() is stopped
        assert all((name, arguments) == (celery.TEND_JOBS, {}) for name, arguments, _ in sent)
        return [at for *_, at in sent]

    (first,) = run(int(FIRST_TICK_S) + 1)
    assert first >= 1000 + FIRST_TICK_S / 2
    assert run(3600 - int(3600 * 0.1) - 100) == []
    (second,) = run(2 * int(3600 * 0.1) + 100)
    assert 0.9 * 3600 <= second - first <= 1.1 * 3600 + 1
    broken = True
    assert run(2 * 3600) == []
    broken = False
    assert len(run(int(FIRST_TICK_S) + 1)) == 1  # as soon as the broker is back
    stopped = True
    run(1)


def test_the_shortest_interval_holds_for_the_first_time_too() -> None:
    now, sent = [0.0], []
    tick = ticking(
        lambda: False, lambda *task: sent.append(task), every_s={celery.TEND_JOBS: 0.5}, clock=lambda: now[0]
    )
    now[0] = 0.5
    tick()
    assert len(sent) == 1


# --- settings and command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("gc_grace_s", 7199), ("gc_grace_s", float("nan")), ("gc_every_s", 0), ("keep_versions", 0)],
)
def test_settings_that_would_delete_too_much_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadSettings, match=field):
        Settings.load(**{field: value})


def test_the_defaults_keep_a_week_and_twenty_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.load()
    assert (settings.gc_every_s, settings.gc_grace_s, settings.keep_versions) == (3600, 604_800, 20)


def make_old(folder: Path, days: float) -> None:
    """As if the whole store were that much older."""
    for path in folder.rglob("*.*"):
        if path.is_file():
            past = path.stat().st_mtime - days * 86_400
            os.utime(path, (past, past))


def test_the_command_shows_and_removes(broker: SqliteBroker, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = FolderStore(folder)
    worker = Context(Settings(), store, broker, lambda name, arguments: None)
    spec = job_spec("street", stop=StopRule(max_versions=30))
    ref = save_model(store, "street", from_arrays(toy_arrays()))
    job = create(worker, spec, ref, ref)
    for value in range(1, 25):
        payload = payload_of(toy_arrays(value))
        update = client_update(payload, job="street", base_version=value - 1)
        store.put_if_absent(update.payload_key, payload)
        accept(worker, update)
        publish_pending(worker, job)
    save_model(store, "to-be", from_arrays(toy_arrays()))
    make_old(folder, 8)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    environment = {
        env_name("store_url"): f"file:{folder}",
        env_name("broker_url"): f"sqlite:{tmp_path}/queue.db",
        env_name("live_url"): f"file:{tmp_path}/live",
    }

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["gc", *arguments], env=environment)
        return result.exit_code, result.output

    code, shown = run("--dry-run")
    assert code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert shown.count("its version is superseded") == 4
    assert "8 d  0 h" in shown
    assert "4 objects, 0.00 MB would go" in shown
    assert "to-be: models of a job that was never created" in shown
    code, removed = run("street")
    assert code == 0
    assert "4 objects, 0.00 MB removed" in removed
    assert [line for line in removed.splitlines() if "/models/" in line] == [
        line for line in shown.splitlines() if "/models/" in line
    ]
    assert len(list(store.list(keys.models_prefix("street")))) == 21
    assert [f for f in audit(store, "street") if f.level == "error"] == []
    assert run("street") == (0, "0 objects, 0.00 MB removed\n")
    code, nothing = run("nowhere")
    assert code == 1
    assert "nowhere" in nothing
    store.put(keys.log_key("street", 99), b"{}")
    code, corrupt = run()
    assert code == 1
    assert "CorruptLog" in corrupt
