"""What the accounts of broker/accounts.py may do and may not, asked of a real RabbitMQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest

from broker import topology
from broker.accounts import definitions
from broker.open import declare
from broker.rabbitmq import RabbitBroker
from federation.errors import AccessDenied
from federation.settings import Settings
from federation.wire import Message
from tests.servers.rabbitmq import RabbitMQ

pytestmark = pytest.mark.rabbitmq


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


@pytest.fixture(scope="module")
def server(rabbitmq_server: RabbitMQ) -> RabbitMQ:
    """With accounts made by importing definitions: site-a, site-b, server."""
    rabbitmq_server.reset(vhost="permissions")
    rabbitmq_server.import_definitions(
        definitions({"site-a": "pä ss", "site-b": "other"}, {"server": "third"})
    )
    return rabbitmq_server


@pytest.fixture
def site_a(server: RabbitMQ) -> str:
    """The URL of its account. Percent-encoded UTF-8, as a password may be anything."""
    return server.url_of("site-a", "p%C3%A4%20ss")


@pytest.fixture
def client(server: RabbitMQ) -> Iterator[RabbitBroker]:
    with opened_as(server.url) as opened:
        yield opened


def test_a_site_may_do_its_work(site_a: str, client: RabbitBroker) -> None:
    with opened_as(site_a) as site:
        site.publish(topology.UPDATES_EXCHANGE, update("u", user_id="site-a"))
        site.publish(
            topology.UPDATES_EXCHANGE, update("h", user_id="site-a", routing_key="heartbeats.site-a")
        )
        site.publish(topology.UPDATES_EXCHANGE, update("r", user_id="site-a", routing_key="reports.site-a"))
        got = [(d.user_id, d.routing_key) for d in client.drain(topology.UPDATES)]
        assert got == [("site-a", "updates.site-a"), ("site-a", "reports.site-a")]
        client.publish(topology.CONTROL_EXCHANGE, update("c", routing_key="all.new-version"))
        assert [d.message_id for d in site.drain(topology.control_queue("site-a"))] == ["c"]


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (topology.UPDATES_EXCHANGE, update(routing_key="updates.site-b")),
        (topology.UPDATES_EXCHANGE, update(routing_key="heartbeats.site-b")),
        (topology.UPDATES_EXCHANGE, update(routing_key="reports.site-b")),
        (topology.UPDATES_EXCHANGE, update(routing_key="updates.site-ab")),
        (topology.UPDATES_EXCHANGE, update(user_id="site-b")),
        ("", update(routing_key=topology.UPDATES)),
        (topology.TASKS_EXCHANGE, update(routing_key="merge.accept")),
        (topology.CONTROL_EXCHANGE, update(routing_key="all.stop")),
        (topology.DEAD_EXCHANGE, update()),
    ],
)
def test_a_site_may_not_publish(site_a: str, exchange: str, message: Message) -> None:
    with opened_as(site_a) as site, pytest.raises(AccessDenied):
        site.publish(exchange, message)


FORBIDDEN: list[Callable[[Any], object]] = [
    lambda channel: channel.basic_get(topology.UPDATES),
    lambda channel: channel.basic_get(topology.control_queue("site-b")),
    lambda channel: channel.basic_consume(topology.UPDATES, lambda *_: None),
    lambda channel: channel.queue_purge(topology.UPDATES),
    lambda channel: channel.queue_delete(topology.UPDATES),
    lambda channel: channel.queue_delete(topology.control_queue("site-a")),
    lambda channel: channel.queue_declare("mine"),
    lambda channel: channel.queue_declare("", exclusive=True),
    lambda channel: channel.exchange_declare("mine"),
    lambda channel: channel.exchange_delete(topology.UPDATES_EXCHANGE),
    lambda channel: channel.queue_bind(
        topology.control_queue("site-a"), topology.UPDATES_EXCHANGE, "updates.*"
    ),
    lambda channel: channel.queue_bind(topology.control_queue("site-a"), topology.CONTROL_EXCHANGE, "#"),
    lambda channel: channel.exchange_bind(topology.UPDATES_EXCHANGE, topology.CONTROL_EXCHANGE, "#"),
]


def test_a_site_may_not_reach_what_is_not_its_own(site_a: str) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(site_a))
    try:
        for forbidden in FORBIDDEN:
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
                forbidden(connection.channel())
    finally:
        connection.close()
    with opened_as(site_a) as site:
        with pytest.raises(AccessDenied):
            site.drain(topology.UPDATES)
        with pytest.raises(AccessDenied):
            site.consume([topology.UPDATES], lambda d: None, lambda: False)
    with pytest.raises(AccessDenied, match="only the server's account"):
        declare(Settings(broker_url=site_a))  # type: ignore[arg-type]


def test_the_server_account_may_declare(server: RabbitMQ) -> None:
    declare(Settings(broker_url=server.url_of("server", "third")), ["site-a"])  # type: ignore[arg-type]


def test_a_copied_key_does_not_pass_for_another_site(site_a: str, client: RabbitBroker) -> None:
    """RabbitMQ before 4.0.5 routes CC headers past topic permissions; the delivery still names the sender."""
    with opened_as(site_a) as site:
        site.publish(
            topology.UPDATES_EXCHANGE,
            update(routing_key="heartbeats.site-a", headers={"CC": ["updates.site-b", "heartbeats.site-b"]}),
        )
    for queue in (topology.UPDATES, topology.HEARTBEATS):
        assert {d.routing_key for d in client.drain(queue)} <= {"heartbeats.site-a"}
