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

MAX_KEPT_BYTES = 64 * 1024
"""Of a body. Ours have 4 KB; of a larger one the beginning, the length and the digest are kept."""


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
        message=message[:2000],
        queue=delivery.queue[:255],
        routing_key=delivery.routing_key[:255],
        user_id=delivery.user_id,
        content_type=delivery.content_type,
        headers=repr(dict(delivery.headers))[:8192],
        body_base64=base64.b64encode(body[:MAX_KEPT_BYTES]).decode(),
        at=datetime.now(UTC),
    )


def keep_update(store: BlobStore, update: ClientUpdate, reason: str, message: str) -> None:
    """A well-formed update that belongs to no job."""
    delivery = Delivery(
        queue="fed.updates", routing_key=f"updates.{update.site}", user_id=update.site, body=update.to_json()
    )
    save_dead_letter(store, dead_letter(delivery, reason, message))
    log.warning("dead letter: update %s of %s: %s", update.update_id, update.site, message)
