"""What every BlobStore promises (storage/blob.py), on memory, a folder and a real S3 server, bare and wrapped."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import pytest
from pydantic import SecretStr

from federation.errors import (
    AccessDenied,
    BadPayload,
    BadSettings,
    NotFound,
    StoreUnavailable,
    UnsafeStore,
)
from federation.faults import Scripted
from federation.keys import PROBE_PREFIX
from federation.settings import Settings
from storage import s3
from storage.blob import BlobStore
from storage.faulty import FaultyStore
from storage.folder import FolderStore
from storage.memory import MemoryStore
from storage.metered import MeteredStore
from storage.open import create_bucket, open_store
from storage.probe import probe
from storage.s3 import S3Store
from tests.servers import free_port, missing
from tests.servers.rgw import Account, Rgw

WRITERS = 16
_number = itertools.count()


def s3_settings(server: Rgw, bucket: str, account: Account | None = None) -> Settings:
    account = account or server.admin
    return Settings(
        store_url=server.url(bucket),
        store_access_key=account.access_key,
        store_secret_key=SecretStr(account.secret_key),
    )


def new_s3(server: Rgw) -> BlobStore:
    settings = s3_settings(server, f"contract-{next(_number)}")
    create_bucket(settings)
    return open_store(settings)


@pytest.fixture(
    params=[
        "memory",
        "folder",
        pytest.param("s3", marks=pytest.mark.s3),
        "faulty memory",
        "faulty folder",
        "metered folder",
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    made: BlobStore
    wrapper, _, kind = request.param.rpartition(" ")
    if kind == "memory":
        made = MemoryStore()
    elif kind == "folder":
        made = FolderStore(tmp_path / "store")
    else:
        made = new_s3(request.getfixturevalue("s3_server"))
    if wrapper == "metered":
        return MeteredStore(made)
    return FaultyStore(made, Scripted()) if wrapper else made


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- every implementation ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3 << 20)], ids=["empty", "one byte", "3 MiB"])
def test_what_is_written_is_read(store: BlobStore, data: bytes) -> None:
    assert store.put_if_absent("a/b.bin", data)
    assert store.get("a/b.bin", max_bytes=len(data)) == data
    assert store.size("a/b.bin") == len(data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_written(store: BlobStore, kind: Callable[[bytes], bytes]) -> None:
    assert store.put_if_absent("k", kind(b"buffer"))
    store.put("l", kind(b"buffer"))
    assert store.get("k", max_bytes=100) == store.get("l", max_bytes=100) == b"buffer"


def test_put_if_absent_never_overwrites_and_put_does(store: BlobStore) -> None:
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert not store.put_if_absent("k", b"first"), "the same bytes are an object that is there, too"
    assert store.get("k", max_bytes=10) == b"first"
    store.put("k", b"third")
    assert store.get("k", max_bytes=10) == b"third"
    store.delete("k")
    assert store.put_if_absent("k", b"fourth")


def test_of_concurrent_writers_exactly_one_wins(store: BlobStore) -> None:
    rounds = 6
    gate = threading.Barrier(WRITERS)

    def write(writer: int) -> list[int]:
        won = []
        for n in range(rounds):
            gate.wait()
            if store.put_if_absent(f"race/{n}", b"%d" % writer):
                won.append(n)
        return won

    with ThreadPoolExecutor(WRITERS) as pool:
        wins = list(pool.map(write, range(WRITERS)))
    winner = {n: writer for writer, won in enumerate(wins) for n in won}
    assert sorted(itertools.chain(*wins)) == list(range(rounds))
    for n in range(rounds):
        assert store.get(f"race/{n}", max_bytes=10) == b"%d" % winner[n]


def test_modified_is_the_time_of_the_last_write(store: BlobStore) -> None:
    """By the store's clock, which is read through an object of its own; S3 tells whole seconds."""

    def now() -> datetime:
        store.put("clock", b"")
        return store.modified("clock")

    before = now()
    store.put_if_absent("a/k", b"first")
    first = store.modified("a/k")
    assert first.utcoffset() == timedelta(0)
    assert before <= first <= now()
    deadline = time.monotonic() + 10
    while now() <= first:
        assert time.monotonic() < deadline, "the store's clock stands still"
        time.sleep(0.05)
    assert not store.put_if_absent("a/k", b"second")
    assert store.modified("a/k") == first
    store.put("a/k", b"third")
    assert store.modified("a/k") > first
    store.delete("a/k")
    for gone in ("a/k", "a"):
        with pytest.raises(NotFound):
            store.modified(gone)


