"""Heartbeats: a thread that tells the server every few seconds what this site is doing.

It opens its own broker, because connections are not shared between threads, and it never disturbs the agent:
a heartbeat that cannot be sent is dropped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from broker import topology
from broker.port import Broker
from federation.errors import FedqueueError
from federation.types import Machine, SiteStatus
from federation.wire import encode_heartbeat

log = logging.getLogger("fedqueue.site")


class Heartbeat:
    """The status of a site, and the thread that sends it. A context manager."""

    def __init__(
        self,
        site: str,
        connect: Callable[[], Broker],
        every_s: float,
        ttl_s: float,
        machine: Callable[[], Machine | None] = lambda: None,
    ) -> None:
        """`machine` tells how busy the computer is; it is called for each heartbeat, in the thread."""
        self._status = SiteStatus(site=site, state="idle", at=datetime.now(UTC))
        self._connect, self._every_s, self._ttl_s, self._machine = connect, every_s, ttl_s, machine
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def update(self, **changes: Any) -> None:
        """Change fields of the status; the next heartbeat carries them."""
        with self._lock:
            self._status = self._status.model_copy(update=changes)

    @property
    def status(self) -> SiteStatus:
        """As it is now, stamped with the time."""
        with self._lock:
            return self._status.model_copy(update={"at": datetime.now(UTC)})

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.update(state="stopped", detail="")
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        broker = self._connect()
        try:
            while True:
                last = self._stop.is_set()
                self._send(broker)
                if last:
                    return
                self._stop.wait(self._every_s)
        finally:
            broker.close()

    def _send(self, broker: Broker) -> None:
        status = self.status.model_copy(update={"machine": self._machine()})
        try:
            broker.publish(topology.UPDATES_EXCHANGE, encode_heartbeat(status, self._ttl_s))
        except FedqueueError as exc:
            log.debug("heartbeat not sent: %s", exc)
