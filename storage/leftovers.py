"""What belongs to no job's log and may go, each older than a grace time by the store's clock.

    answers/<who>/<request_id>.json    whoever asked has read it, or asks no more
    jobs/<job>/updates/…               if there is no such job: uploaded for a submission that was never sent

No log orders these deletions, and none has to. A request that comes again after its answer has gone is handled again,
which every handler must bear. A submission that comes after its files have gone is refused, because they are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

from federation.errors import NotFound
from federation.keys import ANSWERS_PREFIX, job_key, updates_prefix
from storage.blob import BlobStore
from storage.jobs import job_ids
from storage.retention import Garbage, store_time

ANSWERED = "the answer to a request of long ago"
NEVER_SENT = "uploaded for a job that was never made"


def leftovers(
    store: BlobStore, grace: timedelta, stop: Callable[[], bool] = lambda: False
) -> Iterator[Garbage]:
    """Lazily, until `stop()`; whoever takes one may delete it. Raises StoreUnavailable.

    Changes nothing, but for an object below _probe/, written and removed to learn the store's time.
    """
    now = store_time(store)
    for found in (_answers(store, now, grace), _unsent(store, now, grace)):
        for item in found:
            if stop():
                return
            yield item


def _answers(store: BlobStore, now: datetime, grace: timedelta) -> Iterator[Garbage]:
    """A request's id begins with its time, so those of one asker come by age, and the first young one is the end."""
    after = ""
    while key := next(iter(store.list(ANSWERS_PREFIX, start_after=after)), None):
        who = key.removeprefix(ANSWERS_PREFIX).partition("/")[0]
        for answer in store.list(f"{ANSWERS_PREFIX}{who}/"):
            item = _old(store, answer, ANSWERED, now, grace)
            if item is None:
                break
            yield item
        after = f"{ANSWERS_PREFIX}{who}0"  # "0" comes right after "/"


def _unsent(store: BlobStore, now: datetime, grace: timedelta) -> Iterator[Garbage]:
    for job_id in job_ids(store):
        if _exists(store, job_key(job_id)):
            continue
        for upload in store.list(updates_prefix(job_id)):
            item = _old(store, upload, NEVER_SENT, now, grace)
            if item is not None and not _exists(store, job_key(job_id)):
                yield item


def _old(store: BlobStore, key: str, why: str, now: datetime, grace: timedelta) -> Garbage | None:
    try:
        age = now - store.modified(key)
        return Garbage(key, why, store.size(key), age) if age > grace else None
    except NotFound:  # somebody else has just removed it
        return None


def _exists(store: BlobStore, key: str) -> bool:
    try:
        store.size(key)
    except NotFound:
        return False
    return True
