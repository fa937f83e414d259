"""Faults on purpose: what each does to each operation, and what the version log makes of a storm of them."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregator import transitions
from broker import topology
from broker.faulty import FaultyBroker
from broker.port import Broker
from broker.sqlite import SqliteBroker
from federation.errors import (
    BadPayload,
    BrokerUnavailable,
    Conflict,
    CorruptLog,
    NotFound,
    StoreUnavailable,
    Transient,
)
from federation.faults import (
    OPERATIONS,
    QUEUES,
    READS,
    WRITES,
    Fault,
    FaultPlan,
    Rule,
    Scripted,
    Seeded,
    applies_to,
)
from federation.jobs import ModelRef
from federation.keys import job_key, model_key
from federation.types import Accepted, Contribution, Head, ModelVersion
from federation.wire import Delivery, Message
from storage.blob import BlobStore
from storage.faulty import RECENT_KEYS, REMEMBERED_BYTES, FaultyStore
from storage.jobs import load_job
from storage.log import VersionLog, named
from storage.memory import MemoryStore
from tests.factories import client_update

AT = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


class Always:
    """A plan that asks for `fault` wherever, and remembers what it was asked."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.asked: list[tuple[str, str]] = []

    def next(self, operation: str, target: str) -> Fault | None:
        self.asked.append((operation, target))
        return self.fault


# --- plans -------------------------------------------------------------------------------------------------


def test_the_operations_are_the_methods_of_the_ports() -> None:
    def methods(port: type) -> set[str]:
        return {name for name in vars(port) if not name.startswith("_")}

    assert methods(BlobStore) == READS | WRITES
    assert methods(Broker) == QUEUES | {"close"}


