"""The whole server in one process on the embedded queue: the same ingress, the same Celery tasks, run eagerly.

Tasks still travel through the queue file, so that a task is lost as little as on RabbitMQ when the process is
killed, and a backlog of updates is accepted first and published as one version.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence

from broker import topology
from broker.open import connect, declare
from broker.port import Handler
from federation.errors import FedqueueError, Transient
from federation.points import Point, reach
from federation.settings import Settings
from federation.wire import Delivery, Message
from storage.liveness import open_liveness
from tasks import ingress
from tasks.celery import app
from tasks.context import install, open_context
from tasks.deadletters import dead_letter

log = logging.getLogger("fedqueue.embedded")


def run(settings: Settings, queues: Sequence[str], stop: Callable[[], bool]) -> None:
    """Serve `queues` of tasks until `stop()`; with fed.merge among them, the ingress too.

    fed.evaluate gets a thread of its own, because an evaluation takes seconds and merging must not wait.
    """
    declare(settings)
    app.loader.import_default_modules()
    failures: list[BaseException] = []

    def serve(names: Sequence[str]) -> None:
        try:
            _serve(settings, names, lambda: stop() or bool(failures))
        except BaseException as exc:
            failures.append(exc)
            raise

    evaluate = [name for name in queues if name == topology.EVALUATE]
    others = [name for name in queues if name != topology.EVALUATE]
    if not others:
        serve(evaluate)
        return
    thread = threading.Thread(target=serve, args=(evaluate,), name="evaluate", daemon=True)
    if evaluate:
        thread.start()
    serve(others)
    if evaluate:
        thread.join()
    if failures:
        raise failures[0]


def _serve(settings: Settings, queues: Sequence[str], stop: Callable[[], bool]) -> None:
    broker = connect(settings, keep_open=True, server=True)
    context = open_context(settings)
    install(context)
    handlers: dict[str, Handler] = {name: task_handler(broker.publish) for name in queues}
    if topology.MERGE in queues:
        stop = ingress.ticking(stop, context.send, ingress.clock_tasks(settings))
        gate = ingress.Ingress(broker, open_liveness(settings), context.send)
        handlers |= dict.fromkeys(ingress.QUEUES, gate.handle)
    try:
        broker.consume(list(handlers), lambda delivery: handlers[delivery.queue](delivery), stop)
    finally:
        broker.close()
        context.broker.close()


def task_handler(publish: Callable[[str, Message], None]) -> Handler:
    """Run the task in a delivery as a worker would, and end it as celery.py describes."""

    def handle(delivery: Delivery) -> None:
        body = json.loads(delivery.body)
        task = app.tasks[body["task"]]
        result = task.apply(kwargs=body["arguments"], throw=False)
        if result.state == "REJECTED":
            raise Transient(f"{task.name} waits for an outage to end")
        if result.state != "SUCCESS":
            error = result.result
            reason = "task-failed" if not isinstance(error, FedqueueError) else type(error).__name__
            letter = dead_letter(delivery, reason, f"{task.name} failed: {error!r}")
            message = Message(
                routing_key=delivery.routing_key, body=letter.to_json(), type=ingress.DEAD_LETTER_TYPE
            )
            publish(topology.DEAD_EXCHANGE, message)
            reach(Point.LETTER_SENT)

    return handle
