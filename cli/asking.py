"""Asking the server for something, and waiting for its answer: what every command that changes a job does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import typer

from broker import topology
from broker.open import connect, declare
from cli.options import console, export, fail
from federation.errors import FedqueueError, Transient
from federation.ids import new_update_id
from federation.requests import Answer, Request, What
from federation.settings import Settings
from federation.types import SERVER
from federation.wire import encode_request
from storage.blob import BlobStore
from storage.control import load_answer

POLL_S = (0.1, 1.0)
"""Between two looks for an answer, at first and at most: each is a request to the store."""

WaitS = Annotated[
    float, typer.Option(envvar="FEDQUEUE_CLI_WAIT_S", help="seconds to wait for the server's answer")
]


def who_asks(settings: Settings) -> str:
    """The site whose settings these are; without one an operator."""
    return settings.site or SERVER


def new_request(settings: Settings, what: What) -> Request:
    return Request(request_id=new_update_id(), who=who_asks(settings), what=what, at=datetime.now(UTC))


def send(settings: Settings, request: Request) -> None:
    """Returns when the broker has the request. Raises BrokerUnavailable, BadMessage, AccessDenied."""
    export(settings)
    if settings.embedded or request.who == SERVER:
        declare(settings)  # so that a request waits for a server that was never started yet
    broker = connect(settings)
    try:
        if request.who == SERVER:
            from tasks.celery import HANDLE_REQUEST, sender

            sender(settings, broker)(HANDLE_REQUEST, {"request": request.to_json().decode()})
        else:
            broker.publish(topology.UPDATES_EXCHANGE, encode_request(request))
    finally:
        broker.close()


def wait(
    store: BlobStore, request: Request, wait_s: float, alive: Callable[[], None] = lambda: None
) -> Answer:
    """The answer. `alive` is called while waiting, and may raise. Raises Transient after `wait_s` seconds."""
    deadline, pause = time.monotonic() + wait_s, POLL_S[0]
    while (answer := load_answer(store, request.who, request.request_id)) is None:
        alive()
        if time.monotonic() > deadline:
            raise Transient(
                f"no answer in {wait_s:.0f} s: is a `fedqueue worker` running, and its ingress? Until then the request "
                f"stays queued, as {request.request_id}; the same command again would be another one"
            )
        time.sleep(pause)
        pause = min(1.2 * pause, POLL_S[1])
    return answer


def ask(settings: Settings, store: BlobStore, what: What, wait_s: float) -> None:
    """Ask, wait, and print what was done. Exits with status 1 and every error if the server refuses."""
    try:
        request = new_request(settings, what)
        with console.status("waiting for the server"):
            send(settings, request)
            answer = wait(store, request, wait_s)
    except FedqueueError as exc:
        fail(exc)
    show(answer)


def show(answer: Answer) -> None:
    """Print what was done; exits with status 1 and every error if the server has refused."""
    if not answer.ok:
        fail(*answer.errors)
    console.print(answer.message, markup=False, highlight=False, soft_wrap=True)
