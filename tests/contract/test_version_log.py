"""The version log over every store: one order, no gaps, nothing twice, whatever the network does."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from federation.errors import BadSettings, Conflict, CorruptLog, NotFound, StoreUnavailable
from federation.ids import new_update_id
from federation.jobs import ModelRef
from federation.keys import log_key, model_key, update_key
from federation.settings import Settings
from federation.types import (
    Accepted,
    ClientUpdate,
    Closed,
    Contribution,
    Created,
    Event,
    Head,
    LogRecord,
    ModelVersion,
    Published,
    Refusal,
    Refused,
)
from storage import log as log_module
from storage.blob import BlobStore
from storage.folder import FolderStore
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.open import create_bucket, open_store
from tests.servers.rgw import Rgw

JOB = "job"
AT = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
_number = itertools.count()


@pytest.fixture(params=["memory", "folder", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    settings = Settings(
        store_url=server.url(f"log-{next(_number)}"),
        store_access_key=server.admin.access_key,
        store_secret_key=SecretStr(server.admin.secret_key),
    )
    create_bucket(settings)
    return open_store(settings)


def head(version: int) -> Head:
    digest = f"{version:064x}"
    ref = ModelRef(key=model_key(JOB, digest), sha256=digest, nbytes=8)
    return Head(current=ModelVersion(version=version, model=ref))


def contribution(update_id: str | None = None) -> Contribution:
    update_id = update_id or new_update_id()
    update = ClientUpdate(
        update_id=update_id,
        job=JOB,
        site="north",
        base_version=0,
        num_examples=1,
        payload_kind="weights",
        payload_key=update_key(JOB, "north", update_id),
        payload_sha256="0" * 64,
        payload_bytes=8,
        created_at=AT,
    )
    return Contribution(update=update, staleness=0, weight=0.6, version=1)


def refusal(update_id: str) -> Refusal:
    return Refusal(update=contribution(update_id).update, reason="too-stale", message="m", version=0)


class FaultyStore(MemoryStore):
    """Fails as the test says: "lost" writes and then loses the reply, "down" does nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "down":
            raise StoreUnavailable("down")
        written = super().put_if_absent(key, data)
        if fault == "lost":
            raise StoreUnavailable("the reply was lost")
        return written and fault != "refused"  # "refused": a store that resent the request by itself

    def get(self, key: str, *, max_bytes: int) -> bytes:
        if self.faults and self.faults[0] == "unreadable":
            self.faults.pop(0)
            raise StoreUnavailable("down")
        return super().get(key, max_bytes=max_bytes)


# --- every store -----------------------------------------------------------------------------------------


def test_a_job_without_a_log_is_not_found(store: BlobStore) -> None:
    log = VersionLog(store, JOB)
    for look in (
        log.head,
        lambda: list(log.history()),
        lambda: log.find(new_update_id()),
        lambda: log.version(0),
    ):
        with pytest.raises(NotFound, match="has no log"):
            look()


def test_records_follow_one_another(store: BlobStore) -> None:
    log = VersionLog(store, JOB, clock=lambda: AT)
    created = log.create(head(0))
    assert (created.seq, created.event, created.head, created.at) == (0, Created(), head(0), AT)
    appended = log.append(created, Closed(reason="enough"), head(1))
    assert (appended.seq, appended.job) == (1, JOB)
    other = VersionLog(store, JOB)
    assert other.head() == log.head() == appended
    assert list(other.history()) == [created, appended]
    assert list(other.history(1)) == other.follow(0) == [appended]
    assert list(other.history(2)) == other.follow(1) == []
    assert list(store.list("")) == [log_key(JOB, 0), log_key(JOB, 1)]


def test_a_log_sees_what_others_append(store: BlobStore) -> None:
    writer, reader = VersionLog(store, JOB), VersionLog(store, JOB)
    record = writer.create(head(0))
    assert reader.head() == record
    for version in (1, 2, 3):
        record = writer.append(record, Closed(reason="r"), head(version))
    assert reader.head() == record
    assert [r.head.version for r in reader.follow(1)] == [2, 3]


