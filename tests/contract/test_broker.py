"""What broker/port.py promises, over a real RabbitMQ node and over the embedded queue, bare and wrapped."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker import topology
from broker.faulty import FaultyBroker
from broker.open import connect
from broker.port import Broker
from broker.rabbitmq import RabbitBroker
from broker.sqlite import SqliteBroker
from federation.errors import BadMessage, Transient
from federation.faults import Scripted
from federation.settings import Settings
from federation.wire import Delivery, Message

ROOT = Path(__file__).parents[2]
SITES = ("site-a", "site-b")
LIMIT = 3
LEASE_S = 1.5
PATIENCE_S = 30.0  # how long a test waits before it fails; no test needs it
QUICK = (0.01, 0.02)


@dataclass
class World:
    """One broker, empty, with two sites enrolled and a delivery limit of LIMIT."""

    url: str
    wrapped: bool = False
    opened: list[Broker] = field(default_factory=list)

    def open(self) -> Broker:
        broker: Broker
        if self.url.startswith("sqlite:"):
            broker = SqliteBroker(
                self.url[7:], lease_s=LEASE_S, delivery_limit=LIMIT, requeue_backoff_s=QUICK
            )
        else:
            broker = RabbitBroker(self.url, keep_open=True, requeue_backoff_s=QUICK)
        if self.wrapped:
            broker = FaultyBroker(broker, Scripted())
        self.opened.append(broker)
        return broker

    def spawn(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Run `code` in a process of its own; it finds `broker`, `topology`, `Message` and `arguments`."""
        return subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + code, self.url, str(LEASE_S), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )


_PRELUDE = """
import sys
from broker import topology
from broker.open import connect
from federation.settings import Settings
from federation.wire import Message
broker = connect(Settings(broker_url=sys.argv[1], lease_s=float(sys.argv[2])), keep_open=True)
arguments = sys.argv[3:]
"""


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq), "faulty sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "rabbitmq":
        server = request.getfixturevalue("rabbitmq_server")
        server.reset(LIMIT, SITES)
        made = World(server.url)
    else:
        made = World(f"sqlite:{tmp_path}/queue.db", wrapped=request.param.startswith("faulty"))
        with closing(SqliteBroker(made.url[7:], delivery_limit=LIMIT)) as operator:
            operator.declare(SITES)
    yield made
    for broker in made.opened:
        broker.close()
        broker.close()  # safe to call twice


@pytest.fixture
def broker(world: World) -> Broker:
    return world.open()


def update(number: int) -> Message:
    return Message(
        routing_key="updates.site-a", body=f"body {number}".encode(), type="t.v1", message_id=f"id-{number}"
    )


def collect(
    broker: Broker,
    queues: Sequence[str],
    count: int,
    handle: Callable[[Delivery], None] = lambda delivery: None,
) -> list[Delivery]:
    """Consume until `count` deliveries were handed over."""
    seen: list[Delivery] = []
    give_up = time.monotonic() + PATIENCE_S

    def handler(delivery: Delivery) -> None:
        seen.append(delivery)
        handle(delivery)

    broker.consume(queues, handler, lambda: len(seen) >= count or time.monotonic() > give_up)
    assert len(seen) == count
    return seen


def test_a_message_arrives_whole_and_in_order_and_once(broker: Broker) -> None:
    for number in range(5):
        broker.publish(topology.UPDATES_EXCHANGE, update(number))
    full = Message(
        routing_key="updates.site-b",
        body=b"\x00\xff",
        type="other",
        content_type="text/plain",
        message_id="m",
        headers={
            "text": "ü",
            "number": 7,
            "yes": True,
            "list": [1, "a"],
            "table": {"k": None},
            "raw": b"\xff",
        },
    )
    broker.publish(topology.UPDATES_EXCHANGE, full)
    got = collect(broker, [topology.UPDATES], 6)
    assert [d.message_id for d in got] == [*(f"id-{n}" for n in range(5)), "m"]
    assert got[0] == Delivery(
        queue=topology.UPDATES,
        routing_key="updates.site-a",
        body=b"body 0",
        type="t.v1",
        content_type="application/json",
        message_id="id-0",
    )
    assert got[5].headers == full.headers | {"raw": "\\xff"}
    assert (got[5].body, got[5].content_type, got[5].type) == (full.body, full.content_type, full.type)
    assert broker.drain(topology.UPDATES) == []  # all were acknowledged


