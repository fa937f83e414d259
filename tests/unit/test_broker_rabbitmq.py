"""What only RabbitMQ can do: restart under us, refuse by permission, and carry hostile headers."""

from __future__ import annotations

import logging
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest

import broker.connection
import broker.rabbitmq
from broker import topology
from broker.connection import UNDECODABLE
from broker.open import connect, declare
from broker.rabbitmq import RabbitBroker
from federation.errors import AccessDenied, BadMessage, BadSettings, BrokerUnavailable, Fatal
from federation.settings import Settings
from federation.wire import Delivery, Message
from tests.servers import free_port
from tests.servers.rabbitmq import MAX_MESSAGE_BYTES, RabbitMQ

pytestmark = pytest.mark.rabbitmq

PATIENCE_S = 60.0


@pytest.fixture
def server(rabbitmq_server: RabbitMQ) -> RabbitMQ:
    rabbitmq_server.reset(sites=["site-a", "site-b"])
    return rabbitmq_server


@pytest.fixture
def client(server: RabbitMQ) -> Iterator[RabbitBroker]:
    opened = RabbitBroker(server.url, keep_open=True, requeue_backoff_s=(0.01, 0.02))
    yield opened
    opened.close()


@contextmanager
def opened_as(url: str) -> Iterator[RabbitBroker]:
    opened = RabbitBroker(url, keep_open=True)
    try:
        yield opened
    finally:
        opened.close()


def update(message_id: str = "id", **changes: Any) -> Message:
    fields: dict[str, Any] = {
        "routing_key": "updates.site-a",
        "body": b"{}",
        "type": "t",
        "message_id": message_id,
    }
    return Message(**(fields | changes))


def collect(opened: RabbitBroker, queue: str, count: int) -> list[Delivery]:
    seen: list[Delivery] = []
    give_up = time.monotonic() + PATIENCE_S
    opened.consume([queue], seen.append, lambda: len(seen) >= count or time.monotonic() > give_up)
    assert len(seen) >= count
    return seen


# --- outages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_restart_during_publish_and_consume_loses_nothing(
    server: RabbitMQ, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedqueue.broker")
    count = 120
    seen: list[str] = []
    some_went_through = threading.Event()
    give_up = time.monotonic() + PATIENCE_S

    def publish_all() -> None:
        publisher = RabbitBroker(server.url, keep_open=True)
        for number in range(count):
            while time.monotonic() < give_up:
                try:
                    publisher.publish(topology.UPDATES_EXCHANGE, update(str(number)))
                    break
                except BrokerUnavailable:
                    time.sleep(0.1)
            if number == count // 2:
                some_went_through.set()
                back.wait(PATIENCE_S)  # half of them meet the restarted broker on a dead connection
        publisher.close()

    def consume_all() -> None:
        consumer = RabbitBroker(server.url)
        consumer.consume(
            [topology.UPDATES],
            lambda d: seen.append(d.message_id or ""),
            lambda: len(set(seen)) == count or time.monotonic() > give_up,
        )

    back = threading.Event()
    threads = [threading.Thread(target=publish_all), threading.Thread(target=consume_all)]
    for thread in threads:
        thread.start()
    assert some_went_through.wait(PATIENCE_S)
    getattr(server, how)()
    server.start()
    back.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert set(seen) == {str(number) for number in range(count)}
    messages = [record.getMessage() for record in caplog.records]
    assert len([m for m in messages if m.startswith("waiting for the broker")]) == 1
    assert len([m for m in messages if "is back after" in m]) == 1


def test_a_kept_connection_that_died_is_replaced(server: RabbitMQ, client: RabbitBroker) -> None:
    client.publish(topology.UPDATES_EXCHANGE, update("1"))
    server.ctl("close_all_connections", "test")
    client.publish(topology.UPDATES_EXCHANGE, update("2"))
    assert [d.message_id for d in client.drain(topology.UPDATES)] == ["1", "2"]


