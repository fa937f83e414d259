"""Any BlobStore with faults made on purpose (federation/faults.py): for tests, never for real data.

What a fault looks like here, beyond its definition:

- A failing call raises StoreUnavailable. A listing that fails after: all keys came, then the error.
- A stale read shows how the object was before its last write through this wrapper: other bytes, or nothing. Only
  the last few keys that were written can be stale. A stale listing shows all of them as they were. Each stale
  answer is one answer; the next read is fresh unless the plan says otherwise.
- A truncated download is the short read that it is for a real store: BadPayload, and no file appears.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from federation.errors import FedqueueError, NotFound, StoreUnavailable
from federation.faults import DELAY_S, Fault, FaultPlan, Injector
from storage.blob import BlobStore
from storage.files import Buffer
from storage.key_rules import check_key, check_prefix
from storage.memory import MemoryStore

RECENT_KEYS = 4
"""So many of the keys that were written last can be read stale."""
REMEMBERED_BYTES = 1 << 20
"""Larger objects that were replaced or deleted are not kept, and so are never stale."""


class FaultyStore:
    """BlobStore over `inner`. Safe for threads if `inner` is.

    A put or a delete reads the object first, for stale reads to come.
    """

    def __init__(
        self,
        inner: BlobStore,
        plan: FaultPlan,
        *,
        delay_s: float = DELAY_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner = inner
        self._injector = Injector(plan, StoreUnavailable, delay_s, sleep)
        self._past: dict[str, MemoryStore] = {}  # key -> a store as it was before the key's last write
        self._random = random.Random(0)  # where reads are cut
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counter[Fault]:
        """The faults that took effect."""
        return self._injector.counts

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with self._injector.call("get", check_key(key)) as fault:
            return self._source(fault, key, max_bytes).get(key, max_bytes=max_bytes)

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        with self._injector.call("get_to_file", check_key(key)) as fault:
            self._source(fault, key, sys.maxsize).get_to_file(key, path, nbytes=nbytes, sha256=sha256)

    def size(self, key: str) -> int:
        with self._injector.call("size", check_key(key)) as fault:
            return self._source(fault, key).size(key)

    def modified(self, key: str) -> datetime:
        with self._injector.call("modified", check_key(key)) as fault:
            return self._source(fault, key).modified(key)

    def put(self, key: str, data: Buffer) -> None:
        with self._injector.call("put", check_key(key)), self._replacing(key):
            self._inner.put(key, data)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        with self._injector.call("put_if_absent", check_key(key)):
            written = self._inner.put_if_absent(key, data)
            if written:
                self._remember(key, MemoryStore())
            return written

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        check_prefix(prefix)
        return self._list(prefix, start_after)

    def delete(self, key: str) -> None:
        with self._injector.call("delete", check_key(key)), self._replacing(key):
            self._inner.delete(key)

    def _list(self, prefix: str, start_after: str) -> Iterator[str]:
        with self._injector.call("list", prefix) as fault:
            keys = self._inner.list(prefix, start_after=start_after)
            yield from self._earlier(keys, prefix, start_after) if fault is Fault.STALE else keys

    def _earlier(self, keys: Iterator[str], prefix: str, start_after: str) -> Iterator[str]:
        with self._lock:
            past = dict(self._past)
        now = set(keys)
        then = now - past.keys()
        for store in past.values():
            then.update(store.list(prefix, start_after=start_after))
        if then != now:
            self._injector.count(Fault.STALE)
        return iter(sorted(then))

    def _source(self, fault: Fault | None, key: str, max_bytes: int = 0) -> BlobStore:
        """Where `key` is read: the real store, or one that shows what `fault` makes of it."""
        if fault is Fault.STALE:
            with self._lock:
                past = self._past.get(key)
            if past is not None:
                self._injector.count(fault)
                return past
        if fault is Fault.TRUNCATE:
            whole = self._inner.get(key, max_bytes=max_bytes)
            if whole:
                self._injector.count(fault)
                short = MemoryStore()
                short.put(key, whole[: self._random.randrange(len(whole))])
                return short
        return self._inner

    @contextmanager
    def _replacing(self, key: str) -> Iterator[None]:
        """Around a write: what was there before becomes the past of `key`."""
        try:
            data, at = self._inner.get(key, max_bytes=REMEMBERED_BYTES), self._inner.modified(key)
        except NotFound:
            past = MemoryStore()
        except FedqueueError:  # too large, or not to be read by this account: no reason to fail the write
            yield
            return
        else:
            past = MemoryStore(clock=lambda: at)
            past.put(key, data)
        yield
        self._remember(key, past)

    def _remember(self, key: str, past: MemoryStore) -> None:
        with self._lock:
            self._past.pop(key, None)
            self._past[key] = past
            while len(self._past) > RECENT_KEYS:
                del self._past[next(iter(self._past))]