def test_a_missing_object_is_not_found(store: BlobStore, tmp_path: Path) -> None:
    store.put("a/b", b"1")
    for key in ("nothing", "a", "a/c", "a/b/c"):
        with pytest.raises(NotFound):
            store.get(key, max_bytes=10)
        with pytest.raises(NotFound):
            store.size(key)
        with pytest.raises(NotFound):
            store.get_to_file(key, tmp_path / "f", nbytes=1, sha256=sha256(b"1"))
        store.delete(key)
    assert store.get("a/b", max_bytes=10) == b"1"


BAD_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a b",
    "ä",
    "a\0",
    "a\n",
    "~a",
    "a\\b",
]


@pytest.mark.parametrize("key", [*BAD_KEYS, "x" * 1025, "x" * 256])
def test_what_is_no_key_is_refused_before_anything_is_touched(
    store: BlobStore, key: str, tmp_path: Path
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(key, max_bytes=1),
        lambda: store.get_to_file(key, tmp_path / "f", nbytes=1, sha256=sha256(b"1")),
        lambda: store.size(key),
        lambda: store.put(key, b"1"),
        lambda: store.put_if_absent(key, b"1"),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="key"):
            call()
    assert list(store.list("")) == []


@pytest.mark.parametrize("prefix", ["/", "../", "a//", "a/../", "ä"])
def test_what_is_no_prefix_is_refused(store: BlobStore, prefix: str) -> None:
    with pytest.raises(ValueError, match=r"prefix|key"):
        store.list(prefix)


def test_an_object_that_is_too_large_is_not_read(store: BlobStore) -> None:
    store.put("k", b"12345")
    assert store.get("k", max_bytes=5) == b"12345"
    with pytest.raises(BadPayload, match="5 bytes") as caught:
        store.get("k", max_bytes=4)
    assert caught.value.reason == "too-large"
    assert store.get("k", max_bytes=5) == b"12345"


