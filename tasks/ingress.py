"""The gate between the sites and Celery: the only reader of what sites write, and of dead letters.

A site's message is plain JSON of our own schema. Whoever can write Celery messages can run any task and crash
or wedge a worker, so nothing that a site wrote reaches Celery: the gate parses it, and sends a task of its
own. It publishes first, with confirm, and only then acknowledges; a crash in between makes a duplicate, which
`accept_update` recognises. It has no credentials for the object store, and no torch.

    fed.updates      good: task accept_update, for a report task record_report
                     bad: a DeadLetter on the exchange fed.dead
    fed.heartbeats   good: liveness.             bad, or liveness down: dropped, the next one comes in seconds
    fed.dead         task keep_dead_letter, which brings it to the store

It is also the server's clock, because it runs always and in both modes: `ticking` asks for the tasks
tend_jobs and oversee_jobs.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker import topology
from broker.port import Broker
from federation.errors import BadMessage, Transient
from federation.points import Point, reach
from federation.settings import Settings
from federation.wire import Delivery, Message, decode_heartbeat
from storage.liveness import Liveness
from tasks.celery import KEEP_DEAD_LETTER, OVERSEE_JOBS, TEND_JOBS, Send
from tasks.deadletters import dead_letter
from tasks.site_messages import task_for

log = logging.getLogger("fedqueue.ingress")

DEAD_LETTER_TYPE = "fedqueue.deadletter.v1"
QUEUES = (topology.UPDATES, topology.HEARTBEATS, topology.DEAD)

FIRST_TICK_S = 60.0
"""At most: what a broker lost with its disk is asked for again soon after the restart that this takes."""


@dataclass(frozen=True)
class Ingress:
    """`broker` both reads and carries dead letters; `send` puts a task on its queue."""

    broker: Broker
    liveness: Liveness
    send: Send

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until `stop()`. Outages are waited out."""
        self.broker.consume(QUEUES, self.handle, stop)

    def handle(self, delivery: Delivery) -> None:
        """Returns when the delivery may be acknowledged. Raises Transient to have it again."""
        if delivery.queue == topology.HEARTBEATS:
            self._heartbeat(delivery)
        elif delivery.queue == topology.DEAD:
            self.send(KEEP_DEAD_LETTER, {"letter": _letter_json(delivery)})
            reach(Point.LETTER_PASSED)
        else:
            self._work(delivery)

    def _work(self, delivery: Delivery) -> None:
        try:
            name, arguments = task_for(delivery)
        except BadMessage as exc:
            log.warning("%s: %s", delivery.routing_key, exc)
            letter = dead_letter(delivery, exc.reason, str(exc))
            message = Message(routing_key=delivery.routing_key, body=letter.to_json(), type=DEAD_LETTER_TYPE)
            self.broker.publish(topology.DEAD_EXCHANGE, message)
            reach(Point.LETTER_SENT)
        else:
            self.send(name, arguments)
            reach(Point.TASK_SENT)

    def _heartbeat(self, delivery: Delivery) -> None:
        try:
            self.liveness.beat(decode_heartbeat(delivery))
        except BadMessage as exc:
            log.warning("%s: heartbeat dropped: %s", delivery.routing_key, exc)
        except Transient as exc:
            log.warning("heartbeat dropped, liveness is down: %s", exc)


def ticking(
    stop: Callable[[], bool],
    send: Send,
    every_s: Mapping[str, float],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], bool]:
    """`stop`, which a consumer asks about once a second, made to send each task of `every_s` whenever it is due.

    The times are jittered, so that several ingresses that start at once do not ask at once; that they all ask is
    harmless. While the broker is down it is tried again, some seconds apart.
    """
    retry_s = {task: min(FIRST_TICK_S, seconds) for task, seconds in every_s.items()}
    due = {task: clock() + random.uniform(0.5, 1.0) * seconds for task, seconds in retry_s.items()}

    def tick() -> bool:
        for task, seconds in every_s.items():
            if clock() < due[task]:
                continue
            try:
                send(task, {})
                due[task] = clock() + random.uniform(0.9, 1.1) * seconds
            except Transient as exc:
                log.warning("could not ask for %s: %s", task, exc)
                due[task] = clock() + random.uniform(0.5, 1.0) * retry_s[task]
        return stop()

    return tick


def clock_tasks(settings: Settings) -> dict[str, float]:
    """What the ingress asks for by the clock: task -> every so many seconds."""
    return {TEND_JOBS: settings.gc_every_s, OVERSEE_JOBS: settings.oversee_every_s}


def _letter_json(delivery: Delivery) -> str:
    """A DeadLetter of our own passes as it is; what the broker dead-lettered is wrapped into one."""
    if delivery.type == DEAD_LETTER_TYPE:
        return delivery.body.decode()
    if delivery.headers.get("task") == KEEP_DEAD_LETTER:
        # That task itself failed too often: its argument is the letter, not a new one around it.
        try:
            return str(json.loads(delivery.body)[1]["letter"])
        except (ValueError, LookupError, TypeError):
            pass
    reason, message = _broker_reason(delivery.headers)
    return dead_letter(delivery, reason, message).to_json().decode()


def _broker_reason(headers: Mapping[str, object]) -> tuple[str, str]:
    """From RabbitMQ's x-death header or the embedded queue's equivalent."""
    reason = str(headers.get("x-first-death-reason") or "dead-lettered")
    queue = str(headers.get("x-first-death-queue") or "?")
    task = f", task {headers['task']}" if "task" in headers else ""
    return reason.replace(
        "_", "-"
    ), f"the broker dead-lettered it from {queue} ({reason}{task}); see the worker's log"