def test_only_one_of_two_can_follow_a_head(store: BlobStore) -> None:
    first, second = VersionLog(store, JOB), VersionLog(store, JOB)
    begin = first.create(head(0))
    won = first.append(begin, Closed(reason="first"), head(1))
    with pytest.raises(Conflict, match="another writer"):
        second.append(begin, Closed(reason="second"), head(1))
    with pytest.raises(Conflict):  # the same words are still not the same record
        second.append(begin, Closed(reason="first"), head(1))
    assert second.head() == won
    assert second.append(won, Closed(reason="second"), head(2)).seq == 2


def test_creating_again_is_harmless_and_another_beginning_is_a_conflict(store: BlobStore) -> None:
    begin = VersionLog(store, JOB).create(head(0))
    assert VersionLog(store, JOB).create(head(0)) == begin
    newest = VersionLog(store, JOB).append(begin, Closed(reason="r"), head(1))
    assert VersionLog(store, JOB).create(head(0)) == newest
    with pytest.raises(Conflict):
        VersionLog(store, JOB).create(head(7))


def test_concurrent_appenders_leave_no_gap_and_lose_nothing(store: BlobStore) -> None:
    VersionLog(store, JOB).create(head(0))
    appenders, each = 4, 6
    gate = threading.Barrier(appenders)

    def append(writer: int) -> list[int]:
        log, done = VersionLog(store, JOB), []
        gate.wait()
        for n in range(each):
            while True:
                newest = log.head()
                try:
                    record = log.append(newest, Closed(reason=f"{writer}/{n}"), head(newest.head.version + 1))
                except Conflict:
                    continue
                done.append(record.seq)
                break
        return done

    with ThreadPoolExecutor(appenders) as pool:
        done = list(pool.map(append, range(appenders)))
    records = list(VersionLog(store, JOB).history())
    assert [r.seq for r in records] == [r.head.version for r in records] == list(range(appenders * each + 1))
    assert sorted(itertools.chain(*done)) == list(range(1, appenders * each + 1))
    reasons = {r.event.reason for r in records if isinstance(r.event, Closed)}
    assert reasons == {f"{w}/{n}" for w in range(appenders) for n in range(each)}


def test_an_update_is_found_by_the_newest_record_that_names_it(store: BlobStore) -> None:
    log = VersionLog(store, JOB)
    a, b, c, d = sorted(new_update_id() for _ in range(4))
    events: list[Event] = [
        Accepted(contribution=contribution(a)),
        Accepted(contribution=contribution(b)),
        Refused(refusal=refusal(c)),
        Published(merged=(contribution(a),), refused=(refusal(b),)),
    ]
    record = log.create(head(0))
    for event in events:
        record = log.append(record, event, head(1))
    found = {update_id: log.find(update_id) for update_id in (a, b, c, d)}
    assert {k: v and v.seq for k, v in found.items()} == {a: 4, b: 4, c: 3, d: None}
    VersionLog(store, JOB).append(record, Refused(refusal=refusal(d)), head(1))
    newest = log.find(d)
    assert newest is not None, "what another process appended since the last search is found"
    assert newest.seq == 5


def test_a_search_reads_no_record_twice() -> None:
    class Counting(MemoryStore):
        reads = 0

        def get(self, key: str, *, max_bytes: int) -> bytes:
            self.reads += 1
            return super().get(key, max_bytes=max_bytes)

    store = Counting()
    log = VersionLog(store, JOB)
    record = log.create(head(0))
    for _ in range(20):
        record = log.append(record, Accepted(contribution=contribution(new_update_id())), head(0))
    store.reads = 0
    for _ in range(10):
        assert log.find(new_update_id()) is None
    assert store.reads == 21
    mine = new_update_id()
    record = log.append(record, Accepted(contribution=contribution(mine)), head(0))
    assert log.find(new_update_id()) is None
    assert store.reads == 21, "not even its own"
    assert log.find(mine) == record


