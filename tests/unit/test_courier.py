"""Upload, publish, forget, in this order; and what happens when the server never says a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from broker import topology
from broker.port import Handler
from broker.sqlite import SqliteBroker
from federation.errors import BadMessage, BrokerUnavailable, StoreUnavailable
from federation.types import ClientUpdate
from federation.wire import Delivery, Message, decode_update
from producers.delivery import REPUBLISH_AFTER_S, REPUBLISH_TIMES, Courier
from producers.outbox import Outbox
from storage.memory import MemoryStore
from tests.factories import client_update


class FailingStore(MemoryStore):
    """Refuses writes while `down`."""

    down = False

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        if self.down:
            raise StoreUnavailable("no store")
        return super().put_if_absent(key, data)


class Unset:
    """A RabbitMQ on which nobody has declared the queues."""

    def publish(self, exchange: str, message: Message) -> None:
        raise BadMessage("no queue is bound for it", "unroutable")

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        raise AssertionError("a courier reads nothing")

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        return []

    def close(self) -> None:
        pass


class World:
    """A courier with its outbox, store, broker and clock."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.store = FailingStore()
        self.broker = SqliteBroker(str(folder / "queue.db"), lease_s=60, delivery_limit=20)
        self.outbox = Outbox(folder / "outbox")
        self.courier = Courier(self.outbox, self.store, self.broker, clock=lambda: self.now)

    def arrived(self) -> list[ClientUpdate]:
        return [decode_update(delivery) for delivery in self.broker.drain(topology.UPDATES)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.broker.declare(())
    yield made
    made.broker.close()


def test_the_payload_is_there_before_the_message(world: World) -> None:
    update = client_update(b"tensors")
    world.outbox.put(update, b"tensors")
    world.courier.deliver()
    assert world.arrived() == [update]
    assert world.store.get(update.payload_key, max_bytes=100) == b"tensors"
    assert list(world.outbox.waiting()) == []
    assert world.outbox.sent() == [update]


def test_without_the_store_nothing_is_published_and_nothing_forgotten(world: World) -> None:
    update = client_update(b"tensors")
    world.outbox.put(update, b"tensors")
    world.store.down = True
    with pytest.raises(StoreUnavailable):
        world.courier.deliver()
    assert world.arrived() == []
    world.store.down = False
    world.courier.deliver()
    assert world.arrived() == [update]


def test_a_broker_without_queues_is_an_outage_that_says_what_to_do(world: World) -> None:
    update = client_update(b"tensors")
    world.outbox.put(update, b"tensors")
    world.courier.broker = Unset()
    with pytest.raises(BrokerUnavailable, match="fedqueue server init"):
        world.courier.deliver()
    world.courier.broker = world.broker
    world.courier.deliver()
    assert world.arrived() == [update]


def test_silence_is_answered_by_the_same_message_and_in_the_end_by_going_on(world: World) -> None:
    update = client_update(b"tensors")
    world.outbox.put(update, b"tensors")
    world.courier.deliver()
    world.arrived()
    world.now += REPUBLISH_AFTER_S - 1
    world.courier.republish()
    assert world.arrived() == []
    for _ in range(REPUBLISH_TIMES):
        world.now += REPUBLISH_AFTER_S + 1
        world.courier.republish()
        assert world.arrived() == [update]
        assert world.outbox.sent() == [update]
    world.now += REPUBLISH_AFTER_S + 1
    world.courier.republish()
    assert world.arrived() == []
    assert world.outbox.sent() == []
