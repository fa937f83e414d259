"""A store that counts the bytes that are read from it: what a site downloads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from storage.blob import BlobStore
from storage.files import Buffer


class MeteredStore:
    """BlobStore over `inner`. Safe for threads if `inner` is.

    Counted is the content of objects that were read whole; listings, headers and broken downloads are not.
    """

    def __init__(self, inner: BlobStore) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._read_bytes = 0

    def take(self) -> int:
        """Bytes read since the last call."""
        with self._lock:
            taken, self._read_bytes = self._read_bytes, 0
        return taken

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._read_bytes += nbytes

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = self._inner.get(key, max_bytes=max_bytes)
        self._count(len(data))
        return data

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        self._inner.get_to_file(key, path, nbytes=nbytes, sha256=sha256)
        self._count(nbytes)

    def size(self, key: str) -> int:
        return self._inner.size(key)

    def modified(self, key: str) -> datetime:
        return self._inner.modified(key)

    def put(self, key: str, data: Buffer) -> None:
        self._inner.put(key, data)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        return self._inner.put_if_absent(key, data)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        return self._inner.list(prefix, start_after=start_after)

    def delete(self, key: str) -> None:
        self._inner.delete(key)
