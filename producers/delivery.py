"""From the outbox to the server: upload the payload, then publish the message, then forget.

Each step may be repeated: the upload is put-if-absent under the update's own id, and a message that is
published twice is recognised by the server. So a crash anywhere costs a repetition and never an update.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from broker import topology
from broker.port import Broker
from federation.errors import BadMessage, BrokerUnavailable
from federation.points import Point, reach
from federation.types import ClientUpdate
from federation.wire import encode_update
from producers.outbox import Outbox
from storage.blob import BlobStore

log = logging.getLogger("fedqueue.site")

REPUBLISH_AFTER_S = 600.0
"""A confirmed message whose fate the log does not tell for so long may have been in a broker that lost its
disk: send it again. If it only waits in a long queue, the server drops the duplicate."""
REPUBLISH_TIMES = 6
"""After that the server has it and cannot use it, or nobody works there: train on rather than wait for ever."""


@dataclass
class Courier:
    """Delivers the updates of one outbox."""

    outbox: Outbox
    store: BlobStore
    broker: Broker
    confirmed: int = 0
    clock: Callable[[], float] = time.monotonic
    _published_at: dict[str, float] = field(default_factory=dict)
    _times: Counter[str] = field(default_factory=Counter)

    def deliver(self) -> None:
        """Send everything that waits, oldest first. Raises StoreUnavailable, BrokerUnavailable, AccessDenied."""
        for update in self.outbox.waiting():
            self.store.put_if_absent(update.payload_key, self.outbox.payload(update))
            reach(Point.UPLOADED)
            self._publish(update)
            reach(Point.CONFIRMED)
            self.outbox.confirmed(update)
            self.confirmed += 1
            log.info(
                "%s: update %s: sent, base version %d", update.job, update.update_id, update.base_version
            )

    def republish(self) -> None:
        """Send again what was confirmed long ago and never came up in the log; in the end, wait for it no more."""
        for update in self.outbox.sent():
            update_id = update.update_id
            if self.clock() - self._published_at.setdefault(update_id, self.clock()) < REPUBLISH_AFTER_S:
                continue
            if self._times[update_id] == REPUBLISH_TIMES:
                log.error(
                    "%s: update %s: the server never named it; ask its operator for dead letters",
                    *(update.job, update_id),
                )
                self.outbox.settle(update_id)
                continue
            log.warning(
                "%s: update %s: no word of it for %.0f s, sending it again",
                *(update.job, update_id, REPUBLISH_AFTER_S),
            )
            self._publish(update)
            self._times[update_id] += 1

    def _publish(self, update: ClientUpdate) -> None:
        try:
            self.broker.publish(topology.UPDATES_EXCHANGE, encode_update(update))
        except BadMessage as exc:
            if exc.reason != "unroutable":
                raise
            raise BrokerUnavailable(
                "the broker has no queue for updates yet: run `fedqueue server init`"
            ) from exc
        self._published_at[update.update_id] = self.clock()
