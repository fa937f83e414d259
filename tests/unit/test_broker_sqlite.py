"""What only the embedded queue has: leases, fencing tokens, and one file shared by processes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker import topology
from broker.lease import Lease, LeaseQueue
from broker.open import connect
from broker.sqlite import SqliteBroker
from federation.errors import AccessDenied, BadMessage, BrokerUnavailable, Fatal
from federation.settings import Settings
from federation.wire import Delivery, JobAnnounced, Message, decode_control, encode_control

ROOT = Path(__file__).parents[2]
FOR_EVER = 1000.0
OVER_AT_ONCE = -1.0  # a lease that has ended when it begins: no test waits for a clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "on demand" / "queue.db"


@pytest.fixture
def queue(path: Path) -> Iterator[LeaseQueue]:
    opened = LeaseQueue(path, topology.queues(delivery_limit=3))
    yield opened
    opened.close()


def update(message_id: str | None = "id", body: bytes = b"{}", key: str = "updates.site-a") -> Message:
    return Message(routing_key=key, body=body, type="t", message_id=message_id)


def publish(queue: LeaseQueue, *ids: str) -> None:
    for message_id in ids:
        queue.publish(topology.UPDATES_EXCHANGE, update(message_id))


def lease(queue: LeaseQueue, seconds: float = FOR_EVER, name: str = topology.UPDATES) -> Lease:
    found = queue.lease([name], seconds)
    assert found is not None
    return found


# --- leases ----------------------------------------------------------------------------------------------------


def test_a_leased_message_is_hidden_and_the_next_one_is_not(queue: LeaseQueue) -> None:
    publish(queue, "1", "2")
    assert lease(queue).delivery.message_id == "1"
    assert lease(queue).delivery.message_id == "2"
    assert queue.lease([topology.UPDATES], FOR_EVER) is None


@pytest.mark.parametrize("name", [topology.UPDATES, topology.MERGE], ids=["many readers", "one at a time"])
def test_a_clock_that_steps_back_an_hour_makes_no_lease_longer(
    queue: LeaseQueue, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    exchange, key = {
        topology.UPDATES: (topology.UPDATES_EXCHANGE, "updates.site-a"),
        topology.MERGE: (topology.TASKS_EXCHANGE, "merge.accept_update"),
    }[name]
    queue.publish(exchange, update("1", key=key))
    dead = lease(queue, 30.0, name)
    assert queue.lease([name], 30.0) is None
    now -= 3600.0
    alive = lease(queue, 30.0, name)
    assert (alive.seq, alive.token) == (dead.seq, dead.token + 1)
    assert not queue.acknowledge(dead)
    assert queue.lease([name], 30.0) is None, "the new lease is as good as any"


def test_after_its_end_a_lease_goes_to_another_and_the_old_token_is_worth_nothing(queue: LeaseQueue) -> None:
    publish(queue, "1")
    sleeper = lease(queue, OVER_AT_ONCE)
    awake = lease(queue)
    assert (awake.seq, awake.delivery.attempts) == (sleeper.seq, 2)
    assert not queue.acknowledge(sleeper)
    assert not queue.give_back(sleeper)
    assert not queue.renew(sleeper, OVER_AT_ONCE)
    assert queue.lease([topology.UPDATES], FOR_EVER) is None  # still with the one that is awake
    assert queue.acknowledge(awake)
    assert not queue.acknowledge(awake)
    assert queue.depth(topology.UPDATES) == 0


def test_an_ended_lease_that_nobody_took_is_still_good(queue: LeaseQueue) -> None:
    publish(queue, "1")
    slow = lease(queue, OVER_AT_ONCE)
    assert queue.renew(slow, FOR_EVER)
    assert queue.lease([topology.UPDATES], FOR_EVER) is None
    assert queue.acknowledge(slow)


def test_a_message_given_back_cannot_be_hidden_by_a_late_renewal(queue: LeaseQueue) -> None:
    publish(queue, "1")
    given_back = lease(queue)
    assert queue.give_back(given_back)
    assert not queue.renew(given_back, FOR_EVER)
    assert lease(queue).delivery.attempts == 2


def test_given_back_it_keeps_its_place(queue: LeaseQueue) -> None:
    publish(queue, "1", "2")
    queue.give_back(lease(queue))
    assert lease(queue).delivery.message_id == "1"


def test_consumers_that_die_use_up_the_delivery_limit_too(queue: LeaseQueue) -> None:
    publish(queue, "poison", "good")
    for attempt in range(1, 5):
        assert lease(queue, OVER_AT_ONCE).delivery.attempts == attempt
    assert lease(queue).delivery.message_id == "good"
    dead = lease(queue, name=topology.DEAD).delivery
    assert (dead.message_id, dead.attempts) == ("poison", 1)
    assert dead.headers == {topology.DEATH_REASON: "delivery_limit", topology.DEATH_QUEUE: topology.UPDATES}


def test_expired_work_is_a_dead_letter_and_an_expired_hint_is_gone(queue: LeaseQueue) -> None:
    for key in ("updates.site-a", "heartbeats.site-a"):
        queue.publish(topology.UPDATES_EXCHANGE, Message(routing_key=key, body=b"", type="t", ttl_s=1e-9))
    assert queue.lease([topology.UPDATES, topology.HEARTBEATS], FOR_EVER) is None
    assert lease(queue, name=topology.DEAD).delivery.headers[topology.DEATH_REASON] == "expired"
    assert queue.lease([topology.DEAD], FOR_EVER) is None
    assert [queue.depth(q) for q in (topology.UPDATES, topology.HEARTBEATS)] == [0, 0]


def test_a_single_active_consumer_has_one_message_at_a_time(path: Path, queue: LeaseQueue) -> None:
    for number in range(2):
        queue.publish(topology.TASKS_EXCHANGE, update(str(number), key="merge.accept"))
    held = lease(queue, name=topology.MERGE)
    other = LeaseQueue(path, topology.queues())
    assert other.lease([topology.MERGE], FOR_EVER) is None
    queue.acknowledge(held)
    assert lease(other, name=topology.MERGE).delivery.message_id == "1"
    other.close()


def test_the_same_message_published_again_while_it_waits_is_one(queue: LeaseQueue) -> None:
    publish(queue, "1", "1")
    queue.publish(topology.UPDATES_EXCHANGE, update("1", body=b"other content under the same id"))
    queue.publish(topology.UPDATES_EXCHANGE, update(None))
    queue.publish(topology.UPDATES_EXCHANGE, update(None))
    assert queue.depth(topology.UPDATES) == 4
    queue.acknowledge(lease(queue))
    publish(queue, "1")  # after the acknowledgement it is a new message
    assert queue.depth(topology.UPDATES) == 4


def test_a_full_queue_of_work_refuses_and_of_hints_drops(path: Path) -> None:
    spec = topology.QueueSpec(name="work", exchange="x", keys=("#",), max_length=1)
    hints = topology.QueueSpec(name="hints", exchange="y", keys=("#",), max_length=2, drop_head=True)
    queue = LeaseQueue(path, [spec, hints])
    queue.publish("x", update("1"))
    with pytest.raises(BrokerUnavailable, match="full"):
        queue.publish("x", update("2"))
    for number in range(4):
        queue.publish("y", update(str(number)))
    assert [d.message_id for d in queue.take("work", 9)] == ["1"]
    assert [d.message_id for d in queue.take("hints", 9)] == ["2", "3"]
    queue.close()


# --- the consumer ----------------------------------------------------------------------------------------------


def test_slow_work_is_not_given_to_a_second_consumer(path: Path) -> None:
    """The handler works several times longer than its lease, beside a second consumer that waits for it."""
    slow, second = SqliteBroker(path, lease_s=0.2), SqliteBroker(path, lease_s=0.2)
    slow.publish(topology.UPDATES_EXCHANGE, update())
    started, done = threading.Event(), threading.Event()
    doubled: list[Delivery] = []

    def work(delivery: Delivery) -> None:
        started.set()
        time.sleep(1.0)
        done.set()

    worker = threading.Thread(target=slow.consume, args=([topology.UPDATES], work, done.is_set))
    worker.start()
    assert started.wait(10)
    second.consume([topology.UPDATES], doubled.append, done.is_set)
    worker.join()
    assert doubled == []
    assert second.drain(topology.UPDATES) == []
    slow.close()
    second.close()


_COMPETE = """
import sys
from broker import topology
from broker.sqlite import SqliteBroker
path, count = sys.argv[1], int(sys.argv[2])
broker = SqliteBroker(path)
def done():  # the file knows when every message is acknowledged
    return broker._file().depth(topology.UPDATES) == 0