def test_a_deleted_queue_is_waited_for(server: RabbitMQ, client: RabbitBroker) -> None:
    spec = topology.QueueSpec(name="fed.test.gone", exchange=topology.TASKS_EXCHANGE, keys=("gone.#",))
    seen: list[Delivery] = []
    first = threading.Event()

    def handle(delivery: Delivery) -> None:
        seen.append(delivery)
        first.set()

    give_up = time.monotonic() + PATIENCE_S
    with server.connect() as connection:
        channel = connection.channel()
        topology.declare_queues(channel, [spec])
        thread = threading.Thread(
            target=RabbitBroker(server.url).consume,
            args=([spec.name], handle, lambda: len(seen) == 2 or time.monotonic() > give_up),
        )
        thread.start()
        client.publish(topology.TASKS_EXCHANGE, update("1", routing_key="gone.x"))
        assert first.wait(PATIENCE_S)
        channel.queue_delete(spec.name)  # the broker cancels the consumer
        topology.declare_queues(channel, [spec])
        client.publish(topology.TASKS_EXCHANGE, update("2", routing_key="gone.x"))
        thread.join(PATIENCE_S)
        channel.queue_delete(spec.name)
    assert [d.message_id for d in seen] == ["1", "2"]


def test_the_server_declares_what_a_wiped_broker_lost(server: RabbitMQ) -> None:
    with server.connect() as connection:
        connection.channel().exchange_delete(topology.UPDATES_EXCHANGE)
    settings = Settings(broker_url=server.url)  # type: ignore[arg-type]
    site = connect(settings)
    with pytest.raises(BrokerUnavailable, match="fedqueue server init"):
        site.publish(topology.UPDATES_EXCHANGE, update())
    connect(settings, server=True).publish(topology.UPDATES_EXCHANGE, update("mine"))
    site.publish(topology.UPDATES_EXCHANGE, update("site's"))
    assert [d.message_id for d in site.drain(topology.UPDATES)] == ["mine", "site's"]


