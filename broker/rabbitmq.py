"""The broker port over RabbitMQ 3.10 or later, with pika.

Publishing is mandatory, confirmed and bounded in time. By default each publish opens a connection and closes
it (10 to 17 ms): an agent that trains for minutes in between would find a kept one dead of missed heartbeats
while pika still calls it open. A process that publishes much passes `keep_open`; an idle or failed connection is then
replaced, never trusted.

Consuming holds one message at a time. A handler should return within a minute: heartbeats are not answered
while it runs, and after about two the broker gives its message to somebody else. Long work belongs in a task.
A message is given back with basic.reject, which every version counts towards the delivery limit;
from 4.3 on basic.nack does not, and a message that nobody can handle would circle for ever.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosed, NackError, UnroutableError

from broker.backoff import STOP_POLL_S, backoff_s, pause
from broker.connection import (
    CONFIRM_TIMEOUT_S,
    LOST,
    close_quietly,
    deadline,
    open_channel,
    open_connection,
    parse_url,
    place,
    refused_message,
    translate,
)
from broker.delivery import delivery_of
from broker.port import Handler
from broker.subscription import ConnectionLost, Item, Subscription
from federation.errors import BadMessage, BrokerUnavailable, Transient
from federation.wire import Delivery, Message

log = logging.getLogger("fedqueue.broker")

# A broken connection is worth a second and a third try, because the first often only discovers that the broker
# was restarted. An outage is not ours to sit out: the caller has an outbox, or gives its delivery back.
PUBLISH_ATTEMPTS = 3
PUBLISH_BACKOFF_S = (0.1, 1.0)
PUBLISH_HEARTBEAT_S = 20
IDLE_LIMIT_S = 10.0  # a kept connection that was idle longer is replaced before it can fail
CONSUME_HEARTBEAT_S = 60
RECONNECT_BACKOFF_S = (0.2, 5.0)
# Each return of a message counts towards its delivery limit (20): with these pauses an outage that the handler
# reports as Transient may last some six minutes before good messages become dead letters.
REQUEUE_BACKOFF_S = (0.2, 30.0)

Declare = Callable[[BlockingChannel], None]


class RabbitBroker:
    """One process's access to a RabbitMQ server. Connects when it is first used."""

    def __init__(
        self,
        url: str,
        *,
        keep_open: bool = False,
        redeclare: Declare | None = None,
        requeue_backoff_s: tuple[float, float] = REQUEUE_BACKOFF_S,
        name: str = "fedqueue",
    ) -> None:
        """`redeclare` is for the server's account: it creates the topology again when an exchange or queue
        is missing, as after the broker lost its disk. `requeue_backoff_s`: first and longest pause before a
        delivery is given back. Raises BadSettings for a URL that is none.
        """
        self._publish_parameters = parse_url(url, f"{name} publish", PUBLISH_HEARTBEAT_S)
        self._consume_parameters = parse_url(url, f"{name} consume", CONSUME_HEARTBEAT_S)
        self._keep_open = keep_open
        self._redeclare = redeclare
        self._requeue_backoff_s = requeue_backoff_s
        self._kept: pika.BlockingConnection | None = None
        self._kept_channel: BlockingChannel | None = None
        self._used_at = 0.0
        self._warned_missing: set[str] = set()

    # --- publishing ----------------------------------------------------------------------------------------

    def publish(self, exchange: str, message: Message) -> None:
        doing = f"publish to {exchange} with key {message.routing_key}"
        for attempt in range(1, PUBLISH_ATTEMPTS + 1):
            try:
                self._publish_once(exchange, message)
                return
            except UnroutableError as exc:
                raise BadMessage(
                    f"{doing}: no queue is bound for that key; is the site enrolled?", "unroutable"
                ) from exc
            except NackError as exc:
                raise BrokerUnavailable(
                    f"broker {place(self._publish_parameters)}: {doing}: refused, the queue is full; "
                    "check that its consumers run"
                ) from exc
            except LOST as exc:
                self.close()
                if refused_message(exc):
                    raise BadMessage(f"{doing}: cannot be encoded: {exc!r}", "unencodable") from exc
                error = translate(exc, self._publish_parameters, doing)
                if attempt == PUBLISH_ATTEMPTS or not isinstance(error, Transient):
                    raise error from exc
                if _is_missing(exc):
                    if self._redeclare is None:
                        raise error from exc
                    self._declare_again()
            time.sleep(backoff_s(attempt, *PUBLISH_BACKOFF_S))

    def _publish_once(self, exchange: str, message: Message) -> None:
        connection, channel = self._publisher()
        try:
            with deadline(connection, CONFIRM_TIMEOUT_S):
                channel.basic_publish(
                    exchange,
                    message.routing_key,
                    message.body,
                    properties=_properties(message),
                    mandatory=True,
                )
            self._used_at = time.monotonic()
        finally:
            if not self._keep_open:
                self.close()

    def _publisher(self) -> tuple[pika.BlockingConnection, BlockingChannel]:
        """The kept connection if it can still be trusted, else a new one. Raises one of LOST."""
        fresh = time.monotonic() - self._used_at < IDLE_LIMIT_S
        if self._kept is not None and self._kept_channel is not None:
            if fresh and self._kept.is_open and self._kept_channel.is_open:
                return self._kept, self._kept_channel
            self.close()
        self._kept = open_connection(self._publish_parameters)
        with deadline(self._kept, CONFIRM_TIMEOUT_S):
            self._kept_channel = open_channel(self._kept, confirm=True)
        return self._kept, self._kept_channel

    def _declare_again(self) -> None:
        assert self._redeclare is not None
        log.warning("broker %s lost its exchanges or queues: declaring them", place(self._publish_parameters))
        with contextlib.suppress(*LOST):
            connection = open_connection(self._publish_parameters)
            try:
                with deadline(connection, CONFIRM_TIMEOUT_S):
                    self._redeclare(connection.channel())
            finally:
                close_quietly(connection)

    # --- consuming -----------------------------------------------------------------------------------------

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        subscription: Subscription | None = None
        outage = _Outage(place(self._consume_parameters), queues)
        try:
            while not stop():
                try:
                    if subscription is None:
                        subscription = Subscription(self._consume_parameters, queues)
                        outage.over()
                    item = subscription.next(STOP_POLL_S)
                    if item is not None:
                        self._handle(subscription, item, handler, stop)
                except ConnectionLost as exc:
                    if subscription is not None:
                        subscription.close()
                        subscription = None
                    self._wait_out(outage, exc.cause, stop)
        finally:
            if subscription is not None:
                subscription.close()

    def _wait_out(self, outage: _Outage, cause: BaseException, stop: Callable[[], bool]) -> None:
        error = translate(cause, self._consume_parameters, outage.doing)
        if not isinstance(error, BrokerUnavailable):
            raise error from cause
        seconds = outage.next_wait_s(error)
        if _is_missing(cause) and self._redeclare is not None:
            self._declare_again()
        pause(seconds, stop)

    def _handle(
        self, subscription: Subscription, item: Item, handler: Handler, stop: Callable[[], bool]
    ) -> None:
        """Run the handler and settle. Raises what the handler raised, unless it was Transient."""
        try:
            handler(item.delivery)
        except Transient as exc:
            seconds = backoff_s(item.delivery.attempts, *self._requeue_backoff_s)
            log.warning("%s: attempt %d: %s", item.delivery.queue, item.delivery.attempts, exc)
            subscription.give_back_after(item, seconds, stop)
        except BaseException:
            with contextlib.suppress(ConnectionLost):  # a lost connection gives it back as well
                subscription.give_back(item, last=True)
            raise
        else:
            subscription.acknowledge(item)

    # --- the rest --------------------------------------------------------------------------------------------

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        """A queue that does not exist has no hints: [] and one warning, since the site cannot create it."""
        connection = None
        try:
            connection = open_connection(self._publish_parameters)
            with deadline(connection, CONFIRM_TIMEOUT_S):
                return _take(connection.channel(), queue, limit)
        except LOST as exc:
            if _is_missing(exc):
                if queue not in self._warned_missing:
                    log.warning("queue %s does not exist: ask the server to enrol this site again", queue)
                    self._warned_missing.add(queue)
                return []
            raise translate(exc, self._publish_parameters, f"read {queue}") from exc
        finally:
            close_quietly(connection)

    def close(self) -> None:
        close_quietly(self._kept)
        self._kept = self._kept_channel = None


