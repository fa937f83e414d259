"""Reading twice before an object is called broken, because that is final: it ends the process, or the update."""

from __future__ import annotations

from federation.errors import BadPayload, NotFound, StoreUnavailable
from storage.blob import BlobStore


def confirm(store: BlobStore, key: str, data: bytes, max_bytes: int) -> None:
    """Raises StoreUnavailable unless a second reading gives `data` again: then only the first reading failed."""
    try:
        again: bytes | None = store.get(key, max_bytes=max_bytes)
    except (NotFound, BadPayload):
        again = None
    if again != data:
        raise StoreUnavailable(f"{key} was read incompletely")
