"""`fedqueue worker` and `fedqueue ingress`: the server's processes, rightly configured."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from broker import topology
from broker.backoff import backoff_s
from broker.open import connect, declare
from cli.options import BrokerUrl, LiveUrl, StoreUrl, export, fail, load, log_to_stderr, stop_on_signals
from federation.errors import FedqueueError, Transient
from storage.liveness import open_liveness
from storage.open import open_store
from storage.probe import probe

log = logging.getLogger("fedqueue.server")

START_BACKOFF_S = (1.0, 15.0)
"""First and longest wait between attempts to reach broker and store."""


class WorkerQueue(StrEnum):
    """What a worker works on."""

    merge = "merge"
    evaluate = "evaluate"


_QUEUES = {WorkerQueue.merge: topology.MERGE, WorkerQueue.evaluate: topology.EVALUATE}


def worker(
    queue: Annotated[
        list[WorkerQueue] | None,
        typer.Option(
            "--queue",
            envvar="FEDQUEUE_CLI_QUEUE",
            help="merge: needs no torch. evaluate: needs torch and a held-out set. Default: merge; embedded: both",
        ),
    ] = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
    live_url: LiveUrl = None,
) -> None:
    """Merge updates into model versions, and evaluate them.

    With RabbitMQ this is `celery -A tasks worker` with the right flags, in any number of copies. With the
    embedded queue it is the whole server in one process, ingress included.

    Example: fedqueue worker --queue evaluate
    """
    log_to_stderr()
    settings = load(broker_url=broker_url, store_url=store_url, live_url=live_url)
    try:
        _patiently(lambda: probe(open_store(settings)))
        if settings.embedded:
            from tasks.embedded import run

            export(settings)
            chosen = queue or [WorkerQueue.merge, WorkerQueue.evaluate]
            run(settings, [_QUEUES[name] for name in chosen], stop_on_signals().is_set)
            return
        _patiently(lambda: declare(settings))
    except FedqueueError as exc:
        fail(exc)
    export(settings)
    # SIGTERM then lets a running task finish for worker_soft_shutdown_timeout seconds
    os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
    names = ",".join(_QUEUES[name] for name in queue or [WorkerQueue.merge])
    arguments = [
        "-A",
        "tasks",
        "worker",
        "-Q",
        names,
        "--loglevel",
        "INFO",
        "-n",
        f"{names}-{os.getpid()}@%h",
        "--without-gossip",
        "--without-mingle",
    ]
    os.execv(sys.executable, [sys.executable, "-m", "celery", *arguments])


def _patiently(action: Callable[[], None]) -> None:
    """Do `action` as soon as broker and store let it: a server process may start before they do."""
    attempt = 0
    while True:
        try:
            return action()
        except Transient as exc:
            attempt += 1
            seconds = backoff_s(attempt, *START_BACKOFF_S)
            log.warning("waiting %.1f s: %s", seconds, exc)
        time.sleep(seconds)


def ingress(broker_url: BrokerUrl = None, live_url: LiveUrl = None) -> None:
    """Check what sites send, and pass it on to the workers. Needs no object store.

    Example: fedqueue ingress --broker-url amqp://server:secret@localhost/
    """
    log_to_stderr()
    settings = load(broker_url=broker_url, live_url=live_url)
    if settings.embedded:
        fail("with the embedded queue `fedqueue worker` is the whole server, ingress included")
    export(settings)
    from tasks.celery import send_celery
    from tasks.ingress import Ingress, clock_tasks, ticking

    try:
        _patiently(lambda: declare(settings))
        gate = Ingress(
            connect(settings, keep_open=True, server=True),
            open_liveness(settings),
            send_celery,
        )
        gate.run(ticking(stop_on_signals().is_set, send_celery, clock_tasks(settings)))
    except FedqueueError as exc:
        fail(exc)
