"""A real S3 server for tests: Ceph's RADOS Gateway with one monitor and one object store daemon.

    apt-get install --no-install-recommends radosgw ceph-mon ceph-osd

Three plain processes on free ports of 127.0.0.1, up in about two seconds. "memstore" keeps objects in
memory; "bluestore" keeps them in a file and survives `stop(kill=True)` followed by `start()`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.servers import free_port, missing

BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-authtool", "monmaptool", "radosgw-admin", "ceph")
START_LIMIT_S = 60.0

# Not the defaults: small commit intervals (a test would wait for them), garbage collection at once (a test
# that overwrites a lot would fill the store), and tcp_nodelay (a small put takes 4 ms instead of 45).
CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = 21000
ms bind port max = 21900
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {dir}/keyring
run dir = {dir}/run
admin socket = {dir}/run/$name.asok
pid file = {dir}/run/$name.pid
log file = {dir}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
[mon]
mon data = {dir}/mon
mon data avail crit = 1
mon cluster log file = {dir}/cluster.log
paxos propose interval = 0.05
paxos min wait = 0.01
auth allow insecure global id reclaim = false
[osd]
osd data = {dir}/osd
osd objectstore = {store}
memstore device bytes = {size}
bluestore block size = {size}
osd memory target = 939524096
[client.rgw]
rgw data = {dir}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw dns name = localhost
rgw thread pool size = 64
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw gc processor max time = 5
rgw gc max objs = 1
rgw override bucket index max shards = 1
"""


@dataclass(frozen=True)
class Account:
    """An S3 user."""

    name: str
    access_key: str
    secret_key: str

    @property
    def arn(self) -> str:
        return f"arn:aws:iam:::user/{self.name}"


class Rgw:
    """One throw-away server. `with Rgw() as server: server.endpoint, server.admin`."""

    def __init__(self, store: Literal["memstore", "bluestore"] = "memstore", size: int = 2 << 30) -> None:
        absent = [name for name in BINARIES if shutil.which(name) is None]
        if absent:
            missing(
                f"Ceph RGW ({', '.join(absent)})",
                "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd",
            )
        self.port = free_port()
        self.admin = Account("admin", "admin-key", "admin-secret")
        self._store, self._size = store, size
        self._dir = Path(tempfile.mkdtemp(prefix="fedqueue-rgw-"))
        self._conf = self._dir / "ceph.conf"
        self._accounts: set[Account] = set()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, bucket: str) -> str:
        """The store_url of a bucket here."""
        return f"s3://{self.endpoint}/{bucket}"

    def start(self) -> Rgw:
        """Start, or start again with the same data."""
        fresh = not self._conf.exists()
        if fresh:
            self._prepare()
        self._spawn("ceph-mon", "-i", "a", "-f")
        if fresh:
            osd = str(uuid.uuid4())
            self._run("ceph", "-c", self._conf, "--connect-timeout", "30", "osd", "new", osd, "0")
            self._run("ceph-osd", "-c", self._conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-i", "0", "-f")
        self._spawn("radosgw", "-n", "client.rgw", "-f")
        self._wait()
        if fresh:
            self.user(self.admin)
        return self

    def user(self, account: Account) -> Account:
        """Create an account, once; it owns nothing and may do nothing until a policy lets it."""
        if account in self._accounts:
            return account
        self._accounts.add(account)
        self._run(
            *("radosgw-admin", "-c", self._conf, "user", "create", f"--uid={account.name}"),
            *(f"--display-name={account.name}", f"--access-key={account.access_key}"),
            *(f"--secret-key={account.secret_key}",),
            *(() if account == self.admin else ("--max-buckets=-1",)),
        )
        return account

    def stop(self, *, kill: bool = False) -> None:
        """Stop the processes; the data stays (with bluestore) for another `start`."""
        # memstore has nothing to save, and takes seconds to say goodbye
        last_word = signal.SIGKILL if kill or self._store == "memstore" else signal.SIGTERM
        for process in reversed(self._processes):  # gateway, object store, monitor
            process.send_signal(last_word)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._processes.clear()

    def __enter__(self) -> Rgw:
        try:
            return self.start()
        except BaseException:
            self.stop(kill=True)
            raise

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _prepare(self) -> None:
        for name in ("mon", "osd", "rgw", "run"):
            (self._dir / name).mkdir()
        fsid, mon1, mon2 = str(uuid.uuid4()), free_port(), free_port()
        values: dict[str, Any] = {"fsid": fsid, "mon1": mon1, "mon2": mon2, "dir": self._dir}
        self._conf.write_text(
            CONFIG.format(**values, port=self.port, store=self._store, size=self._size), encoding="ascii"
        )
        keyring, monmap = self._dir / "keyring", self._dir / "monmap"
        for name in ("mon.", "client.admin", "client.rgw", "osd.0"):
            create = () if keyring.exists() else ("--create-keyring",)
            caps = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *caps)
        address = f"[v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]"
        self._run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run(
            *("ceph-mon", "-c", self._conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        )

    def _spawn(self, name: str, *args: str) -> None:
        with open(self._dir / f"{name}.out", "ab") as out:
            self._processes.append(
                subprocess.Popen(
                    [name, "-c", str(self._conf), *args],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _run(self, *args: str | Path) -> dict[str, Any]:
        done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{args[0]} failed: {done.stderr.strip()[-500:]}")
        return dict(json.loads(done.stdout)) if done.stdout.startswith("{") else {}

    def _wait(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while True:
            try:
                urllib.request.urlopen(f"http://{self.endpoint}/", timeout=1).close()
                return
            except OSError as exc:
                dead = [p.args for p in self._processes if p.poll() is not None]
                if dead or time.monotonic() > limit:
                    raise RuntimeError(f"RGW did not start ({dead}), see {self._dir}/*.log") from exc
            time.sleep(0.05)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Rgw]:
    """A real S3 server, with nothing in it but the account `admin`."""
    with Rgw() as server:
        yield server
