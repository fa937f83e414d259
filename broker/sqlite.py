"""The broker port over one file: the embedded queue, for a whole federation on one machine.

Same exchanges, queues, keys, limits and dead letters as on RabbitMQ (broker/topology.py), kept in a LeaseQueue.
There are no accounts: who can open the file may do everything, and `user_id` is what the publisher says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from broker import topology
from broker.backoff import backoff_s, pause
from broker.lease import Lease, LeaseQueue
from broker.port import Handler
from federation.errors import BrokerUnavailable, Transient
from federation.wire import Delivery, Message

log = logging.getLogger("fedqueue.broker")

LEASE_S = 900.0
POLL_S = (0.02, 0.2)
"""Pause between looks at empty queues: the first, and the longest after a quiet while."""
RENEWALS_PER_LEASE = 3
OUTAGE_BACKOFF_S = (0.2, 5.0)
REQUEUE_BACKOFF_S = (0.2, 30.0)  # as on RabbitMQ, and for the same reason


class SqliteBroker:
    """One process's access to the queue file at `path`, which is created when it is first used."""

    def __init__(
        self,
        path: str | Path,
        *,
        lease_s: float = LEASE_S,
        delivery_limit: int = topology.DELIVERY_LIMIT,
        requeue_backoff_s: tuple[float, float] = REQUEUE_BACKOFF_S,
        site: str | None = None,
    ) -> None:
        """`lease_s`: how long a message stays with a consumer that shows no sign of life. `delivery_limit` is
        for the file that this creates; `declare` changes that of an existing one. `site`: who uses it, and gets a
        control queue, because nobody enrols sites in a file.
        """
        self._path = Path(path)
        self._lease_s = lease_s
        self._delivery_limit = delivery_limit
        self._requeue_backoff_s = requeue_backoff_s
        self._site = site
        self._queue: LeaseQueue | None = None

    def declare(self, sites: Sequence[str] = ()) -> None:
        """Create the topology and the control queues of `sites`; again changes nothing but the limits."""
        self._file().declare((*self._specs(), *(topology.site_queue(site) for site in sites)))

    def publish(self, exchange: str, message: Message) -> None:
        self._file().publish(exchange, message)

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        idle = 0
        outages = 0
        with _LeaseKeeper(self._open, self._lease_s) as keeper:
            while not stop():
                try:
                    lease = self._file().lease(queues, self._lease_s)
                except BrokerUnavailable as exc:
                    outages += 1
                    if outages == 1:
                        log.warning("waiting for the queue file, trying again every few seconds: %s", exc)
                    pause(backoff_s(outages, *OUTAGE_BACKOFF_S), stop)
                    continue
                outages = 0
                if lease is None:
                    idle += 1
                    time.sleep(min(POLL_S[0] * 2.0 ** min(idle, 16), POLL_S[1]))
                    continue
                idle = 0
                with keeper.holding(lease):
                    self._handle(lease, handler, stop)

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        return self._file().take(queue, limit)

    def close(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _handle(self, lease: Lease, handler: Handler, stop: Callable[[], bool]) -> None:
        """Run the handler and settle. Raises what the handler raised, unless it was Transient."""
        what = lease.delivery.queue
        try:
            handler(lease.delivery)
        except Transient as exc:
            log.warning("%s: attempt %d: %s", what, lease.token, exc)
            pause(backoff_s(lease.token, *self._requeue_backoff_s), stop)
            self._settle(self._file().give_back, lease)
        except BaseException:
            self._settle(self._file().give_back, lease)
            raise
        else:
            self._settle(self._file().acknowledge, lease)

    def _settle(self, settle: Callable[[Lease], bool], lease: Lease) -> None:
        """Failing to is no loss: the lease ends by itself, and the message comes again."""
        try:
            if not settle(lease):
                log.warning(
                    "%s: this process was silent for longer than its lease of %g s, another one has the message",
                    lease.delivery.queue,
                    self._lease_s,
                )
        except BrokerUnavailable as exc:
            log.warning("%s: the message will be delivered again: %s", lease.delivery.queue, exc)

    def _file(self) -> LeaseQueue:
        if self._queue is None:
            self._queue = self._open()
        return self._queue

    def _open(self) -> LeaseQueue:
        return LeaseQueue(self._path, self._specs())

    def _specs(self) -> tuple[topology.QueueSpec, ...]:
        own = () if self._site is None else (topology.site_queue(self._site),)
        return *topology.queues(self._delivery_limit), *own


class _LeaseKeeper:
    """Renews the lease of the message in hand from a thread, so that slow work is not given to a second worker.

    A process that is stopped or killed renews nothing, which is what a lease is for. The thread opens the
    file for itself, when the first renewal is due.
    """

    def __init__(self, open_file: Callable[[], LeaseQueue], lease_s: float) -> None:
        self._open_file = open_file
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def __enter__(self) -> _LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """While this lasts, the lease is renewed."""
        self._keep(lease)
        try:
            yield
        finally:
            self._keep(None)

    def _keep(self, lease: Lease | None) -> None:
        with self._lock:
            self._lease = lease

    def _run(self) -> None:
        file: LeaseQueue | None = None
        try:
            while not self._ended.wait(self._lease_s / RENEWALS_PER_LEASE):
                with self._lock:
                    lease = self._lease
                if lease is None:
                    continue
                try:
                    file = file or self._open_file()
                    file.renew(lease, self._lease_s)
                except BrokerUnavailable as exc:
                    log.warning("could not renew a lease, trying again: %s", exc)
        finally:
            if file is not None:
                file.close()