def test_transient_gives_it_back_with_attempts_rising(broker: Broker) -> None:
    broker.publish(topology.UPDATES_EXCHANGE, update(1))
    broker.publish(topology.UPDATES_EXCHANGE, update(2))

    def handle(delivery: Delivery) -> None:
        if delivery.message_id == "id-1" and delivery.attempts < 3:
            raise Transient("the store is down")

    got = collect(broker, [topology.UPDATES], 4, handle)
    assert [d.attempts for d in got if d.message_id == "id-1"] == [1, 2, 3]
    assert [d.attempts for d in got if d.message_id == "id-2"] == [1]
    assert broker.drain(topology.UPDATES) == []


def test_after_the_delivery_limit_it_is_a_dead_letter(broker: Broker) -> None:
    broker.publish(topology.UPDATES_EXCHANGE, update(1))

    def handle(delivery: Delivery) -> None:
        raise Transient("never works")

    # the limit counts returns: so many, and the first delivery
    got = collect(broker, [topology.UPDATES], LIMIT + 1, handle)
    assert [d.attempts for d in got] == list(range(1, LIMIT + 2))
    (dead,) = collect(broker, [topology.DEAD], 1)
    assert (dead.body, dead.routing_key, dead.message_id) == (b"body 1", "updates.site-a", "id-1")
    assert dead.headers[topology.DEATH_REASON] == "delivery_limit"
    assert dead.headers[topology.DEATH_QUEUE] == topology.UPDATES
    assert broker.drain(topology.UPDATES) == []


@pytest.mark.parametrize(
    ("exchange", "key"),
    [
        (topology.UPDATES_EXCHANGE, "elsewhere.site-a"),
        (topology.UPDATES_EXCHANGE, "updates.site.a"),
        (topology.CONTROL_EXCHANGE, "site-c.outcome"),
    ],
)
def test_unroutable(broker: Broker, exchange: str, key: str) -> None:
    with pytest.raises(BadMessage) as caught:
        broker.publish(exchange, Message(routing_key=key, body=b"", type="t"))
    assert caught.value.reason == "unroutable"


def test_a_crashing_handler_gives_it_back_and_ends_consume(world: World) -> None:
    broker = world.open()
    broker.publish(topology.UPDATES_EXCHANGE, update(1))

    def crash(delivery: Delivery) -> None:
        raise OSError("a bug, or a full disk: not the broker's connection")

    with pytest.raises(OSError, match="a bug"):
        collect(broker, [topology.UPDATES], 1, crash)
    (again,) = collect(world.open(), [topology.UPDATES], 1)
    assert (again.message_id, again.attempts) == ("id-1", 2)


def test_kill_9_in_the_middle_of_a_message_redelivers_it(world: World) -> None:
    broker = world.open()
    broker.publish(topology.UPDATES_EXCHANGE, update(1))
    consumer = world.spawn(
        "import time\n"
        "def handle(delivery):\n"
        "    print(delivery.message_id, flush=True)\n"
        "    time.sleep(600)\n"
        "broker.consume([topology.UPDATES], handle, lambda: False)\n"
    )
    with consumer:
        assert consumer.stdout is not None
        assert consumer.stdout.readline() == "id-1\n"
        consumer.kill()
    (again,) = collect(broker, [topology.UPDATES], 1)
    assert (again.message_id, again.attempts) == ("id-1", 2)


def test_messages_expire_after_their_time(broker: Broker) -> None:
    soon = Message(routing_key="heartbeats.site-a", body=b"old", type="t", persistent=False, ttl_s=0.1)
    later = Message(routing_key="heartbeats.site-a", body=b"new", type="t", persistent=False, ttl_s=60)
    broker.publish(topology.UPDATES_EXCHANGE, soon)
    broker.publish(topology.UPDATES_EXCHANGE, later)
    time.sleep(0.3)
    assert [d.body for d in broker.drain(topology.HEARTBEATS)] == [b"new"]
    assert broker.drain(topology.DEAD) == []


def test_a_full_control_queue_drops_the_oldest(broker: Broker) -> None:
    for number in range(topology.CONTROL_MAX_LENGTH + 3):
        broker.publish(
            topology.CONTROL_EXCHANGE,
            Message(routing_key="site-a.outcome", body=b"%d" % number, type="t", persistent=False),
        )
    got = broker.drain(topology.control_queue("site-a"), limit=1000)
    assert [d.body for d in got] == [b"%d" % n for n in range(3, topology.CONTROL_MAX_LENGTH + 3)]


