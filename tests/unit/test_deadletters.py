"""A dead letter keeps what matters, and is never too large for the broker to carry."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from kombu.utils.json import dumps

from federation.types import DeadLetter
from federation.wire import Delivery
from tasks.deadletters import MAX_KEPT_BYTES, dead_letter

CONF = Path(__file__).parents[2] / "docker" / "rabbitmq.conf"
LARGEST = int(re.findall(r"^max_message_size = (\d+)$", CONF.read_text(), re.MULTILINE)[0])
ENVELOPE = 2048  # what Celery puts around a task's arguments


@pytest.mark.parametrize("text", ["a", "\\", '"', "\0", "é", "\U0001f600"])
def test_whatever_a_site_sends_the_broker_carries_its_letter(text: str) -> None:
    delivery = Delivery(
        queue="fed.updates",
        routing_key="updates.site-a",
        user_id="site-a",
        content_type=text * (255 // len(text.encode())),
        headers={text * 20_000: text * 20_000},
        body=b"\xff" * LARGEST,
    )
    letter = dead_letter(delivery, "malformed-message", text * 5000).to_json().decode()
    as_task = dumps([[], {"letter": letter}, {"callbacks": None, "errbacks": None}])
    assert len(as_task.encode()) + ENVELOPE < LARGEST
    assert DeadLetter.from_json(letter).routing_key == "updates.site-a"


def test_a_large_body_leaves_its_beginning_its_length_and_its_digest() -> None:
    body = bytes(range(256)) * 128
    letter = dead_letter(Delivery(queue="fed.updates", routing_key="updates.site-a", body=body), "r", "why")
    assert base64.b64decode(letter.body_base64) == body[:MAX_KEPT_BYTES]
    assert letter.message == (
        f"why (kept {MAX_KEPT_BYTES} of {len(body)} bytes, sha256 {hashlib.sha256(body).hexdigest()})"
    )


def test_the_same_message_twice_is_one_letter() -> None:
    delivery = Delivery(queue="fed.updates", routing_key="updates.site-a", body=b"x")
    again = Delivery(queue="fed.updates", routing_key="updates.site-a", body=b"x", attempts=2)
    other = Delivery(queue="fed.updates", routing_key="updates.site-b", body=b"x")
    assert dead_letter(delivery, "r", "m").id == dead_letter(again, "r", "m").id
    assert dead_letter(delivery, "r", "m").id != dead_letter(other, "r", "m").id
