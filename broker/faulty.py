"""Any Broker with faults made on purpose (federation/faults.py): for tests.

What a fault looks like here, beyond its definition:

- A failing call raises BrokerUnavailable. A drain that fails after has taken the hints: they are lost, as
  hints may be.
- A delivery that fails before is given back unhandled; one that fails after is given back although its handler
  returned. Both come again and count as attempts.
- A repetition is of a message with the same exchange and routing key, the oldest of the last few. The embedded
  queue drops it if the same message still waits there.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from broker.port import Broker, Handler
from federation.errors import BrokerUnavailable, FedqueueError
from federation.faults import DELAY_S, Fault, FaultPlan, Injector
from federation.wire import Delivery, Message

RECENT_MESSAGES = 8
"""So many of the messages that were published last, of any key, can be repeated."""


class FaultyBroker:
    """Broker over `inner`."""

    def __init__(
        self,
        inner: Broker,
        plan: FaultPlan,
        *,
        delay_s: float = DELAY_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner = inner
        self._injector = Injector(plan, BrokerUnavailable, delay_s, sleep)
        self._published: deque[tuple[str, Message]] = deque(maxlen=RECENT_MESSAGES)

    @property
    def counts(self) -> Counter[Fault]:
        """The faults that took effect."""
        return self._injector.counts

    def publish(self, exchange: str, message: Message) -> None:
        with self._injector.call("publish", message.routing_key) as fault:
            self._inner.publish(exchange, message)
            if fault is Fault.REPEAT:
                self._repeat(exchange, message.routing_key)
            self._published.append((exchange, message))

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        def handle(delivery: Delivery) -> None:
            with self._injector.call("consume", delivery.routing_key):
                handler(delivery)

        self._inner.consume(queues, handle, stop)

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        with self._injector.call("drain", queue):
            return self._inner.drain(queue, limit)

    def close(self) -> None:
        self._inner.close()

    def _repeat(self, exchange: str, routing_key: str) -> None:
        for earlier_exchange, earlier in self._published:
            if (earlier_exchange, earlier.routing_key) == (exchange, routing_key):
                # The caller's own message is published: a repetition that fails must not look like its failure.
                with contextlib.suppress(FedqueueError):
                    self._inner.publish(exchange, earlier)
                    self._injector.count(Fault.REPEAT)
                return