def test_nobody_listens() -> None:
    url = f"amqp://user:secret@127.0.0.1:{free_port()}/"
    opened = RabbitBroker(url)
    for attempt in (
        lambda: opened.publish(topology.UPDATES_EXCHANGE, update()),
        lambda: opened.drain(topology.UPDATES),
    ):
        with pytest.raises(BrokerUnavailable) as caught:
            attempt()
        assert "secret" not in str(caught.value)
        assert "127.0.0.1" in str(caught.value)


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker.connection, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        opened = RabbitBroker(f"amqp://u:p@127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(BrokerUnavailable):
            opened.publish(topology.UPDATES_EXCHANGE, update())


@pytest.mark.timeout(60)
def test_a_confirm_that_never_comes_is_given_up(server: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker.connection, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(broker.rabbitmq, "CONFIRM_TIMEOUT_S", 0.3)
    monkeypatch.setattr(broker.rabbitmq, "PUBLISH_HEARTBEAT_S", 0)  # else heartbeats end the wait too
    opened = RabbitBroker(server.url, keep_open=True)
    opened.publish(topology.UPDATES_EXCHANGE, update())
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(BrokerUnavailable):
            opened.publish(topology.UPDATES_EXCHANGE, update())
    finally:
        server.signal(signal.SIGCONT)


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_full_queue_is_broker_unavailable(server: RabbitMQ, client: RabbitBroker) -> None:
    spec = topology.QueueSpec(
        name="fed.test.full", exchange=topology.TASKS_EXCHANGE, keys=("full.#",), max_length=1
    )
    with server.connect() as connection:
        channel = connection.channel()
        topology.declare_queues(channel, [spec])
        client.publish(topology.TASKS_EXCHANGE, update("1", routing_key="full.x"))
        with pytest.raises(BrokerUnavailable, match="full"):
            client.publish(topology.TASKS_EXCHANGE, update("2", routing_key="full.x"))
        assert [d.message_id for d in client.drain(spec.name)] == ["1"]
        client.publish(topology.TASKS_EXCHANGE, update("3", routing_key="full.x"))
        channel.queue_delete(spec.name)


def test_a_message_too_large_for_the_broker(client: RabbitBroker) -> None:
    with pytest.raises(BadMessage) as caught:
        client.publish(topology.UPDATES_EXCHANGE, update(body=bytes(MAX_MESSAGE_BYTES + 1)))
    assert caught.value.reason == "too-large"


@pytest.mark.parametrize("changes", [{"headers": {"x": object()}}, {"message_id": "x" * 256}])
def test_a_message_that_amqp_cannot_carry(client: RabbitBroker, changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessage) as caught:
        client.publish(topology.UPDATES_EXCHANGE, update(**changes))
    assert caught.value.reason == "unencodable"


def test_wrong_password_and_wrong_vhost(server: RabbitMQ) -> None:
    for url in (server.url_of("admin", "wrong"), server.url.removesuffix("%2F") + "elsewhere"):
        opened = RabbitBroker(url)
        with pytest.raises(AccessDenied):
            opened.publish(topology.UPDATES_EXCHANGE, update())
        with pytest.raises(AccessDenied):
            opened.drain(topology.UPDATES)
        with pytest.raises(AccessDenied):
            opened.consume([topology.UPDATES], lambda d: None, lambda: False)
        with pytest.raises(AccessDenied):
            declare(Settings(broker_url=url))  # type: ignore[arg-type]


def test_a_url_that_is_none_keeps_its_password_to_itself() -> None:
    with pytest.raises(BadSettings) as caught:
        RabbitBroker("amqp://user:secret@host:port/")
    assert "secret" not in str(caught.value)


def test_declare_again_changes_nothing_and_other_properties_are_fatal(server: RabbitMQ) -> None:
    settings = Settings(broker_url=server.url)  # type: ignore[arg-type]
    with opened_as(server.url) as opened:
        opened.publish(topology.UPDATES_EXCHANGE, update())
        declare(settings, ["site-a", "site-c"])
        declare(settings, ["site-a", "site-c"])
        assert len(opened.drain(topology.UPDATES)) == 1
    with pytest.raises(Fatal, match=r"rabbitmqctl delete_queue fed\.updates"):
        declare(settings.model_copy(update={"delivery_limit": 7}))


# --- hostile properties ------------------------------------------------------------------------------------------


class RawProperties(pika.BasicProperties):  # type: ignore[misc]  # pika carries no types
    """Headers that pika would not encode: the bytes of the header table as they are."""

    def __init__(self, table: bytes) -> None:
        super().__init__()
        self.table = table

    def encode(self) -> list[bytes]:
        return [struct.pack(">HI", self.FLAG_HEADERS, len(self.table)), self.table]


def nested(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"A" + struct.pack(">I", len(value)) + value
    return b"\x01k" + value


HOSTILE = {
    "key that is not UTF-8": b"\x02\xff\xfeV",
    "text that is not UTF-8": b"\x01kS\x00\x00\x00\x02\xff\xfe",
    "timestamp beyond every calendar": b"\x01kT\xff\xff\xff\xff\xff\xff\xff\xff",
    "arrays in arrays": nested(5000),
    "decimal of 255 digits": b"\x01kD\xff\x7f\xff\xff\xff",
    "bytes": b"\x01kx\x00\x00\x00\x01\xff",
    "forged delivery count": b"\x10x-delivery-countl" + struct.pack(">q", 99),
    "delivery count that is a table": b"\x10x-delivery-countF\x00\x00\x00\x00",
}


def test_hostile_headers_do_not_stop_a_consumer(server: RabbitMQ, client: RabbitBroker) -> None:
    connection = server.connect()
    channel = connection.channel()
    channel.confirm_delivery()
    for name, table in HOSTILE.items():
        channel.basic_publish(
            topology.UPDATES_EXCHANGE, "updates.site-a", name.encode(), RawProperties(table), mandatory=True
        )
    connection.close()
    client.publish(topology.UPDATES_EXCHANGE, update("good", body=b"good"))
    got = {d.body.decode(): d for d in collect(client, topology.UPDATES, len(HOSTILE) + 1)}
    assert set(got) == {*HOSTILE, "good"}
    assert [d.attempts for d in got.values()] == [1] * len(got)  # none cost the connection
    assert all(d.routing_key == "updates.site-a" for d in got.values())
    assert got["timestamp beyond every calendar"].headers.keys() == {UNDECODABLE}
    assert got["arrays in arrays"].headers.keys() == {UNDECODABLE}
    assert got["key that is not UTF-8"].headers == {"\\xff\\xfe": None}
    assert got["text that is not UTF-8"].headers == {"k": "\\xff\\xfe"}
    assert got["bytes"].headers == {"k": "\\xff"}


def test_hostile_headers_can_be_drained(server: RabbitMQ, client: RabbitBroker) -> None:
    connection = server.connect()
    connection.channel().basic_publish(
        topology.CONTROL_EXCHANGE, "all.x", b"", RawProperties(HOSTILE["arrays in arrays"])
    )
    connection.close()
    (got,) = client.drain(topology.control_queue("site-a"))
    assert got.headers.keys() == {UNDECODABLE}
