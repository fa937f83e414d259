"""The port to the broker. tests/contract/test_broker.py holds for both implementations.

Open one with `broker.open.connect(settings)`; broker_url is `amqp://user:password@host:5672/vhost` (also amqps) or
`sqlite:PATH`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from federation.wire import Delivery, Message

Handler = Callable[[Delivery], None]
"""Returning acknowledges. Raising Transient gives the delivery back for another attempt. Any other
exception gives it back too and ends `consume` with it: the process is in an unknown state."""


class Broker(Protocol):
    """One process's access to the queues. Not for sharing between threads: open one each."""

    def publish(self, exchange: str, message: Message) -> None:
        """Return only when the broker has taken responsibility for the message in at least one queue.

        Raises BrokerUnavailable (after a bounded, named number of attempts) if it did not: the caller still
        owns the message and sends it again under the same message_id. Raises AccessDenied if the account
        may not publish there, BadMessage ("unroutable") if no queue is bound for its key: for control
        messages, whose site may not be enrolled yet, the caller decides that this is no loss.
        """
        ...

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        """Hand deliveries of `queues` to `handler`, one at a time, until `stop()` is true.

        A message is acknowledged after its handler returned. A lost connection is an outage, not an end: it
        reconnects with jittered backoff and goes on. `stop` is asked at least once a second.
        """
        ...

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        """Take and acknowledge up to `limit` waiting messages at once: for control hints, which may be lost.

        Raises BrokerUnavailable, AccessDenied.
        """
        ...

    def close(self) -> None:
        """Give back connections and files. Safe to call twice."""
        ...
