"""A bucket in this process's memory: for tests and simulations."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from federation.errors import BadPayload, NotFound
from storage.files import Buffer, verified
from storage.key_rules import check_key, check_prefix


class MemoryStore:
    """BlobStore over a dict. Safe for threads."""

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """`clock`: what `modified` goes by."""
        self._objects: dict[str, bytes] = {}
        self._modified: dict[str, datetime] = {}
        self._clock = clock
        self._lock = threading.Lock()

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = self._find(key)
        if len(data) > max_bytes:
            raise BadPayload(f"{key} has {len(data)} bytes, at most {max_bytes} are read", "too-large")
        return data

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        data = self._find(key)
        with verified(path, key, nbytes=nbytes, sha256=sha256) as sink:
            sink(data)

    def size(self, key: str) -> int:
        return len(self._find(key))

    def modified(self, key: str) -> datetime:
        self._find(key)
        return self._modified[key]

    def put(self, key: str, data: Buffer) -> None:
        with self._lock:
            self._objects[check_key(key)] = bytes(data)
            self._modified[key] = self._clock()

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = bytes(data)
            self._modified[key] = self._clock()
            return True

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        check_prefix(prefix)
        return self._list(prefix, start_after)

    def _list(self, prefix: str, start_after: str) -> Iterator[str]:
        with self._lock:
            keys = sorted(self._objects)
        for key in keys[bisect.bisect_right(keys, start_after) :]:
            if key.startswith(prefix):
                yield key

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def _find(self, key: str) -> bytes:
        with self._lock:
            data = self._objects.get(check_key(key))
        if data is None:
            raise NotFound(f"{key} is not in the store")
        return data