def test_a_record_that_was_read_incompletely_is_no_corrupt_log() -> None:
    class Garbling(MemoryStore):
        garbled = False

        def get(self, key: str, *, max_bytes: int) -> bytes:
            data = super().get(key, max_bytes=max_bytes)
            self.garbled = not self.garbled
            return data[:-5] if self.garbled else data

    store = Garbling()
    VersionLog(store, JOB).create(head(0))
    with pytest.raises(StoreUnavailable, match="incompletely"):
        VersionLog(store, JOB).head()


def test_a_stored_version_is_found_by_its_number(store: BlobStore) -> None:
    log = VersionLog(store, JOB)
    record = log.create(head(0))
    for version in (0, 0, 1, 1, 4, 4, 6):
        record = log.append(record, Closed(reason="r"), head(version))
    for version in (0, 1, 4, 6):
        assert log.version(version) == head(version).current
    for version in (2, 3, 5, 7):
        with pytest.raises(NotFound, match="no stored version"):
            log.version(version)
    found = [log.first_at(version).seq for version in range(8)]
    assert found == [0, 3, 5, 5, 5, 7, 7, 7], "the newest where none has reached it"


def test_records_are_found_by_the_time_at_which_they_were_written(store: BlobStore) -> None:
    times = iter(AT + timedelta(seconds=s) for s in (0, 10, 10, 30))
    log = VersionLog(store, JOB, clock=lambda: next(times))
    record = log.create(head(0))
    for version in (1, 2, 3):
        record = log.append(record, Closed(reason="r"), head(version))
    found = [log.first_since(AT + timedelta(seconds=s)) for s in (-1, 0, 1, 10, 11, 30, 31)]
    assert found == [0, 0, 1, 1, 3, 3, 4]


# --- what a bad network does -------------------------------------------------------------------------------


def appended(store: FaultyStore) -> tuple[VersionLog, LogRecord]:
    log = VersionLog(store, JOB)
    return log, log.create(head(0))


def test_a_refused_write_of_our_own_is_recognised() -> None:
    store = FaultyStore()
    log, begin = appended(store)
    store.faults = ["refused"]
    record = log.append(begin, Closed(reason="r"), head(1))
    assert list(log.history()) == [begin, record]


@pytest.mark.parametrize(
    "faults", [["lost"], ["down"], ["down", "lost"], ["lost", "down", "lost"], ["refused", "unreadable"]]
)
def test_an_append_can_be_repeated_until_it_is_proven(faults: list[str]) -> None:
    store = FaultyStore()
    log, begin = appended(store)
    store.faults = list(faults)
    event = Closed(reason="r")
    failures = 0
    while True:
        try:
            record = log.append(begin, event, head(1))
            break
        except StoreUnavailable:
            failures += 1
    assert failures == len(faults) - faults.count("refused")
    assert list(VersionLog(store, JOB).history()) == [begin, record]
    assert log.append(record, event, head(2)).seq == 2


def test_a_lost_create_can_be_repeated() -> None:
    store = FaultyStore()
    log = VersionLog(store, JOB)
    store.faults = ["lost"]
    with pytest.raises(StoreUnavailable):
        log.create(head(0))
    assert log.create(head(0)).seq == 0


def test_a_lost_append_is_seen_by_whoever_reads_the_head() -> None:
    store = FaultyStore()
    log, begin = appended(store)
    store.faults = ["lost"]
    with pytest.raises(StoreUnavailable):
        log.append(begin, Closed(reason="mine"), head(1))
    with pytest.raises(Conflict):  # another decision on the old head is not what was written
        log.append(begin, Closed(reason="other"), head(1))
    assert log.head().event == Closed(reason="mine")


def test_a_lost_append_does_not_claim_the_record_of_another() -> None:
    store = FaultyStore()
    log, begin = appended(store)
    store.faults = ["down"]
    with pytest.raises(StoreUnavailable):
        log.append(begin, Closed(reason="r"), head(1))
    VersionLog(store, JOB).append(begin, Closed(reason="r"), head(1))
    with pytest.raises(Conflict):
        log.append(begin, Closed(reason="r"), head(1))


