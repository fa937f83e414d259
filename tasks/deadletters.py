"""fedqueue.keep_dead_letter: what could not be handled goes to the store, whole, with its reason; and back.

A letter's id is made from its content, so that a message that is delivered twice leaves one letter.

Requeueing sends what the letter holds on its way again, at least once:

    1. append "requeue began" to the letter     from here on a new failure is a new record of it
    2. send the task, with confirm
    3. append "requeued"                        only if nothing came after 1: else it has failed again

Nothing is deleted and nothing overwritten, so no crash and no second operator can lose the message or its
reason. Until 3 the letter still waits, and requeueing it again is harmless: if the update was merged, the log
knows its id, and the log counts. After 3 the message belongs to the queue again and ends like any other: in
the log, or as a letter; failing as before it makes the same id, and the letter waits again. Should the broker
lose it, the letter still has it, and may be requeued by its id.

What is sent is made anew from the body, and nothing else of the message is passed on: a site's is checked as
the ingress checks it and sent as its task, because nobody but the site can publish under its name; a task is
known by its routing key, which only the server's account can use, and has text arguments. Headers are dropped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import uuid
from datetime import UTC, datetime
from typing import Any

from broker import topology
from federation.errors import AccessDenied, BadMessage, StoreUnavailable
from federation.points import Point, reach
from federation.types import ClientUpdate, DeadLetter, Evaluation
from federation.wire import JSON_TYPE, REPORT_TYPE, UPDATE_TYPE, Delivery
from storage.blob import BlobStore
from storage.jobs import begin_requeue, finish_requeue, save_dead_letter
from tasks import celery
from tasks.context import current
from tasks.site_messages import task_for

log = logging.getLogger("fedqueue.deadletters")

MAX_KEPT_BYTES = 16 * 1024
MAX_HEADERS = 4096
MAX_MESSAGE = 2000
"""Of a body, of the headers' text and of the explanation. Ours have 4 KB, reports 16; of a larger body the
beginning, the length and the digest are kept. A letter is a message itself, JSON within a task's JSON, where a
character of ASCII takes four bytes at most and others up to twelve. So it stays below the 64 KB of
docker/rabbitmq.conf, whatever a site sent: a letter that the broker refuses would end the ingress, again after
every restart."""
MAX_PROPERTY = 255

_TASK_OF_KEY = {key: name for name, key in celery.ROUTING_KEYS.items()}


@celery.task(celery.KEEP_DEAD_LETTER)
def keep_dead_letter(self: Any, letter: str) -> None:
    """`letter`: a DeadLetter as JSON."""
    keep(current().store, letter)
    reach(Point.LETTER_KEPT)


def keep(store: BlobStore, letter: str) -> None:
    """Bring a letter to the store. There is no letter about a letter, so this fails with Transient alone."""
    try:
        parsed = DeadLetter.from_json(letter, BadMessage)
    except BadMessage as exc:  # of another release
        parsed = dead_letter(
            Delivery(queue=topology.DEAD, routing_key="", body=letter.encode()), exc.reason, str(exc)
        )
    try:
        save_dead_letter(store, parsed)
    except AccessDenied as exc:
        raise StoreUnavailable(f"dead letter {parsed.id} has to wait: {exc}") from exc
    log.warning("dead letter %s from %s: %s: %s", parsed.id, parsed.queue, parsed.reason, parsed.message)


def dead_letter(delivery: Delivery, reason: str, message: str) -> DeadLetter:
    """The letter for a delivery that nobody can handle. Any delivery has one."""
    body = delivery.body
    if len(body) > MAX_KEPT_BYTES:
        whole = hashlib.sha256(body).hexdigest()
        message = f"{message} (kept {MAX_KEPT_BYTES} of {len(body)} bytes, sha256 {whole})"
    return DeadLetter(
        id=_letter_id(delivery.routing_key, delivery.user_id, body),
        reason=reason[:64],
        message=_ascii(message)[:MAX_MESSAGE],
        queue=delivery.queue[:MAX_PROPERTY],
        routing_key=delivery.routing_key[:MAX_PROPERTY],
        user_id=_property(delivery.user_id),
        type=_property(delivery.type),
        content_type=_property(delivery.content_type),
        headers=_ascii(repr(dict(delivery.headers)))[:MAX_HEADERS],
        body_base64=base64.b64encode(body[:MAX_KEPT_BYTES]).decode(),
        at=datetime.now(UTC),
    )


def _letter_id(routing_key: str, user_id: str | None, body: bytes) -> str:
    digest = hashlib.sha256(repr((routing_key, user_id)).encode() + body)
    return str(uuid.UUID(bytes=digest.digest()[:16]))


def _property(text: str | None) -> str | None:
    """255 bytes that are not UTF-8 arrive as 1,020 characters."""
    return None if text is None else _ascii(text)[:MAX_PROPERTY]


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def keep_update(store: BlobStore, update: ClientUpdate, reason: str, message: str) -> None:
    """A well-formed update that belongs to no job."""
    _keep_message(
        store, f"updates.{update.site}", UPDATE_TYPE, update.site, update.to_json(), reason, message
    )
    log.warning("dead letter: update %s of %s: %s", update.update_id, update.site, message)


def keep_report(store: BlobStore, report: Evaluation, reason: str, message: str) -> None:
    """A well-formed report of a version that cannot be measured, or not by this site."""
    _keep_message(store, f"reports.{report.who}", REPORT_TYPE, report.who, report.to_json(), reason, message)
    log.warning("dead letter: report of %s on version %d: %s", report.who, report.version, message)


def _keep_message(
    store: BlobStore, key: str, kind: str, site: str, body: bytes, reason: str, message: str
) -> None:
    delivery = Delivery(
        queue=topology.UPDATES, routing_key=key, body=body, type=kind, content_type=JSON_TYPE, user_id=site
    )
    save_dead_letter(store, dead_letter(delivery, reason, message))
    reach(Point.LETTER_KEPT)


def requeue(store: BlobStore, send: celery.Send, letter: DeadLetter) -> str:
    """Send the message of `letter` on its way again. Returns the name of the task.

    Raises BadMessage if it is nothing that could be sent; NotFound if the letter was deleted; StoreUnavailable,
    BrokerUnavailable. The letter waits on, then.
    """
    name, arguments = task_of(letter)
    number, began = begin_requeue(store, letter.id)
    reach(Point.REQUEUE_BEGAN)
    send(name, arguments)
    reach(Point.REQUEUE_SENT)
    finish_requeue(store, number, began)
    return name


def task_of(letter: DeadLetter) -> tuple[str, dict[str, str]]:
    """The task that the message of `letter` is, or becomes. Raises BadMessage, saying why it is none."""
    body = base64.b64decode(letter.body_base64)
    if _letter_id(letter.routing_key, letter.user_id, body) != letter.id:
        raise BadMessage(
            f"the first {len(body)} bytes are not the whole message: let its sender repeat it", "cut"
        )
    name = _TASK_OF_KEY.get(letter.routing_key)
    if name is not None and letter.queue != topology.UPDATES:
        return name, _arguments(name, body)
    delivery = Delivery(
        queue=letter.queue,
        routing_key=letter.routing_key,
        body=body,
        type=letter.type,
        content_type=letter.content_type,
        user_id=letter.user_id,
    )
    return task_for(delivery)


def _arguments(name: str, body: bytes) -> dict[str, str]:
    """From Celery's body (protocol 2, JSON) or from the embedded queue's. Raises BadMessage."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"the body of task {name} is not JSON: {exc}") from exc
    match content:
        case [[], dict(arguments), dict()]:
            pass
        case {"task": str(task), "arguments": dict(arguments)} if task == name:
            pass
        case _:
            raise BadMessage(f"the body is not that of a task {name}")
    if not all(isinstance(value, str) for value in arguments.values()):
        raise BadMessage(f"an argument of task {name} is not text")
    return arguments
