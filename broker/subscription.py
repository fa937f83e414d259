"""One connection that consumes: deliveries come out, acknowledgements go in, everything else is a lost connection."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pika
from pika.exceptions import ConsumerCancelled

from broker.backoff import pause
from broker.connection import (
    CONFIRM_TIMEOUT_S,
    LOST,
    close_quietly,
    deadline,
    open_channel,
    open_connection,
)
from broker.delivery import delivery_of
from federation.wire import Delivery


@dataclass(frozen=True)
class Item:
    """A delivery and what its channel calls it."""

    tag: int
    delivery: Delivery


class ConnectionLost(Exception):
    """The subscription's connection is gone. Keeps a handler's own OSError from looking like it."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


class Subscription:
    """One connection that consumes. Its methods raise ConnectionLost; then only `close` may follow."""

    def __init__(self, parameters: pika.URLParameters, queues: Sequence[str]) -> None:
        self._inbox: deque[Item] = deque()
        self._cancelled = False
        self._connection: pika.BlockingConnection | None = None
        with self._lost():
            self._connection = open_connection(parameters)
            with deadline(self._connection, CONFIRM_TIMEOUT_S):
                self._channel = open_channel(self._connection)
                self._channel.add_on_cancel_callback(self._on_cancel)
                self._channel.basic_qos(prefetch_count=1)
                for queue in queues:
                    self._channel.basic_consume(queue, self._receiver(queue))

    def next(self, seconds: float) -> Item | None:
        """The next delivery, or None if none came within `seconds`."""
        if not self._inbox:
            self._serve(seconds)
        return self._inbox.popleft() if self._inbox else None

    def acknowledge(self, item: Item) -> None:
        with self._lost():
            self._channel.basic_ack(item.tag)

    def give_back(self, item: Item, *, last: bool = False) -> None:
        """`last`: consume no more. Else the broker would hand it to us again, and count that as an attempt."""
        with self._lost():
            if last:
                for tag in self._channel.consumer_tags:
                    self._channel.basic_cancel(tag)
            self._channel.basic_reject(item.tag, requeue=True)

    def give_back_after(self, item: Item, seconds: float, stop: Callable[[], bool]) -> None:
        """Hold the delivery for `seconds`, answering heartbeats; then give it back."""
        pause(seconds, stop, self._sleep)
        self.give_back(item, last=stop())

    def close(self) -> None:
        """Whatever is unacknowledged goes back to its queue."""
        close_quietly(self._connection)

    def _receiver(self, queue: str) -> Callable[[Any, Any, Any, bytes], None]:
        def receive(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            delivery = delivery_of(queue, method, properties, body)
            self._inbox.append(Item(method.delivery_tag, delivery))

        return receive

    def _on_cancel(self, _frame: Any) -> None:
        self._cancelled = True

    def _serve(self, seconds: float) -> None:
        with self._lost():
            self._channel._process_data_events(time_limit=seconds)  # raises if the broker closed the channel
            if self._cancelled:
                raise ConsumerCancelled("the broker cancelled the consumer: was its queue deleted?")

    def _sleep(self, seconds: float) -> None:
        """Serve the connection for the whole time: deliveries of other queues end a single wait early."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._serve(left)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except LOST as exc:
            close_quietly(self._connection)
            raise ConnectionLost(exc) from exc