# --- what a log must not be ----------------------------------------------------------------------------------


def damaged(damage: Callable[[MemoryStore], object]) -> MemoryStore:
    store = MemoryStore()
    log = VersionLog(store, JOB)
    record = log.create(head(0))
    for version in (1, 2, 3):
        record = log.append(record, Closed(reason="r"), head(version))
    damage(store)
    return store


def edit_last(store: MemoryStore, **fields: object) -> None:
    record = json.loads(store.get(log_key(JOB, 3), max_bytes=10_000))
    store.put(log_key(JOB, 3), json.dumps({**record, **fields}).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.delete(log_key(JOB, 0)), "log record 0 is missing"),
        (lambda s: s.delete(log_key(JOB, 2)), "log record 2 is missing"),
        (lambda s: s.put(log_key(JOB, 10**19), b"{}"), "log record 4 is missing"),
        (lambda s: s.put(f"jobs/{JOB}/log/note.txt", b""), "not the key of a log record"),
        (lambda s: s.put(f"jobs/{JOB}/log/a/{'0' * 20}.json", b""), "not the key of a log record"),
        (lambda s: s.put(log_key(JOB, 3), b"{}"), "is no log record"),
        (lambda s: s.put(log_key(JOB, 3), b"\xff"), "is no log record"),
        (lambda s: edit_last(s, seq=2), "says that it is record 2"),
        (lambda s: edit_last(s, job="other"), "of job 'other'"),
        (lambda s: edit_last(s, schema_version=2), "schema_version"),
    ],
)
def test_a_damaged_log_is_corrupt(damage: Callable[[MemoryStore], object], message: str) -> None:
    store = damaged(damage)
    with pytest.raises(CorruptLog, match=message):
        list(VersionLog(store, JOB).history())
    with pytest.raises(CorruptLog, match=message):
        VersionLog(store, JOB).head()


def test_a_listing_that_misses_a_record_is_not_a_gap() -> None:
    """Folders are listed while others append: record 2 may be seen and record 1 not."""

    class Overtaken(MemoryStore):
        def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
            return (key for key in super().list(prefix, start_after=start_after) if key != log_key(JOB, 1))

    store = Overtaken()
    log = VersionLog(store, JOB)
    record = log.create(head(0))
    for version in (1, 2):
        record = log.append(record, Closed(reason="r"), head(version))
    assert [r.seq for r in VersionLog(store, JOB).history()] == [0, 1, 2]


def test_no_record_is_written_that_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_RECORD_BYTES", 700)
    store = MemoryStore()
    log = VersionLog(store, JOB)
    begin = log.create(head(0))
    with pytest.raises(BadSettings, match="max_pending"):
        log.append(begin, Accepted(contribution=contribution()), head(1))
    assert log.head() == begin
    store.put(log_key(JOB, 1), b" " * 701)
    with pytest.raises(CorruptLog, match="701 bytes"):
        log.head()


@pytest.mark.s3
@pytest.mark.chaos
def test_nothing_that_was_appended_is_lost_when_the_server_is_killed() -> None:
    with Rgw("bluestore", 2 << 30) as server:
        settings = Settings(
            store_url=server.url("durable"),
            store_access_key=server.admin.access_key,
            store_secret_key=SecretStr(server.admin.secret_key),
        )
        create_bucket(settings)
        store = open_store(settings)
        log = VersionLog(store, JOB)
        record = log.create(head(0))
        written = [record]
        halfway, done = threading.Event(), threading.Event()

        def append() -> None:
            nonlocal record
            for version in range(1, 61):
                while True:
                    try:
                        record = log.append(record, Closed(reason=f"{version}"), head(version))
                        break
                    except StoreUnavailable:
                        done.wait(0.1)
                written.append(record)
                if version == 20:
                    halfway.set()

        writer = threading.Thread(target=append)
        writer.start()
        assert halfway.wait(60)
        server.stop(kill=True)
        server.start()
        writer.join(120)
        assert not writer.is_alive()
        assert list(VersionLog(open_store(settings), JOB).history()) == written