def test_a_download_is_whole_and_verified_or_not_there(store: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    store.put("k", data)
    target = tmp_path / "downloads" / "model"
    target.parent.mkdir()
    cases = [(len(data) + 1, sha256(data), "wrong-size"), (len(data) - 1, sha256(data), "wrong-size")]
    for nbytes, digest, reason in [*cases, (len(data), sha256(b""), "wrong-digest")]:
        with pytest.raises(BadPayload) as caught:
            store.get_to_file("k", target, nbytes=nbytes, sha256=digest)
        assert caught.value.reason == reason
        assert list(target.parent.iterdir()) == []
    store.get_to_file("k", target, nbytes=len(data), sha256=sha256(data))
    assert target.read_bytes() == data
    assert list(target.parent.iterdir()) == [target]


def test_a_download_to_nowhere_is_store_unavailable(store: BlobStore, tmp_path: Path) -> None:
    store.put("k", b"1")
    with pytest.raises(StoreUnavailable, match="cannot write"):
        store.get_to_file("k", tmp_path / "no" / "folder", nbytes=1, sha256=sha256(b"1"))


def test_listing_is_in_byte_order_of_whole_keys(store: BlobStore) -> None:
    keys = ["a", "a-b/c", "a.b/c", "aa/b/c", "aa/b/d", "aa/b0", "aa/b-x", "aa/c", "B/1", "z"]
    for key in reversed(keys):
        store.put(key, b"")
    assert list(store.list("")) == sorted(keys)
    for prefix in ("a", "aa/", "aa/b", "aa/b/", "a-b/c", "nothing", "aa/b/d", "aa/b/dd"):
        assert list(store.list(prefix)) == sorted(k for k in keys if k.startswith(prefix)), prefix
    for after in (*keys, "aa", "aa/", "aa/b/", "aa/b/cc", "zz", "0"):
        assert list(store.list("", start_after=after)) == sorted(k for k in keys if k > after), after
    assert list(store.list("aa/", start_after="aa/b/c")) == ["aa/b/d", "aa/b0", "aa/c"]


def test_listing_goes_on_beyond_a_page(store: BlobStore, tmp_path: Path) -> None:
    keys = [f"log/{n:020d}.json" for n in range(1003)]
    if (root := tmp_path / "store").is_dir():  # a folder: a thousand synced writes would test the disk only
        store.put(keys[0], b"")
        folder = root / "log"
        for key in keys[1:]:
            (folder / key.removeprefix("log/")).touch()
    else:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
    assert list(store.list("log/")) == keys
    assert list(store.list("log/", start_after=keys[1])) == keys[2:]
    assert list(store.list("log/", start_after=keys[2])) == keys[3:]
    assert list(store.list("log/", start_after=keys[-1])) == []


def test_a_safe_store_passes_the_probe_and_nothing_is_left(store: BlobStore) -> None:
    probe(store)
    assert list(store.list(PROBE_PREFIX)) == []


# --- the probe against stores that lie ------------------------------------------------------------------


class OverwritingStore(MemoryStore):
    """Ignores the condition, and says so or not."""

    def __init__(self, *, admits: bool) -> None:
        super().__init__()
        self._admits = admits

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        absent = super().put_if_absent(key, data)
        self.put(key, data)
        return absent or not self._admits


class LosingStore(MemoryStore):
    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        return True


@pytest.mark.parametrize(
    "liar",
    [OverwritingStore(admits=False), OverwritingStore(admits=True), LosingStore()],
    ids=["overwriting", "overwriting openly", "losing"],
)
def test_the_probe_refuses_a_store_that_lies(liar: BlobStore) -> None:
    with pytest.raises(UnsafeStore, match="MinIO and its forks"):
        probe(liar)
    assert list(liar.list("")) == []


def test_the_probe_forgives_a_lost_reply() -> None:
    class LostFirstReply(MemoryStore):
        def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
            return super().put_if_absent(key, data) and False

    probe(LostFirstReply())


class NaiveS3(BaseHTTPRequestHandler):
    """An S3 server as some are: knows PUT, GET, DELETE, and nothing of If-None-Match."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_GET(self) -> None:
        self._answer(200, self.objects[self.path])

    def do_DELETE(self) -> None:
        del self.objects[self.path]
        self._answer(204)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Serve(Protocol):
    def __call__(self, handler: type[BaseHTTPRequestHandler], **options: float) -> S3Store: ...


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Run a handler as a server and open a store on it."""
    servers = []

    def start(handler: type[BaseHTTPRequestHandler], **options: float) -> S3Store:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return S3Store(f"127.0.0.1:{server.server_port}", "bucket", "key", "secret", **options)  # type: ignore[arg-type]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_probe_refuses_a_server_that_ignores_the_header(
    serve: Serve,
) -> None:
    class Handler(NaiveS3):
        objects: dict[str, bytes] = {}  # noqa: RUF012

    with pytest.raises(UnsafeStore, match="let a second put-if-absent"):
        probe(serve(Handler))
    assert Handler.objects == {}


# --- S3: failures of server and network ------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "BACKOFF_S", 0.001)


@pytest.mark.usefixtures("quick")
def test_a_dead_server_is_store_unavailable(tmp_path: Path) -> None:
    store = S3Store(f"127.0.0.1:{free_port()}", "bucket", "key", "secret")
    calls: list[Callable[[], object]] = [
        lambda: store.get("k", max_bytes=1),
        lambda: store.get_to_file("k", tmp_path / "f", nbytes=1, sha256=sha256(b"1")),
        lambda: store.size("k"),
        lambda: store.modified("k"),
        lambda: store.put("k", b"1"),
        lambda: store.put_if_absent("k", b"1"),
        lambda: store.delete("k"),
        lambda: list(store.list("")),
        store.create_bucket,
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match=r"at 127\.0\.0\.1"):
            call()


@pytest.mark.usefixtures("quick")
def test_a_silent_server_is_store_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = S3Store(
            f"127.0.0.1:{silent.getsockname()[1]}", "bucket", "key", "secret", read_timeout_s=0.05
        )
        with pytest.raises(StoreUnavailable):
            store.put_if_absent("k", b"1")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (500, "InternalError", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
        (409, "ConditionalRequestConflict", StoreUnavailable),
        (429, "TooManyRequests", StoreUnavailable),
        (403, "QuotaExceeded", StoreUnavailable),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (403, "Whatever", AccessDenied),
        (404, "NoSuchBucket", BadSettings),
        (400, "InvalidArgument", BadSettings),
        (501, "NotImplemented", UnsafeStore),
        (502, None, StoreUnavailable),
        (200 + 204, None, BadSettings),
        (503, "<broken", StoreUnavailable),
    ],
)
def test_every_answer_becomes_one_of_our_errors(
    serve: Serve, status: int, code: str | None, error: type
) -> None:
    class Handler(NaiveS3):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            xml = f"<Error><Code>{code}</Code><Message>m</Message></Error>" if code else "<html></html>"
            self.send_response(status)
            self.send_header("Content-Type", "application/xml" if code else "text/html")
            self.send_header("Content-Length", str(len(xml)))
            self.end_headers()
            self.wfile.write(xml.encode())

    with pytest.raises(error):
        serve(Handler).put_if_absent("k", b"1")


