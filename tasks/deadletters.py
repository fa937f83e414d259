"""fedqueue.keep_dead_letter: what could not be handled goes to the store, whole, with its reason.

A letter's id is made from its content, so that a message that is delivered twice leaves one letter.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import uuid
from datetime import UTC, datetime
from typing import Any

from federation.types import ClientUpdate, DeadLetter
from federation.wire import Delivery
from storage.blob import BlobStore
from storage.jobs import save_dead_letter
from tasks import celery
from tasks.context import current

log = logging.getLogger("fedqueue.deadletters")

MAX_KEPT_BYTES = 16 * 1024
MAX_HEADERS = 4096
MAX_MESSAGE = 2000
"""Of a body, of the headers' text and of the explanation. Ours have 4 KB; of a larger body the beginning, the
length and the digest are kept. A letter is a message itself, JSON within a task's JSON, where a character of
ASCII takes four bytes at most and others up to twelve. So it stays below the 64 KB of docker/rabbitmq.conf,
whatever a site sent: a letter that the broker refuses would end the ingress, again after every restart."""


@celery.task(celery.KEEP_DEAD_LETTER)
def keep_dead_letter(self: Any, letter: str) -> None:
    """`letter`: a DeadLetter as JSON."""
    parsed = DeadLetter.from_json(letter)
    save_dead_letter(current().store, parsed)
    log.warning("dead letter %s from %s: %s: %s", parsed.id, parsed.queue, parsed.reason, parsed.message)


def dead_letter(delivery: Delivery, reason: str, message: str) -> DeadLetter:
    """The letter for a delivery that nobody can handle."""
    body = delivery.body
    digest = hashlib.sha256(repr((delivery.routing_key, delivery.user_id)).encode() + body)
    if len(body) > MAX_KEPT_BYTES:
        whole = hashlib.sha256(body).hexdigest()
        message = f"{message} (kept {MAX_KEPT_BYTES} of {len(body)} bytes, sha256 {whole})"
    return DeadLetter(
        id=str(uuid.UUID(bytes=digest.digest()[:16])),
        reason=reason[:64],
        message=_ascii(message)[:MAX_MESSAGE],
        queue=delivery.queue[:255],
        routing_key=delivery.routing_key[:255],
        user_id=delivery.user_id,
        content_type=delivery.content_type,
        headers=_ascii(repr(dict(delivery.headers)))[:MAX_HEADERS],
        body_base64=base64.b64encode(body[:MAX_KEPT_BYTES]).decode(),
        at=datetime.now(UTC),
    )


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def keep_update(store: BlobStore, update: ClientUpdate, reason: str, message: str) -> None:
    """A well-formed update that belongs to no job."""
    delivery = Delivery(
        queue="fed.updates", routing_key=f"updates.{update.site}", user_id=update.site, body=update.to_json()
    )
    save_dead_letter(store, dead_letter(delivery, reason, message))
    log.warning("dead letter: update %s of %s: %s", update.update_id, update.site, message)
