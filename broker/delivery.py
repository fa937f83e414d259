"""From what pika delivers to a Delivery of plain values, whatever a sender put into the properties.

pika gives bytes for strings that are not UTF-8, Decimal and datetime for their AMQP types, and tables of any
depth. Here everything becomes str, int, float, bool, None, list or dict with str keys, so that it can
be logged and stored as JSON. Nothing is judged: federation/wire.py does that.
"""

from __future__ import annotations

from typing import Any

from federation.wire import Delivery

DELIVERY_COUNT = "x-delivery-count"
MAX_DEPTH = 8
"""Tables nested deeper end in "…". RabbitMQ's own x-death header has depth 3."""


def delivery_of(queue: str, method: Any, properties: Any, body: bytes | None) -> Delivery:
    """`method` is pika's Basic.Deliver or Basic.GetOk, `properties` its BasicProperties."""
    headers = plain(properties.headers or {})
    return Delivery(
        queue=queue,
        routing_key=_text(method.routing_key) or "",
        body=body or b"",
        type=_text(properties.type),
        content_type=_text(properties.content_type),
        message_id=_text(properties.message_id),
        user_id=_text(properties.user_id),
        headers=headers if isinstance(headers, dict) else {},
        attempts=attempts_of(bool(method.redelivered), headers.get(DELIVERY_COUNT)),
    )


def attempts_of(redelivered: bool, delivery_count: object) -> int:
    """Deliveries, this one included: a quorum queue counts the earlier ones, a classic one only flags them.

    A sender may forge the header; on a first delivery it is not read, and afterwards the broker has set it.
    """
    if not redelivered:
        return 1
    if isinstance(delivery_count, int) and not isinstance(delivery_count, bool) and delivery_count > 0:
        return delivery_count + 1
    return 2


def plain(value: object, depth: int = 0) -> Any:
    """`value` in terms of JSON; bytes that are not UTF-8 keep their bytes as \\xNN."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, (dict, list)) and depth >= MAX_DEPTH:
        return "…"
    if isinstance(value, dict):
        return {str(_text(key)): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    return str(value)  # Decimal, datetime


def _text(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)
