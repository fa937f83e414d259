"""Carries out the plan: every fault in a thread of its own, so that they overlap as the plan says."""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pika
import redis

from broker import topology
from federation.errors import Transient
from federation.settings import Settings
from storage.liveness import open_liveness
from tests.chaos.deployment import WORKERS, Deployment
from tests.chaos.plan import LEADER, Fault, Kind
from tests.chaos.processes import Supervised

log = logging.getLogger("fedqueue.chaos")

BETWEEN_OUTAGES_S = 15.0
"""At least so long the system works, from the first record after an outage to the next outage."""
OUTAGE_LATE_S = 30.0
"""An outage that would be later than this is left out, where servers start slowly."""
RECOVERY_LIMIT_S = 60.0
OUTAGE, REDIS = "outage", "redis"
HANDFUL = 12
HANDFUL_S = 3.0
"""So many messages are held for another order, or as many as come in this time."""


@dataclass(frozen=True)
class Done:
    """A fault that was played on `target`, from `began` to `ended` (Unix time).

    `recovered_s`: seconds from there, where only the killer can see it (Redis)."""

    fault: Fault
    target: str
    began: float
    ended: float
    recovered_s: float | None = None


class Missed(Exception):
    """There was nothing to hit."""


class Killer:
    """Plays faults on a deployment. What lasts has its turn: the next on the same target begins when it is over."""

    def __init__(self, deployment: Deployment) -> None:
        self._its = deployment
        self._begin = 0.0
        self._turns = {
            name: threading.Lock() for name in (OUTAGE, REDIS, *deployment.workers, *deployment.sites)
        }
        self.done: list[Done] = []
        self.missed: list[Fault] = []

    def run(self, plan: Sequence[Fault], seconds: float) -> None:
        """Begin every fault when it is due; return when all are over. Raises what a server says that does not start."""
        begin = self._begin = time.monotonic()
        played: list[Future[None]] = []
        with ThreadPoolExecutor(max_workers=32, thread_name_prefix="fault") as pool:
            for fault in plan:
                time.sleep(max(0.0, begin + fault.at_s - time.monotonic()))
                played.append(pool.submit(self._play, fault))
            time.sleep(max(0.0, begin + seconds - time.monotonic()))
        for future in played:
            future.result()

    def _play(self, fault: Fault) -> None:
        try:
            done = self._strike(fault)
        except Missed:
            self.missed.append(fault)
            log.info("%s %s: missed", fault.kind, fault.target)
        else:
            self.done.append(done)
            log.info("%s %s: over", fault.kind, done.target)

    def _strike(self, fault: Fault) -> Done:
        its, kind = self._its, fault.kind
        match kind:
            case Kind.KILL_WORKER | Kind.KILL_CHILD | Kind.PAUSE_WORKER:
                return self._strike_worker(fault)
            case Kind.KILL_INGRESS:
                return _kill(fault, its.ingresses[fault.target])
            case Kind.KILL_SITE:
                return _kill(fault, its.sites[fault.target].process)
            case Kind.CUT_SITE:
                return self._cut_site(fault)
            case Kind.REDIS_RESTART | Kind.REDIS_FLUSH:
                return self._strike_redis(fault)
            case Kind.REORDER:
                return self._reorder(fault)
            case _:
                with self._outage(fault):
                    return self._strike_server(fault)

    # --- processes -------------------------------------------------------------------------------------------

    def _strike_worker(self, fault: Fault) -> Done:
        name, began = self._worker(fault.target), time.time()
        worker = self._its.workers[name]
        if fault.kind is Kind.KILL_WORKER:
            return _kill(fault, worker)
        if fault.kind is Kind.KILL_CHILD:
            if not worker.kill_child():
                raise Missed
        else:
            with self._stopped(name):
                time.sleep(fault.seconds)
        return Done(fault, name, began, time.time())

    def _worker(self, target: str) -> str:
        """The target, or the next worker if that is stopped: what a stopped one does when it goes on is to be seen."""
        name = self._its.leader() if target == LEADER else target
        first = WORKERS.index(name)
        names = WORKERS[first:] + WORKERS[:first]
        return next((other for other in names if not self._turns[other].locked()), name)

    def _cut_site(self, fault: Fault) -> Done:
        line = self._its.sites[fault.target].line
        with self._turns[fault.target]:
            began = time.time()
            line.cut(hang=fault.hang)
            time.sleep(fault.seconds)
            line.repair()
        return Done(fault, fault.target, began, time.time())

    # --- servers ---------------------------------------------------------------------------------------------

    def _strike_server(self, fault: Fault) -> Done:
        its, began = self._its, time.time()
        if fault.kind is Kind.S3_KILL:
            its.s3.stop(kill=True)
            time.sleep(fault.seconds)
            its.s3.start()
        elif fault.kind is Kind.TWO_LEADERS:
            name = its.leader()
            with self._stopped(name):
                its.rabbitmq.kill()
                its.rabbitmq.start()
                ended = time.time()
                self._until_the_log_grows()  # so another worker leads, for this one appends nothing
            return Done(fault, name, began, ended)
        else:
            its.rabbitmq.stop() if fault.kind is Kind.RABBITMQ_RESTART else its.rabbitmq.kill()
            time.sleep(fault.seconds)
            its.rabbitmq.start()
        return Done(fault, "", began, time.time())

    def _until_the_log_grows(self) -> None:
        """At most RECOVERY_LIMIT_S: a system that does not recover is for the report to tell."""
        since, deadline = time.time(), time.monotonic() + RECOVERY_LIMIT_S
        while time.monotonic() < deadline:
            with suppress(Transient):
                if self._its.newest_record() > since:
                    return
            time.sleep(0.1)

    @contextmanager
    def _outage(self, fault: Fault) -> Iterator[None]:
        """One outage of broker or store at a time, with time to work between two, however long a start takes here."""
        with self._turns[OUTAGE]:
            if time.monotonic() > self._begin + fault.at_s + OUTAGE_LATE_S:
                raise Missed
            yield
            self._until_the_log_grows()
            time.sleep(BETWEEN_OUTAGES_S)

    @contextmanager
    def _stopped(self, name: str) -> Iterator[None]:
        """SIGSTOP to the worker with its child, SIGCONT at the end unless it was killed meanwhile."""
        worker = self._its.workers[name]
        with self._turns[name]:
            pid = worker.signal(signal.SIGSTOP)
            if pid is None:
                raise Missed
            try:
                yield
            finally:
                worker.resume(pid)

    def _strike_redis(self, fault: Fault) -> Done:
        """Recovered when a heartbeat can be seen again."""
        server = self._its.redis
        with self._turns[REDIS]:
            began = time.time()
            if fault.kind is Kind.REDIS_RESTART:
                server.stop()
                time.sleep(fault.seconds)
                server.start()
            else:
                with redis.Redis.from_url(server.url) as client:
                    client.flushall()
            ended = time.time()
            return Done(fault, "", began, ended, _until_a_heartbeat(self._its.server.settings))

    def _reorder(self, fault: Fault) -> Done:
        """Take what comes in the next seconds before any ingress gets it, and give it back shuffled."""
        began = time.time()
        try:
            with self._its.rabbitmq.connect() as connection:
                channel = connection.channel()
                channel.basic_qos(prefetch_count=HANDFUL)
                tags: list[int] = []
                consumer = channel.basic_consume(
                    topology.UPDATES,
                    lambda _channel, method, _properties, _body: tags.append(method.delivery_tag),
                    arguments={"x-priority": 10},
                )
                deadline = time.monotonic() + HANDFUL_S
                while len(tags) < HANDFUL and time.monotonic() < deadline:
                    connection.process_data_events(time_limit=0.1)
                channel.basic_cancel(consumer)
                random.Random(fault.at_s).shuffle(tags)
                for tag in tags:
                    channel.basic_nack(tag, requeue=True)
        except (pika.exceptions.AMQPError, OSError) as exc:  # the broker is away
            raise Missed from exc
        if len(tags) < 2:
            raise Missed
        return Done(fault, "", began, time.time())


def _kill(fault: Fault, process: Supervised) -> Done:
    if not process.kill():
        raise Missed
    now = time.time()
    return Done(fault, process.name, now, now)


def _until_a_heartbeat(settings: Settings) -> float | None:
    """Seconds; None if there was none in time."""
    liveness, begin = open_liveness(settings), time.monotonic()
    while time.monotonic() < begin + RECOVERY_LIMIT_S:
        with suppress(Transient):
            if liveness.sites():
                return time.monotonic() - begin
        time.sleep(0.05)
    return None