broker.consume([topology.UPDATES], lambda d: print(d.message_id, d.attempts, flush=True), done)
"""


def test_two_processes_share_a_queue_and_each_message_goes_to_one(path: Path) -> None:
    count = 60
    broker = SqliteBroker(path)
    for number in range(count):
        broker.publish(topology.UPDATES_EXCHANGE, update(str(number)))
    broker.close()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _COMPETE, str(path), str(count)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    lines = [line for process in processes for line in process.communicate(timeout=60)[0].splitlines()]
    assert sorted(lines) == sorted(f"{number} 1" for number in range(count))


_PUBLISH_FOR_EVER = """
import itertools, sys
from broker import topology
from broker.sqlite import SqliteBroker
from federation.wire import Message
broker = SqliteBroker(sys.argv[1])
for number in itertools.count():
    broker.publish(topology.UPDATES_EXCHANGE, Message(
        routing_key="updates.site-a", body=bytes(2000), type="t", message_id=str(number)))
    print(number, flush=True)
"""


def test_kill_9_of_a_publisher_loses_nothing_that_publish_returned_from(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PUBLISH_FOR_EVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        confirmed = [process.stdout.readline().strip() for _ in range(40)]
        process.kill()
        confirmed += process.stdout.read().split()
    queue = LeaseQueue(path, topology.queues())
    got = [d.message_id for d in queue.take(topology.UPDATES, 10**6)]
    assert got[: len(confirmed)] == confirmed
    assert len(got) <= len(confirmed) + 1  # one may have been stored and not yet reported
    queue.close()


# --- the file --------------------------------------------------------------------------------------------------


def test_declare_changes_limits_and_keeps_messages(path: Path) -> None:
    broker = SqliteBroker(path, delivery_limit=3)
    broker.publish(topology.UPDATES_EXCHANGE, update())
    changed = SqliteBroker(path, delivery_limit=1)
    changed.declare(["site-a"])
    changed.declare(["site-a"])
    with sqlite3.connect(path) as db:
        (limit,) = db.execute("SELECT delivery_limit FROM queues WHERE name = 'fed.updates'").fetchone()
    db.close()
    assert limit == 1
    assert len(changed.drain(topology.UPDATES)) == 1
    changed.publish(topology.CONTROL_EXCHANGE, update(key="site-a.outcome"))
    changed.close()
    broker.close()


def test_what_survives_a_power_cut_is_asked_of_the_disk(queue: LeaseQueue) -> None:
    with queue._db.reading():
        assert queue._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert queue._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_queue(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("this is not a database at all, and long enough to look like a page of one" * 20)
    with pytest.raises(Fatal, match="move it away"):
        SqliteBroker(text).drain(topology.UPDATES)


def test_a_file_of_another_schema(tmp_path: Path) -> None:
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Fatal, match="schema 99"):
        SqliteBroker(newer).drain(topology.UPDATES)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AccessDenied):
        SqliteBroker(tmp_path / "file" / "queue.db").drain(topology.UPDATES)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(AccessDenied):
        SqliteBroker(tmp_path / "folder.db").drain(topology.UPDATES)


def test_a_site_that_connects_can_be_told_things_though_nobody_has_enrolled_it(tmp_path: Path) -> None:
    """With one file and no accounts there is no `fedqueue server init --site` that one would think of."""
    url = SecretStr(f"sqlite:{tmp_path / 'queue.db'}")
    site, server = (
        connect(Settings(site="site-a", broker_url=url)),
        connect(Settings(broker_url=url), server=True),
    )
    hint = encode_control(JobAnnounced(job="toy"), "site-a")
    with pytest.raises(BadMessage):
        server.publish(topology.CONTROL_EXCHANGE, hint)
    assert site.drain(topology.control_queue("site-a")) == []
    server.publish(topology.CONTROL_EXCHANGE, hint)
    assert [decode_control(found) for found in site.drain(topology.control_queue("site-a"))] == [
        JobAnnounced(job="toy")
    ]
    site.close()
    server.close()