@pytest.mark.usefixtures("quick")
def test_an_ambiguous_answer_is_asked_again_with_the_same_bytes(
    serve: Serve,
) -> None:
    """First the connection breaks, then 409, then 500, then success: one True, four times the same request."""
    seen: list[tuple[str, bytes, str | None]] = []

    class Handler(NaiveS3):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, body, self.headers["If-None-Match"]))
            match len(seen):
                case 1:
                    self.close_connection = True
                case 2:
                    self._answer(409)
                case 3:
                    self._answer(500)
                case _:
                    self._answer(200)

    assert serve(Handler).put_if_absent("a/k", b"payload")
    assert seen == [("/bucket/a/k", b"payload", "*")] * 4


@pytest.mark.usefixtures("quick")
def test_a_large_body_is_not_sent_again_for_an_object_that_is_seen(
    serve: Serve,
) -> None:
    """Some servers answer 412 and hang up while the body is on its way: that looks like a broken line."""
    puts = []

    class Handler(NaiveS3):
        def do_PUT(self) -> None:
            puts.append(self.path)
            self.close_connection = True

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()

    assert not serve(Handler).put_if_absent("k", bytes(8 << 20))
    assert len(puts) == 1


def test_a_slow_line_is_not_a_dead_one(serve: Serve) -> None:
    """The connect timeout must not limit the sending of a large body."""
    connect_timeout_s = 0.2

    class Handler(NaiveS3):
        objects: dict[str, bytes] = {}  # noqa: RUF012

        def do_PUT(self) -> None:
            time.sleep(4 * connect_timeout_s)  # the client meanwhile waits in the middle of the body
            super().do_PUT()

    store = serve(Handler, connect_timeout_s=connect_timeout_s)
    assert store.put_if_absent("k", bytes(16 << 20))
    assert len(Handler.objects["/bucket/k"]) == 16 << 20


