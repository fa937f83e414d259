"""A store to look at: it is asked again when it does not answer, and never written.

For audit and replay, which read for minutes or hours: one dropped connection must not cost the whole run, and
a mistake in them must not cost the job.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from federation.errors import AccessDenied, StoreUnavailable
from storage.blob import BlobStore
from storage.files import Buffer

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT_S = 0.25


class ReadOnlyStore:
    """BlobStore over `inner`. A read that raises StoreUnavailable is repeated for some 8 seconds, then it is raised."""

    def __init__(self, inner: BlobStore, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._inner = inner
        self._sleep = sleep

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._patiently(lambda: self._inner.get(key, max_bytes=max_bytes))

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        self._patiently(lambda: self._inner.get_to_file(key, path, nbytes=nbytes, sha256=sha256))

    def size(self, key: str) -> int:
        return self._patiently(lambda: self._inner.size(key))

    def modified(self, key: str) -> datetime:
        return self._patiently(lambda: self._inner.modified(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        """A listing that breaks off goes on after its last key."""
        failed = 0
        while True:
            try:
                for key in self._inner.list(prefix, start_after=start_after):
                    start_after = key
                    failed = 0
                    yield key
                return
            except StoreUnavailable as exc:
                failed += 1
                self._wait(failed, exc)

    def put(self, key: str, data: Buffer) -> None:
        raise _refused(key)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        raise _refused(key)

    def delete(self, key: str) -> None:
        raise _refused(key)

    def _patiently(self, request: Callable[[], T]) -> T:
        failed = 0
        while True:
            try:
                return request()
            except StoreUnavailable as exc:
                failed += 1
                self._wait(failed, exc)

    def _wait(self, failed: int, error: StoreUnavailable) -> None:
        """After failure number `failed` in a row. Raises it if it was one too many."""
        if failed == ATTEMPTS:
            raise error
        self._sleep(FIRST_WAIT_S * 2.0 ** (failed - 1) * random.uniform(0.5, 1.0))


def _refused(key: str) -> AccessDenied:
    return AccessDenied(f"{key}: this store was opened for reading only")
