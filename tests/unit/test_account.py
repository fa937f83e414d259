"""What a job cost, counted from its log as the tasks write it; and a store that counts what is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.sqlite import SqliteBroker
from federation.errors import BadPayload, NotFound
from federation.settings import Settings
from federation.types import ClientUpdate, Transfer
from storage.account import Account, accounts, total
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.metered import MeteredStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.closing import close
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tests.factories import ALPHA, client_update, job_spec, payload_of, toy_arrays


class Job:
    """Job toy, and sites that send to it."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore()
        broker = SqliteBroker(folder / "queue.db")
        broker.declare()
        self.context = Context(Settings(), self.store, broker, lambda name, arguments: None)
        ref = save_model(self.store, "toy", from_arrays(toy_arrays()))
        self.job = create(self.context, job_spec(), ref, ref)

    def send(self, site: str, transfer: Transfer | None = None, **changes: object) -> ClientUpdate:
        payload = payload_of(toy_arrays(1.0))
        update = client_update(payload, site=site, transfer=transfer, **changes)
        self.store.put(update.payload_key, payload)
        accept(self.context, update)
        return update

    def publish(self) -> None:
        publish_pending(self.context, self.job)

    def accounts(self) -> dict[str, Account]:
        return accounts(VersionLog(self.store, "toy").history())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def size(*updates: ClientUpdate) -> int:
    return sum(update.payload_bytes + len(update.to_json()) for update in updates)


def test_a_job_without_updates_cost_nothing(job: Job) -> None:
    assert job.accounts() == {}
    assert total([]) == Account()
    assert Account().ratio is None


def test_bytes_and_updates_are_counted_per_site_once_each(job: Job) -> None:
    first = job.send("site-b", Transfer(downloaded_bytes=1000, image_bytes=50_000))
    job.publish()
    second = job.send("site-b", Transfer(downloaded_bytes=500, image_bytes=60_000), base_version=0)
    other = job.send("site-a", Transfer(downloaded_bytes=70, image_bytes=7_000_000), base_version=1)
    accept(job.context, other)  # which comes twice
    job.publish()
    found = job.accounts()
    assert list(found) == ["site-a", "site-b"]
    b = found["site-b"]
    assert (b.merged, b.rejected, b.staleness, b.mean_staleness, b.weight) == (2, 0, 1, 0.5, 2 * ALPHA)
    assert b.uploaded_bytes == size(first, second)
    assert (b.downloaded_bytes, b.image_bytes, b.untold) == (1500, 60_000, 0)
    assert b.travelled_bytes == size(first, second) + 1500
    assert b.ratio == 60_000 / b.travelled_bytes
    assert b.last is not None
    assert (b.last.update, b.last.version) == (second, 2)
    whole = total(found.values())
    assert (whole.merged, whole.staleness) == (3, 2)
    assert whole.uploaded_bytes == size(first, second, other)
    assert (whole.downloaded_bytes, whole.image_bytes) == (1570, 7_060_000)


def test_what_is_refused_has_travelled_too(job: Job) -> None:
    at_once = job.send("site-a", base_version=7)  # of the future
    later = job.send("site-a", payload_sha256="0" * 64)
    assert job.accounts()["site-a"].uploaded_bytes == size(at_once, later)
    assert job.accounts()["site-a"].rejected == 1
    job.publish()
    account = job.accounts()["site-a"]
    assert (account.merged, account.rejected) == (0, 2)
    assert account.uploaded_bytes == size(at_once, later)


def test_who_does_not_tell_is_not_counted_as_nothing(job: Job) -> None:
    job.send("site-a")
    account = job.accounts()["site-a"]
    assert (account.untold, account.image_bytes, account.ratio) == (1, 0, None)
    job.send("site-a", Transfer(downloaded_bytes=3, image_bytes=0))
    account = job.accounts()["site-a"]
    assert (account.untold, account.downloaded_bytes, account.image_bytes) == (2, 3, 0)


def test_a_metered_store_counts_what_was_read_since_the_last_look(tmp_path: Path) -> None:
    store = MeteredStore(MemoryStore())
    store.put("a", b"12345")
    assert store.put_if_absent("b", b"1" * 100)
    assert (store.size("b"), list(store.list(""))) == (100, ["a", "b"])
    assert store.take() == 0
    store.get("a", max_bytes=5)
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    store.take()
    store.get("a", max_bytes=5)
    store.get_to_file(ref.key, tmp_path / "model", nbytes=ref.nbytes, sha256=ref.sha256)
    for missing in (
        lambda: store.get("none", max_bytes=5),
        lambda: store.get_to_file("none", tmp_path / "x", nbytes=1, sha256="0" * 64),
    ):
        with pytest.raises(NotFound):
            missing()
    with pytest.raises(BadPayload):
        store.get_to_file("a", tmp_path / "x", nbytes=5, sha256="0" * 64)
    assert store.take() == 5 + ref.nbytes
    assert store.take() == 0


def test_what_waits_when_the_job_is_closed_was_sent_once(job: Job) -> None:
    waiting = job.send("site-a", Transfer(downloaded_bytes=70, image_bytes=900))
    close(job.context, job.job, "enough")
    a = job.accounts()["site-a"]
    assert (a.merged, a.rejected, a.uploaded_bytes) == (0, 1, size(waiting))
    assert (a.downloaded_bytes, a.image_bytes, a.untold) == (70, 900, 0)