def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own certificate authority works through SSL_CERT_FILE; an unknown one does not."""
    if shutil.which("openssl") is None:
        missing("openssl", "apt-get install openssl")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )

    class Handler(NaiveS3):
        objects: dict[str, bytes] = {}  # noqa: RUF012

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        monkeypatch.setattr(s3, "ATTEMPTS", 1)
        with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            S3Store(address, "bucket", "key", "secret", tls=True).put("k", b"1")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        data = os.urandom(1 << 20)
        store = S3Store(address, "bucket", "key", "secret", tls=True)
        store.put("k", data)
        assert store.get("k", max_bytes=len(data)) == data
    finally:
        server.shutdown()
        server.server_close()


def test_nothing_is_unpacked(serve: Serve) -> None:
    """A site can declare any Content-Encoding for its payload; the bytes count as they are stored."""

    class Handler(NaiveS3):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"plain")

    assert serve(Handler).get("k", max_bytes=5) == b"plain"


@pytest.mark.s3
def test_wrong_credentials_and_a_missing_bucket_are_fatal(s3_server: Rgw) -> None:
    nobody = open_store(s3_settings(s3_server, "contract", Account("x", "unknown-key", "s")))
    wrong = open_store(s3_settings(s3_server, "contract", Account("x", s3_server.admin.access_key, "wrong")))
    for store in (nobody, wrong):
        with pytest.raises(AccessDenied, match="check store_"):
            store.put_if_absent("k", b"")
    with pytest.raises(BadSettings, match="bucket does not exist"):
        open_store(s3_settings(s3_server, "no-such-bucket")).put_if_absent("k", b"")


@pytest.mark.s3
def test_creating_the_bucket_twice_is_harmless(s3_server: Rgw) -> None:
    settings = s3_settings(s3_server, "twice")
    create_bucket(settings)
    open_store(settings).put("k", b"kept")
    create_bucket(settings)
    assert open_store(settings).get("k", max_bytes=10) == b"kept"


@pytest.mark.s3
def test_the_probe_refuses_a_versioned_bucket(s3_server: Rgw) -> None:
    from minio.commonconfig import ENABLED
    from minio.versioningconfig import VersioningConfig

    settings = s3_settings(s3_server, "versioned")
    create_bucket(settings)
    store = open_store(settings)
    assert isinstance(store, S3Store)
    store._client().set_bucket_versioning("versioned", VersioningConfig(ENABLED))
    with pytest.raises(UnsafeStore, match="without versioning"):
        probe(store)


def _write_in_child(store: BlobStore, key: str, result: multiprocessing.Queue[bool]) -> None:
    result.put(store.put_if_absent(key, b"child"))


@pytest.mark.s3
def test_a_store_opened_before_a_fork_serves_both_processes(s3_server: Rgw) -> None:
    store = new_s3(s3_server)
    store.put("parent", b"before")  # a connection is pooled now
    fork = multiprocessing.get_context("fork")
    result = fork.Queue()
    child = fork.Process(target=_write_in_child, args=(store, "child", result))
    child.start()
    for _ in range(20):
        assert store.get("parent", max_bytes=10) == b"before"
    assert result.get(timeout=60)
    child.join(60)
    assert store.get("child", max_bytes=10) == b"child"


# --- the folder's own traps ------------------------------------------------------------------------------


def _race(root: Path, writer: int, rounds: int, gate: object, wins: multiprocessing.Queue[int]) -> None:
    store = FolderStore(root)
    for n in range(rounds):
        gate.wait()  # type: ignore[attr-defined]
        if store.put_if_absent(f"jobs/new-{n}/log/0.json", b"%d" % writer):
            wins.put(n)


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, wins, rounds = context.Barrier(4), context.Queue(), 10
    writers = [
        context.Process(target=_race, args=(tmp_path / "store", n, rounds, gate, wins)) for n in range(4)
    ]
    for writer in writers:
        writer.start()
    assert sorted(wins.get(timeout=60) for _ in range(rounds)) == list(range(rounds))
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert wins.empty()


def test_stale_temporary_files_do_no_harm(tmp_path: Path) -> None:
    FolderStore(tmp_path)
    old, new = tmp_path / "~tmp" / "~old", tmp_path / "~tmp" / "~new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "~stale").write_bytes(b"half")
    (tmp_path / "lost+found").mkdir(mode=0)
    os.utime(old, (0, 0))
    store = FolderStore(tmp_path)
    assert not old.exists(), "nobody writes to it any more"
    assert new.exists(), "another process may be writing it"
    assert list(store.list("")) == []
    assert store.put_if_absent("a/b", b"1")
    assert list(store.list("")) == ["a/b"]
    assert list((tmp_path / "~tmp").iterdir()) == [new]


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(UnsafeStore, match="without hard links"):
        FolderStore(tmp_path / "store")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    store.put("old", b"old")

    def disk_full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.put_if_absent("new", b"new")
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.put("old", b"new")
    monkeypatch.undo()
    assert list(store.list("")) == ["old"]
    assert store.get("old", max_bytes=10) == b"old"
    assert list((tmp_path / "~tmp").iterdir()) == []


def test_a_folder_that_was_removed_comes_back(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b/c", b"1")
    (tmp_path / "a" / "b" / "c").unlink()
    (tmp_path / "a" / "b").rmdir()
    with pytest.raises(StoreUnavailable):
        store.put_if_absent("a/b/d", b"1")
    assert store.put_if_absent("a/b/d", b"1")


def _write_for_ever(root: Path, started: multiprocessing.Queue[int]) -> None:
    store = FolderStore(root)
    for n in itertools.count():
        store.put_if_absent(f"objects/{n:06d}", bytes(1 << 18))
        store.put("hint", b"%06d" % n * (1 << 15))
        started.put(n)


def test_a_killed_writer_leaves_whole_objects_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for victim in range(5):
        started = context.Queue()
        root = tmp_path / str(victim)
        writer = context.Process(target=_write_for_ever, args=(root, started))
        writer.start()
        for _ in range(1 + victim):
            last = started.get(timeout=60)
        writer.kill()
        writer.join(60)
        store = FolderStore(root)
        keys = list(store.list("objects/"))
        assert len(keys) > last
        assert {store.get(key, max_bytes=1 << 20) for key in keys} == {bytes(1 << 18)}
        hint = store.get("hint", max_bytes=1 << 20)
        assert hint == hint[:6] * (1 << 15)
