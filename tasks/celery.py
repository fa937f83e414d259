"""The Celery app, how a task fails, and how a task is sent.

Names are part of the protocol between our own processes: `fedqueue.<verb>_<noun>`.

How a task ends, and what becomes of its message (celeryconfig.py sets `acks_late`, so it is still unacknowledged):
    returns             acknowledged
    raises Transient    retried inside the task with backoff, then given back to the queue
    raises anything     dead-lettered by the broker; the ingress brings it to the store with its reason
    dies (kill -9)      redelivered
"""

from __future__ import annotations

import functools
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from kombu.exceptions import OperationalError

from broker import topology
from broker.port import Broker
from federation.errors import BrokerUnavailable, Transient
from federation.settings import Settings
from federation.wire import Message

log = logging.getLogger("fedqueue.tasks")

ACCEPT = "fedqueue.accept_update"
PUBLISH = "fedqueue.publish_version"
EVALUATE = "fedqueue.evaluate_version"
WRITE_RELEASE = "fedqueue.write_release"
RECORD_REPORT = "fedqueue.record_report"
HANDLE_REQUEST = "fedqueue.handle_request"
OVERSEE_JOBS = "fedqueue.oversee_jobs"
KEEP_DEAD_LETTER = "fedqueue.keep_dead_letter"
TEND_JOBS = "fedqueue.tend_jobs"

ROUTING_KEYS = {
    ACCEPT: "merge.accept_update",
    PUBLISH: "merge.publish_version",
    RECORD_REPORT: "merge.record_report",
    HANDLE_REQUEST: "merge.handle_request",
    OVERSEE_JOBS: "merge.oversee_jobs",
    KEEP_DEAD_LETTER: "merge.keep_dead_letter",
    TEND_JOBS: "merge.tend_jobs",
    EVALUATE: "evaluate.evaluate_version",
    WRITE_RELEASE: "evaluate.write_release",
}
TASK_TYPE = "fedqueue.task.v1"

app = Celery("fedqueue")
app.config_from_object("celeryconfig")
app.conf.include = [
    "tasks.accept",
    "tasks.publish",
    "tasks.evaluate",
    "tasks.bundle",
    "tasks.report",
    "tasks.requests",
    "tasks.oversee",
    "tasks.deadletters",
    "tasks.retention",
]


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Celery logs two lines for each task; one that runs every few seconds would bury the others."""
    told = record.args if isinstance(record.args, dict) else {}
    return record.levelno > logging.INFO or told.get("name") != OVERSEE_JOBS


for _celerys in ("celery.app.trace", "celery.worker.strategy"):
    logging.getLogger(_celerys).addFilter(_worth_a_line)

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 15.0
RETRY_SHARE = 0.5
"""A task waits out an outage for this share of its time limit, then gives its message back: each return
counts towards the delivery limit, so returning at once would dead-letter good updates within a second."""


def task(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of string arguments as a task that waits out outages as described above."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(self: Any, **arguments: str) -> None:
            deadline = time.monotonic() + RETRY_SHARE * float(app.conf.task_soft_time_limit)
            wait = FIRST_WAIT_S
            while True:
                try:
                    return function(self, **arguments)
                except Transient as exc:
                    if time.monotonic() + wait > deadline:
                        log.warning("%s: giving the message back to the queue: %s", name, exc)
                        raise Reject(exc, requeue=True) from exc
                    log.warning("%s: waiting %.1f s: %s", name, wait, exc)
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(wait * 2, LONGEST_WAIT_S)

        registered: Callable[..., None] = app.task(bind=True, name=name, typing=False)(run)
        return registered

    return register


Send = Callable[[str, Mapping[str, str]], None]
"""Put a task on its queue: name, string arguments. Returns when the broker has it."""


def sender(settings: Settings, broker: Broker) -> Send:
    """How this process sends tasks: over RabbitMQ by Celery, or over the embedded queue by `broker`."""
    if not settings.embedded:
        return send_celery
    return lambda name, arguments: broker.publish(topology.TASKS_EXCHANGE, embedded_message(name, arguments))


def send_celery(name: str, arguments: Mapping[str, str]) -> None:
    """Over RabbitMQ, as a Celery message, with publisher confirm. Raises BrokerUnavailable."""
    try:
        app.send_task(name, kwargs=dict(arguments), routing_key=ROUTING_KEYS[name])
    except (OperationalError, OSError) as exc:
        raise BrokerUnavailable(f"could not send {name}: {exc}") from exc


def embedded_message(name: str, arguments: Mapping[str, str]) -> Message:
    """The same on the embedded queue."""
    body = json.dumps({"task": name, "arguments": dict(arguments)}).encode()
    return Message(routing_key=ROUTING_KEYS[name], body=body, type=TASK_TYPE)