class _Outage:
    """Counts failed attempts to consume; one log line when it begins, one when it is over."""

    def __init__(self, where: str, queues: Sequence[str]) -> None:
        self.doing = f"consume {', '.join(queues)}"
        self._where = where
        self._failures = 0
        self._since = 0.0

    def next_wait_s(self, error: BrokerUnavailable) -> float:
        if not self._failures:
            self._since = time.monotonic()
            log.warning("waiting for the broker, trying again every few seconds: %s", error)
        self._failures += 1
        return backoff_s(self._failures, *RECONNECT_BACKOFF_S)

    def over(self) -> None:
        if self._failures:
            log.info("broker %s is back after %.1f s", self._where, time.monotonic() - self._since)
        self._failures = 0


def _properties(message: Message) -> pika.BasicProperties:
    return pika.BasicProperties(
        content_type=message.content_type,
        headers=dict(message.headers) or None,
        delivery_mode=2 if message.persistent else 1,
        expiration=None if message.ttl_s is None else str(max(1, round(message.ttl_s * 1000))),
        message_id=message.message_id,
        type=message.type,
        user_id=message.user_id,
    )


def _take(channel: BlockingChannel, queue: str, limit: int) -> list[Delivery]:
    taken: list[Delivery] = []
    tag = None
    while len(taken) < limit:
        method, properties, body = channel.basic_get(queue)
        if method is None:
            break
        tag = method.delivery_tag
        taken.append(delivery_of(queue, method, properties, body))
    if tag is not None:
        channel.basic_ack(tag, multiple=True)
    return taken


def _is_missing(exc: BaseException) -> bool:
    """True if an exchange or queue does not exist."""
    return isinstance(exc, ChannelClosed) and exc.reply_code == 404
