"""The port to the object store: keys to immutable or last-writer-wins bytes.

Every implementation passes tests/contract/test_blobstore.py. Behaviour that all promise:

- A read after a successful write sees it (strong consistency), listings included.
- A failed or interrupted write leaves the old object or none, never a part.
- Keys are relative paths of [A-Za-z0-9._-] segments joined by "/"; an empty segment, "." or ".." raises
  ValueError before anything is touched.
- Errors: StoreUnavailable (retry), AccessDenied (fatal), NotFound. Nothing else escapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol


class BlobStore(Protocol):
    """A bucket."""

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """The whole object.

        Raises NotFound; BadPayload ("too-large") if the store says that it is larger than `max_bytes`,
        before a byte of it is read.
        """
        ...

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        """Stream the object to `path`, which appears whole and verified or not at all.

        Raises NotFound; BadPayload ("wrong-size" | "wrong-digest") if it is not what was declared.
        """
        ...

    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFound."""
        ...

    def modified(self, key: str) -> datetime:
        """When the object was last written, by the store's clock (UTC). Raises NotFound."""
        ...

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write, replacing what is there: for metrics and hints only."""
        ...

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Write only if no object has this key, durably. Of concurrent writers exactly one gets True.

        False: an object is there. It may be ours, if the reply to an earlier attempt was lost: whoever
        has to know reads it back. Raises StoreUnavailable when it cannot tell; call again with the same
        bytes until it can.
        """
        ...

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        """Keys that begin with `prefix` and sort after `start_after`, in ascending byte order, lazily."""
        ...

    def delete(self, key: str) -> None:
        """Remove; silent if it is not there."""
        ...
