"""Reading twice before an object is called broken, because that is final: it ends the process, or the update."""

from __future__ import annotations

from typing import TypeVar

from federation.base import Value
from federation.errors import BadPayload, CorruptLog, NotFound, Rejected, StoreUnavailable
from storage.blob import BlobStore

V = TypeVar("V", bound=Value)

MAX_OBJECT_BYTES = 16 << 20
"""No JSON object but a log record is ever near it."""


def confirm(store: BlobStore, key: str, data: bytes, max_bytes: int) -> None:
    """Raises StoreUnavailable unless a second reading gives `data` again: then only the first reading failed."""
    try:
        again: bytes | None = store.get(key, max_bytes=max_bytes)
    except (NotFound, BadPayload):
        again = None
    if again != data:
        raise StoreUnavailable(f"{key} was read incompletely")


def load_value(store: BlobStore, key: str, kind: type[V]) -> V:
    """The value that an object holds. Raises NotFound, CorruptLog if it is none of this kind."""
    data = store.get(key, max_bytes=MAX_OBJECT_BYTES)
    try:
        return kind.from_json(data)
    except Rejected as exc:
        confirm(store, key, data, MAX_OBJECT_BYTES)
        raise CorruptLog(f"{key}: {exc}") from exc