def test_control_reaches_all_sites_or_one(broker: Broker) -> None:
    for key in ("all.new-version", "site-a.outcome", "site-b.outcome"):
        broker.publish(topology.CONTROL_EXCHANGE, Message(routing_key=key, body=b"", type="t"))
    for site in SITES:
        got = broker.drain(topology.control_queue(site))
        assert [d.routing_key for d in got] == ["all.new-version", f"{site}.outcome"]


def test_drain_takes_at_most_its_limit_and_for_good(broker: Broker) -> None:
    for number in range(5):
        broker.publish(topology.UPDATES_EXCHANGE, update(number))
    assert [d.message_id for d in broker.drain(topology.UPDATES, limit=3)] == ["id-0", "id-1", "id-2"]
    assert [d.message_id for d in broker.drain(topology.UPDATES, limit=3)] == ["id-3", "id-4"]
    assert broker.drain(topology.UPDATES) == []
    assert broker.drain(topology.control_queue("never-enrolled")) == []


def test_several_processes_publish_at_once(world: World) -> None:
    code = (
        "for number in range(25):\n"
        "    broker.publish(topology.UPDATES_EXCHANGE, Message(routing_key='updates.site-a',\n"
        "        body=b'', type='t', message_id=f'{arguments[0]}-{number}'))\n"
    )
    publishers = [world.spawn(code, name) for name in "wxyz"]
    for publisher in publishers:
        with publisher:
            assert publisher.wait(timeout=PATIENCE_S) == 0
    got = collect(world.open(), [topology.UPDATES], 100)
    assert sorted(d.message_id or "" for d in got) == sorted(f"{p}-{n}" for p in "wxyz" for n in range(25))
    for name in "wxyz":  # each publisher's own order is kept
        assert [d.message_id for d in got if (d.message_id or "")[0] == name] == [
            f"{name}-{n}" for n in range(25)
        ]


def test_stop_is_asked_while_nothing_arrives(broker: Broker) -> None:
    asked = iter([False] * 5)
    broker.consume([topology.UPDATES, topology.DEAD], lambda d: None, lambda: next(asked, True))
    assert next(asked, None) is None


def test_stop_during_the_pause_before_a_return_keeps_the_message(world: World) -> None:
    patient: Broker
    if world.url.startswith("sqlite:"):
        patient = SqliteBroker(world.url[7:], requeue_backoff_s=(1000.0, 1000.0))
    else:
        patient = RabbitBroker(world.url, requeue_backoff_s=(1000.0, 1000.0))
    world.opened.append(patient)
    patient.publish(topology.UPDATES_EXCHANGE, update(1))

    def handle(delivery: Delivery) -> None:
        raise Transient("down")

    collect(patient, [topology.UPDATES], 1, handle)
    assert [d.attempts for d in collect(world.open(), [topology.UPDATES], 1)] == [2]


def test_a_handler_may_publish_with_the_same_broker(broker: Broker) -> None:
    broker.publish(topology.UPDATES_EXCHANGE, update(1))

    def forward(delivery: Delivery) -> None:
        if delivery.queue == topology.UPDATES:
            broker.publish(
                topology.TASKS_EXCHANGE, Message(routing_key="merge.accept", body=delivery.body, type="t")
            )

    got = collect(broker, [topology.UPDATES, topology.MERGE], 2, forward)
    assert [(d.queue, d.body) for d in got] == [(topology.UPDATES, b"body 1"), (topology.MERGE, b"body 1")]


def test_a_closed_broker_opens_again(broker: Broker) -> None:
    broker.publish(topology.UPDATES_EXCHANGE, update(1))
    broker.close()
    broker.publish(topology.UPDATES_EXCHANGE, update(2))
    assert len(collect(broker, [topology.UPDATES], 2)) == 2


def test_connect_reads_the_settings(world: World) -> None:
    broker = connect(Settings(broker_url=world.url))  # type: ignore[arg-type]
    world.opened.append(broker)
    broker.publish(topology.UPDATES_EXCHANGE, update(1))
    assert len(broker.drain(topology.UPDATES)) == 1
