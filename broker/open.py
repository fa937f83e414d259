"""Open the broker that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pika.adapters.blocking_connection import BlockingChannel

from broker import topology
from broker.connection import (
    CONFIRM_TIMEOUT_S,
    LOST,
    close_quietly,
    deadline,
    open_connection,
    parse_url,
    translate,
)
from broker.port import Broker
from broker.rabbitmq import PUBLISH_HEARTBEAT_S, RabbitBroker
from broker.sqlite import SqliteBroker
from federation.settings import Settings

SQLITE_PREFIX = "sqlite:"


def connect(settings: Settings, keep_open: bool = False, *, server: bool = False) -> Broker:
    """The broker at `settings.broker_url`. Nothing is opened until it is used.

    keep_open: keep the publishing connection between publishes; for processes that publish many times a minute.
    server: the account may declare, so a broker that lost its disk gets its exchanges and queues back.
    Raises BadSettings for a URL that is none.
    """
    url = settings.broker_url.get_secret_value()
    if settings.embedded:
        return SqliteBroker(
            url.removeprefix(SQLITE_PREFIX),
            lease_s=settings.lease_s,
            delivery_limit=settings.delivery_limit,
            site=None if server else settings.site,
        )
    redeclare = partial(_declare, settings.delivery_limit, ()) if server else None
    name = f"fedqueue site {settings.site}" if settings.site else "fedqueue server"
    return RabbitBroker(url, keep_open=keep_open, redeclare=redeclare, name=name)


def declare(settings: Settings, sites: Sequence[str] = ()) -> None:
    """Create all exchanges and queues, and the control queues of `sites`. Doing it again changes nothing.

    Raises BrokerUnavailable, AccessDenied, Fatal if a queue exists with other properties (RabbitMQ; the
    embedded queue takes the new ones), BadSettings.
    """
    url = settings.broker_url.get_secret_value()
    if settings.embedded:
        broker = SqliteBroker(
            url.removeprefix(SQLITE_PREFIX), lease_s=settings.lease_s, delivery_limit=settings.delivery_limit
        )
        try:
            broker.declare(sites)
        finally:
            broker.close()
        return
    parameters = parse_url(url, "fedqueue declare", PUBLISH_HEARTBEAT_S)
    connection = None
    try:
        connection = open_connection(parameters)
        with deadline(connection, CONFIRM_TIMEOUT_S):
            _declare(settings.delivery_limit, sites, connection.channel())
    except LOST as exc:
        raise translate(exc, parameters, "declare exchanges and queues") from exc
    finally:
        close_quietly(connection)


def _declare(delivery_limit: int, sites: Sequence[str], channel: BlockingChannel) -> None:
    topology.declare(channel, delivery_limit)
    for site in sites:
        topology.declare_site(channel, site)