def test_faults_apply_where_they_mean_something() -> None:
    for fault in (Fault.FAIL_BEFORE, Fault.FAIL_AFTER, Fault.DELAY):
        assert all(applies_to(fault, operation) for operation in OPERATIONS)
    assert {o for o in OPERATIONS if applies_to(Fault.STALE, o)} == READS
    assert {o for o in OPERATIONS if applies_to(Fault.TRUNCATE, o)} == {"get", "get_to_file"}
    assert {o for o in OPERATIONS if applies_to(Fault.REPEAT, o)} == {"publish"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("put_if_absent", Fault.STALE), "applies to no operation"),
        (lambda: Rule("gett", Fault.DELAY), "applies to no operation"),
        (lambda: Rule("get", Fault.DELAY, nth=0), "counted from 1"),
        (lambda: Rule("get", Fault.DELAY, times=0), "counted from 1"),
        (lambda: Seeded(1, {Fault.DELAY: 0.6, Fault.FAIL_AFTER: 0.6}), "at most 1"),
        (lambda: Seeded(1, {Fault.DELAY: -0.1}), "at most 1"),
        (lambda: Seeded(1, {Fault.REPEAT: 0.1}, operations=READS), "applies to none of"),
        (lambda: Seeded(1, {Fault.DELAY: 0.1}, operations={"gett"}), "no operations of a port: gett"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_script_counts_the_calls_that_each_rule_matches() -> None:
    plan = Scripted(
        [
            Rule("put*", Fault.FAIL_AFTER, target="jobs/*/log/*", nth=2, times=2),
            Rule("put", Fault.FAIL_BEFORE, nth=3),
            Rule("*", Fault.TRUNCATE, nth=2, times=None),
        ]
    )
    calls = [
        ("put", "jobs/a/log/1", None),
        ("put", "elsewhere", None),
        ("get", "elsewhere", None),
        ("put_if_absent", "jobs/b/log/2", Fault.FAIL_AFTER),
        ("put", "jobs/a/log/3", Fault.FAIL_AFTER),  # due by two rules: the first decides, both have counted
        ("put", "jobs/a/log/4", None),
        ("size", "elsewhere", None),  # nothing to truncate, so the third rule does not count it
        ("get", "elsewhere", Fault.TRUNCATE),
        ("get_to_file", "elsewhere", Fault.TRUNCATE),
    ]
    assert [plan.next(operation, target) for operation, target, _ in calls] == [fault for *_, fault in calls]
    assert plan.counts == {Fault.FAIL_AFTER: 2, Fault.TRUNCATE: 2}


RATES = {Fault.FAIL_BEFORE: 0.1, Fault.FAIL_AFTER: 0.2, Fault.STALE: 0.3, Fault.REPEAT: 0.2}


def drawn(plan: FaultPlan, calls: int = 2000) -> list[Fault | None]:
    operations = sorted(OPERATIONS)
    return [plan.next(operations[n % len(operations)], f"key/{n % 3}") for n in range(calls)]


def test_the_same_seed_gives_the_same_faults() -> None:
    first = drawn(Seeded(7, RATES))
    assert first == drawn(Seeded(7, dict(reversed(RATES.items()))))
    assert first != drawn(Seeded(8, RATES))


def test_a_seeded_plan_keeps_its_rates_its_counts_and_to_what_applies() -> None:
    plan = Seeded(7, RATES)
    operations = sorted(OPERATIONS)
    calls = [(operations[n % len(operations)], fault) for n, fault in enumerate(drawn(plan, 11_000))]
    assert plan.counts == Counter(fault for _, fault in calls if fault is not None)
    assert all(fault is None or applies_to(fault, operation) for operation, fault in calls)
    for fault, rate in RATES.items():
        possible = [found for operation, found in calls if applies_to(fault, operation)]
        assert possible.count(fault) / len(possible) == pytest.approx(rate, abs=0.05)


def test_a_seeded_plan_keeps_to_its_operations_and_targets() -> None:
    plan = Seeded(1, {Fault.FAIL_BEFORE: 1.0}, operations={"put", "publish"}, target="updates.*")
    assert plan.next("put", "updates.site-a") == plan.next("publish", "updates.b") == Fault.FAIL_BEFORE
    assert plan.next("get", "updates.site-a") is plan.next("put", "heartbeats.site-a") is None


# --- a store -----------------------------------------------------------------------------------------------

OLD, NEW = b"before", b"afterwards"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def download(store: BlobStore, path: Path, data: bytes, key: str = "k") -> bytes:
    store.get_to_file(key, path, nbytes=len(data), sha256=sha256(data))
    return path.read_bytes()


CALLS: dict[str, Callable[[BlobStore, Path], object]] = {
    "get": lambda store, path: store.get("k", max_bytes=100),
    "get_to_file": lambda store, path: download(store, path, OLD),
    "size": lambda store, path: store.size("k"),
    "modified": lambda store, path: store.modified("k"),
    "list": lambda store, path: list(store.list("")),
    "put": lambda store, path: store.put("k", NEW),
    "put_if_absent": lambda store, path: store.put_if_absent("l", NEW),
    "delete": lambda store, path: store.delete("k"),
}
DONE: dict[str, dict[str, bytes]] = {
    "put": {"k": NEW},
    "put_if_absent": {"k": OLD, "l": NEW},
    "delete": {},
}
"""What is in the store after a call of CALLS, if it is not what was there before."""


def contents(store: BlobStore) -> dict[str, bytes]:
    return {key: store.get(key, max_bytes=100) for key in store.list("")}


@pytest.fixture
def inner() -> MemoryStore:
    store = MemoryStore()
    store.put("k", OLD)
    return store


@pytest.mark.parametrize("operation", sorted(READS | WRITES))
def test_a_call_that_fails_before_does_nothing(operation: str, inner: MemoryStore, tmp_path: Path) -> None:
    store = FaultyStore(inner, Scripted([Rule(operation, Fault.FAIL_BEFORE)]))
    with pytest.raises(StoreUnavailable, match=f"{operation} .*nothing was done"):
        CALLS[operation](store, tmp_path / "f")
    assert contents(inner) == {"k": OLD}
    assert not (tmp_path / "f").exists()
    CALLS[operation](store, tmp_path / "f")
    assert contents(inner) == DONE.get(operation, {"k": OLD})
    assert store.counts == {Fault.FAIL_BEFORE: 1}


@pytest.mark.parametrize("operation", sorted(READS | WRITES))
def test_a_call_that_fails_after_is_done(operation: str, inner: MemoryStore, tmp_path: Path) -> None:
    store = FaultyStore(inner, Scripted([Rule(operation, Fault.FAIL_AFTER)]))
    with pytest.raises(StoreUnavailable, match=f"{operation} .*the reply was lost"):
        CALLS[operation](store, tmp_path / "f")
    assert contents(inner) == DONE.get(operation, {"k": OLD})
    assert (tmp_path / "f").exists() == (operation == "get_to_file")
    assert store.counts == {Fault.FAIL_AFTER: 1}


@pytest.mark.parametrize("operation", sorted(READS | WRITES))
def test_a_delayed_call_waits_and_works(operation: str, inner: MemoryStore, tmp_path: Path) -> None:
    waited: list[float] = []
    plan = Scripted([Rule(operation, Fault.DELAY)])
    store = FaultyStore(inner, plan, delay_s=1.5, sleep=waited.append)
    CALLS[operation](store, tmp_path / "f")
    assert waited == [1.5]
    assert contents(inner) == DONE.get(operation, {"k": OLD})
    assert store.counts == plan.counts == {Fault.DELAY: 1}


def test_the_plan_is_asked_once_per_call_and_never_about_what_is_no_key(inner: MemoryStore) -> None:
    plan = Always(Fault.FAIL_BEFORE)
    store = FaultyStore(inner, plan)
    with pytest.raises(ValueError, match="key"):
        store.get("../k", max_bytes=1)
    keys = store.list("a/")
    assert plan.asked == []
    with pytest.raises(StoreUnavailable):
        next(keys)
    with pytest.raises(StoreUnavailable):
        store.put("a/b", b"")
    assert plan.asked == [("list", "a/"), ("put", "a/b")]


def test_an_error_of_the_store_itself_is_no_injected_fault(inner: MemoryStore) -> None:
    store = FaultyStore(inner, Always(Fault.FAIL_AFTER))
    with pytest.raises(NotFound):
        store.size("nothing")
    assert store.counts == {}


def test_a_listing_that_fails_after_has_shown_its_keys(inner: MemoryStore) -> None:
    keys = FaultyStore(inner, Always(Fault.FAIL_AFTER)).list("")
    assert next(keys) == "k"
    with pytest.raises(StoreUnavailable):
        next(keys)


def test_a_truncated_read_is_a_beginning(inner: MemoryStore) -> None:
    store = FaultyStore(inner, Scripted([Rule("get", Fault.TRUNCATE, times=20)]))
    cut = [store.get("k", max_bytes=len(OLD)) for _ in range(20)]
    assert all(data != OLD and OLD.startswith(data) for data in cut)
    assert len(set(cut)) > 1, "one place only would look like an object that is damaged for good"
    assert store.get("k", max_bytes=len(OLD)) == OLD
    assert store.counts == {Fault.TRUNCATE: 20}


def test_what_is_too_large_or_missing_or_empty_is_not_truncated(inner: MemoryStore, tmp_path: Path) -> None:
    store = FaultyStore(inner, Always(Fault.TRUNCATE))
    with pytest.raises(BadPayload) as caught:
        store.get("k", max_bytes=len(OLD) - 1)
    assert caught.value.reason == "too-large"
    with pytest.raises(NotFound):
        store.get("nothing", max_bytes=1)
    inner.put("k", b"")
    assert store.get("k", max_bytes=1) == download(store, tmp_path / "f", b"") == b""
    assert store.counts == {}


def test_a_truncated_download_is_no_file(inner: MemoryStore, tmp_path: Path) -> None:
    store = FaultyStore(inner, Scripted([Rule("get_to_file", Fault.TRUNCATE)]))
    with pytest.raises(BadPayload) as caught:
        download(store, tmp_path / "f", OLD)
    assert caught.value.reason == "wrong-size"
    assert list(tmp_path.iterdir()) == []
    assert download(store, tmp_path / "f", OLD) == OLD


def stale(inner: BlobStore) -> tuple[FaultyStore, Always]:
    """A store that works, and its plan: from now on every read is stale when `fault` says so."""
    plan = Always(None)
    return FaultyStore(inner, plan), plan


def test_a_stale_read_shows_what_was_overwritten(tmp_path: Path) -> None:
    times = iter([AT, AT + timedelta(days=1)])
    inner = MemoryStore(clock=lambda: next(times))
    inner.put("k", OLD)
    store, plan = stale(inner)
    store.put("k", NEW)
    plan.fault = Fault.STALE
    assert store.get("k", max_bytes=100) == OLD
    assert store.size("k") == len(OLD)
    assert store.modified("k") == AT
    assert download(store, tmp_path / "old", OLD) == OLD
    with pytest.raises(BadPayload):
        download(store, tmp_path / "new", NEW)
    assert not (tmp_path / "new").exists()
    assert store.counts == {Fault.STALE: 5}
    assert list(store.list("")) == ["k"]
    plan.fault = None
    assert store.get("k", max_bytes=100) == download(store, tmp_path / "new", NEW) == NEW
    assert store.counts == {Fault.STALE: 5}, "a listing that shows nothing else is not stale"


@pytest.mark.parametrize("write", ["put", "put_if_absent"])
def test_a_stale_read_does_not_see_what_is_new(write: str, inner: MemoryStore, tmp_path: Path) -> None:
    store, plan = stale(inner)
    getattr(store, write)("k2", NEW)
    plan.fault = Fault.STALE
    reads: list[Callable[[], object]] = [
        lambda: store.get("k2", max_bytes=100),
        lambda: store.size("k2"),
        lambda: store.modified("k2"),
        lambda: download(store, tmp_path / "f", NEW, "k2"),
    ]
    for read in reads:
        with pytest.raises(NotFound):
            read()
    assert list(tmp_path.iterdir()) == []
    assert list(store.list("")) == ["k"]
    assert list(store.list("k2")) == []
    assert store.counts == {Fault.STALE: 6}
    plan.fault = None
    assert contents(store) == {"k": OLD, "k2": NEW}


def test_a_stale_read_still_sees_what_was_deleted(inner: MemoryStore) -> None:
    inner.put("j", b"")
    inner.put("l", b"")
    store, plan = stale(inner)
    store.delete("k")
    plan.fault = Fault.STALE
    assert store.get("k", max_bytes=100) == OLD
    assert list(store.list("")) == ["j", "k", "l"]
    assert list(store.list("k")) == ["k"]
    assert list(store.list("", start_after="k")) == ["l"]
    plan.fault = None
    assert list(store.list("")) == ["j", "l"]


def test_a_write_whose_reply_was_lost_can_be_stale_too(inner: MemoryStore) -> None:
    store = FaultyStore(inner, Scripted([Rule("put", Fault.FAIL_AFTER), Rule("get", Fault.STALE)]))
    with pytest.raises(StoreUnavailable):
        store.put("k", NEW)
    assert [store.get("k", max_bytes=100) for _ in range(2)] == [OLD, NEW]


def test_only_the_last_few_keys_are_stale(inner: MemoryStore) -> None:
    store, plan = stale(inner)
    keys = [f"new/{n}" for n in range(RECENT_KEYS + 2)]
    for key in keys:
        assert store.put_if_absent(key, NEW)
    assert not store.put_if_absent("k", NEW), "nothing was written, so nothing is recent"
    plan.fault = Fault.STALE
    assert list(store.list("")) == ["k", *keys[:2]]
    assert store.get(keys[1], max_bytes=100) == NEW
    assert store.get("k", max_bytes=100) == OLD
    with pytest.raises(NotFound):
        store.get(keys[2], max_bytes=100)
    assert store.counts == {Fault.STALE: 2}


def test_put_if_absent_is_never_stale(inner: MemoryStore) -> None:
    store = FaultyStore(inner, Always(Fault.STALE))
    assert store.put_if_absent("n", OLD)
    assert not store.put_if_absent("n", NEW)
    store.delete("n")
    assert store.put_if_absent("n", NEW)


def test_large_objects_are_not_kept_to_be_stale() -> None:
    store, plan = stale(MemoryStore())
    store.put("k", bytes(REMEMBERED_BYTES + 1))
    store.put("k", NEW)  # no earlier state but the one before all
    plan.fault = Fault.STALE
    with pytest.raises(NotFound):
        store.get("k", max_bytes=100)


# --- a broker ----------------------------------------------------------------------------------------------


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[SqliteBroker]:
    with closing(SqliteBroker(tmp_path / "queue.db", requeue_backoff_s=(0.001, 0.002))) as broker:
        broker.declare(["site-a", "site-b"])
        yield broker


def update(number: int, site: str = "site-a") -> Message:
    return Message(routing_key=f"updates.{site}", body=b"", type="t", message_id=f"id-{number}")


def publish(broker: Broker, number: int, site: str = "site-a") -> None:
    broker.publish(topology.UPDATES_EXCHANGE, update(number, site))


def drained(broker: Broker) -> list[str | None]:
    return [delivery.message_id for delivery in broker.drain(topology.UPDATES)]


def consumed(broker: Broker, deliveries: int) -> list[tuple[str | None, int]]:
    """(id, attempt) of what reached the handler, until so many did."""
    seen: list[tuple[str | None, int]] = []

    def handler(delivery: Delivery) -> None:
        seen.append((delivery.message_id, delivery.attempts))

    give_up = time.monotonic() + 30
    broker.consume([topology.UPDATES], handler, lambda: len(seen) >= deliveries or time.monotonic() > give_up)
    return seen


def test_a_publish_that_fails_before_sends_nothing(queue: SqliteBroker) -> None:
    broker = FaultyBroker(queue, Scripted([Rule("publish", Fault.FAIL_BEFORE, target="updates.*")]))
    with pytest.raises(BrokerUnavailable, match=r"publish updates\.site-a: .*nothing was done"):
        publish(broker, 1)
    assert drained(queue) == []
    publish(broker, 1)
    assert drained(queue) == ["id-1"]


def test_a_publish_that_fails_after_has_sent_it(queue: SqliteBroker) -> None:
    broker = FaultyBroker(queue, Scripted([Rule("publish", Fault.FAIL_AFTER)]))
    with pytest.raises(BrokerUnavailable, match="the reply was lost"):
        publish(broker, 1)
    assert drained(queue) == ["id-1"]


def test_a_drain_that_fails_after_has_lost_the_hints(queue: SqliteBroker) -> None:
    faults = [Rule("drain", Fault.FAIL_BEFORE), Rule("drain", Fault.FAIL_AFTER, target="fed.updates", nth=3)]
    broker = FaultyBroker(queue, Scripted(faults))
    publish(broker, 1)
    with pytest.raises(BrokerUnavailable):
        drained(broker)
    assert drained(broker) == ["id-1"]
    publish(broker, 2)
    with pytest.raises(BrokerUnavailable):
        drained(broker)
    assert drained(broker) == drained(queue) == []


def test_a_delivery_that_fails_before_comes_again_unhandled(queue: SqliteBroker) -> None:
    broker = FaultyBroker(queue, Scripted([Rule("consume", Fault.FAIL_BEFORE, target="updates.site-a")]))
    publish(broker, 1)
    publish(broker, 2, "site-b")
    assert sorted(consumed(broker, 2)) == [("id-1", 2), ("id-2", 1)]
    assert broker.counts == {Fault.FAIL_BEFORE: 1}


def test_a_delivery_that_fails_after_is_handled_twice(queue: SqliteBroker) -> None:
    broker = FaultyBroker(queue, Scripted([Rule("consume", Fault.FAIL_AFTER)]))
    publish(broker, 1)
    assert consumed(broker, 2) == [("id-1", 1), ("id-1", 2)]
    assert drained(queue) == []


def test_what_the_handler_raises_ends_consume_as_before(queue: SqliteBroker) -> None:
    broker = FaultyBroker(queue, Always(Fault.FAIL_AFTER))
    queue.publish(topology.UPDATES_EXCHANGE, update(1))

    def crash(delivery: Delivery) -> None:
        raise OSError("a bug")

    with pytest.raises(OSError, match="a bug"):
        broker.consume([topology.UPDATES], crash, lambda: False)
    assert broker.counts == {}


def test_delays_of_a_broker(queue: SqliteBroker) -> None:
    waited: list[float] = []
    broker = FaultyBroker(queue, Always(Fault.DELAY), delay_s=0.5, sleep=waited.append)
    publish(broker, 1)
    assert consumed(broker, 1) == [("id-1", 1)]
    assert drained(broker) == []
    assert waited == [0.5] * 3
    assert broker.counts == {Fault.DELAY: 3}


def test_a_repetition_comes_late_and_out_of_order(queue: SqliteBroker) -> None:
    plan = Scripted([Rule("publish", Fault.REPEAT, nth=4)])
    broker = FaultyBroker(queue, plan)
    arrived = []
    for number in (1, 2, 3, 4, 5):
        publish(broker, number)
        arrived += drained(queue)
    assert arrived == ["id-1", "id-2", "id-3", "id-4", "id-1", "id-5"]
    assert broker.counts == plan.counts == {Fault.REPEAT: 1}


def test_only_recent_messages_with_the_same_key_are_repeated(queue: SqliteBroker) -> None:
    broker = FaultyBroker(queue, Scripted([Rule("publish", Fault.REPEAT, times=None)]))
    arrived = []
    for number, site in enumerate(["site-a", "site-b", "site-b"], 1):
        publish(broker, number, site)
        arrived += drained(queue)
    assert arrived == ["id-1", "id-2", "id-3", "id-2"]
    assert broker.counts == {Fault.REPEAT: 1}
    arrived = []
    for number in range(4, 34):
        publish(broker, number)
        arrived += drained(queue)
    assert "id-32" in arrived
    assert arrived[-1] == "id-25", "the eighth before the last"


def test_a_repetition_that_fails_is_not_the_callers_failure(queue: SqliteBroker) -> None:
    class Full:
        """Refuses every message that it has seen before."""

        seen: set[str | None]

        def __init__(self) -> None:
            self.seen = set()

        def publish(self, exchange: str, message: Message) -> None:
            if message.message_id in self.seen:
                raise BrokerUnavailable("full")
            self.seen.add(message.message_id)
            queue.publish(exchange, message)

        consume, drain, close = queue.consume, queue.drain, queue.close

    broker = FaultyBroker(Full(), Scripted([Rule("publish", Fault.REPEAT, times=None)]))
    publish(broker, 1)
    publish(broker, 2)
    assert drained(queue) == ["id-1", "id-2"]
    assert broker.counts == {}


# --- what it is for: the log in a storm ----------------------------------------------------------------------

JOB = "toy"
STORM = {Fault.FAIL_BEFORE: 0.1, Fault.FAIL_AFTER: 0.1, Fault.STALE: 0.2, Fault.TRUNCATE: 0.2}
EACH = 20
"""Updates of each of the two writers."""


def contributions() -> list[Contribution]:
    updates = [client_update(created_at=AT, job=JOB) for _ in range(EACH)]
    return [Contribution(update=update, staleness=0, weight=0.5, version=1) for update in updates]


def writer(log: VersionLog, mine: list[Contribution], trouble: Counter[str]) -> Iterator[None]:
    """Bring each of `mine` into the log, as tasks do: after an error look at the head and decide again.

    Others may take their turn wherever it yields.
    """
    for contribution in mine:
        while True:
            yield
            try:
                record = log.head()
                if contribution in record.head.pending:
                    break
                yield
                head = transitions.accept(record.head, contribution)
                log.append(record, Accepted(contribution=contribution), head)
                break
            except Transient as exc:
                trouble[type(exc).__name__] += 1


def storm(inner: BlobStore, seed: int) -> tuple[list[str], list[str], Counter[Fault], Counter[str]]:
    """Two writers take turns on one store. Returns the ids that they brought, those in the log, and troubles."""
    digest = "0" * 64
    ref = ModelRef(key=model_key(JOB, digest), sha256=digest, nbytes=8)
    VersionLog(inner, JOB).create(Head(current=ModelVersion(version=0, model=ref)))
    store = FaultyStore(inner, Seeded(seed, STORM))
    trouble: Counter[str] = Counter()
    brought = [contributions(), contributions()]
    waiting = [writer(VersionLog(store, JOB, clock=lambda: AT), mine, trouble) for mine in brought]
    turns = random.Random(seed)
    while waiting:
        one = turns.choice(waiting)
        if next(one, StopIteration) is StopIteration:
            waiting.remove(one)
    events = [record.event for record in VersionLog(inner, JOB).history()]
    ids = [update_id for event in events for update_id in named(event)]
    return sorted(c.update.update_id for mine in brought for c in mine), sorted(ids), store.counts, trouble


@pytest.mark.parametrize("seed", range(8))
def test_every_event_is_in_the_log_once_after_a_storm(seed: int) -> None:
    brought, logged, faults, trouble = storm(MemoryStore(), seed)
    assert logged == brought
    assert len(brought) == 2 * EACH
    assert min(faults[fault] for fault in STORM) > 0, faults
    assert trouble[StoreUnavailable.__name__] >= faults[Fault.FAIL_BEFORE]


def test_the_same_seed_makes_the_same_storm() -> None:
    assert storm(MemoryStore(), 3)[2:] == storm(MemoryStore(), 3)[2:] != storm(MemoryStore(), 4)[2:]


def test_writers_meet_in_the_storm() -> None:
    met = sum((storm(MemoryStore(), seed)[3] for seed in range(8)), Counter[str]())
    assert met[Conflict.__name__] > 0


def test_a_storm_shows_a_store_that_overwrites() -> None:
    class Overwriting(MemoryStore):
        def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
            self.put(key, data)
            return True

    brought, logged, *_ = storm(Overwriting(), 0)
    assert set(logged) < set(brought), "updates are gone, and their writers were told that they are in"


def test_a_job_that_was_read_incompletely_is_no_corrupt_job() -> None:
    inner = MemoryStore()
    inner.put(job_key(JOB), b'{"not": "a job"}')
    plan = Scripted([Rule("get", Fault.TRUNCATE)])
    with pytest.raises(StoreUnavailable, match="incompletely"):
        load_job(FaultyStore(inner, plan), JOB)
    with pytest.raises(CorruptLog):
        load_job(FaultyStore(inner, Scripted()), JOB)
