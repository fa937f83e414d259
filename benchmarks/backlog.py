"""What a backlog costs: `python -m benchmarks.backlog`, from the repository's root. Exits 1 if a target is missed.

So many small updates are published while no server process runs; then one worker is started, and merges them.

Memory   the high-water mark of the worker's resident memory, against that for the smallest backlog of the same
         run. Target: at most 15 % more for a hundred times as many.
Writes   models written for each merged update. One by one would be 1. Target: at most 1/32, half of what
         aggregation.max_pending (64) makes possible.
Log      bytes of log records for each update: what every follower of the log downloads.

By default embedded, in a temporary folder. With --configs FOLDER over the servers that `make servers` runs, which
writes server.toml and site-a.toml there: then with an ingress and a Celery worker. The rate is shown for
orientation: it is mostly that of the store's and the broker's disk.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker.open import connect, declare
from federation.errors import Transient
from federation.ids import new_update_id
from federation.jobs import MAX_VERSION, AggregationPolicy, JobSpec, StopRule
from federation.keys import log_prefix, models_prefix, update_key
from federation.settings import Settings, env_name
from federation.types import ClientUpdate, Head
from federation.wire import encode_update
from storage.blob import BlobStore
from storage.log import VersionLog, utc_now
from storage.models import save_model
from storage.open import open_store
from storage.tensors import encode, from_arrays
from tasks.context import Context
from tasks.jobs import create

MEMORY_TARGET = 1.15
WRITES_TARGET = 1 / 32
SITE = "site-a"
FLOATS = 1000
PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Result:
    """What one backlog took."""

    updates: int
    seconds: float
    peak_kib: int
    models: int
    log_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", type=Path, help="folder with server.toml and site-a.toml")
    parser.add_argument("--updates", type=int, nargs="+", default=[100, 1_000, 10_000])
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        server, site = _settings(arguments.configs, Path(folder))
        declare(server, [SITE])
        print(
            f"{'updates':>8} {'merged/s':>9} {'peak MiB':>9} {'of first':>9} "
            f"{'models/update':>14} {'log B/update':>13}"
        )
        for updates in arguments.updates:
            result = run(server, site, updates, Path(folder))
            results.append(result)
            print(
                f"{updates:8d} {updates / result.seconds:9.0f} {result.peak_kib / 1024:9.1f} "
                f"{result.peak_kib / results[0].peak_kib:9.3f} {result.models / updates:14.4f} "
                f"{result.log_bytes / updates:13.0f}",
                flush=True,
            )
    missed = [r for r in results if r.peak_kib > MEMORY_TARGET * results[0].peak_kib]
    missed += [r for r in results if r.updates >= 1000 and r.models > WRITES_TARGET * r.updates]
    sys.exit(f"target missed with {', '.join(str(r.updates) for r in missed)} updates" if missed else 0)


def _settings(configs: Path | None, folder: Path) -> tuple[Settings, Settings]:
    """The server's and the site's."""
    if configs is None:
        places = {"broker_url": "queue.db", "store_url": "store", "live_url": "live"}
        schemes = {"broker_url": "sqlite", "store_url": "file", "live_url": "file"}
        embedded = Settings.model_validate({k: f"{schemes[k]}:{folder / places[k]}" for k in places})
        return embedded, embedded
    server, site = (
        Settings.model_validate(tomllib.loads((configs / f"{name}.toml").read_text()))
        for name in ("server", SITE)
    )
    return server, site


def run(server: Settings, site: Settings, updates: int, folder: Path) -> Result:
    store = open_store(server)
    job = f"backlog-{updates}-{new_update_id()[-12:]}"
    _create(server, store, job, updates)
    _publish(site, store, job, updates)
    log = VersionLog(store, job)
    with _running(server, folder) as peak_kib:
        start = time.monotonic()
        while not _is_done(log.head().head, updates):
            if time.monotonic() - start > PATIENCE_S:
                sys.exit(f"not merged after {PATIENCE_S:.0f} s: see {folder}/*.log")
            time.sleep(0.5)
        seconds, peak = time.monotonic() - start, peak_kib()
    return Result(
        updates=updates,
        seconds=seconds,
        peak_kib=peak,
        models=sum(1 for _ in store.list(models_prefix(job))) - 1,
        log_bytes=sum(store.size(key) for key in store.list(log_prefix(job))),
    )


def _is_done(head: Head, updates: int) -> bool:
    return head.version == updates and not head.pending


def _create(settings: Settings, store: BlobStore, job: str, updates: int) -> None:
    spec = JobSpec(
        id=job,
        classes=("thing",),
        aggregation=AggregationPolicy(max_staleness=updates),
        stop=StopRule(max_versions=MAX_VERSION),
    )
    broker = connect(settings)
    ref = save_model(store, job, from_arrays({"w": np.zeros(FLOATS, np.float32)}))
    create(Context(settings, store, broker, lambda name, arguments: None), spec, ref, ref)
    broker.close()


def _publish(settings: Settings, store: BlobStore, job: str, updates: int) -> None:
    """As many finished updates as a site that nobody answers; all trained from version 0."""
    payload = bytes(encode(from_arrays({"w": np.ones(FLOATS, np.float32)})))
    broker = connect(settings, keep_open=True)
    for _ in range(updates):
        update_id = new_update_id()
        update = ClientUpdate(
            update_id=update_id,
            job=job,
            site=SITE,
            base_version=0,
            num_examples=1,
            payload_kind="weights",
            payload_key=update_key(job, SITE, update_id),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            payload_bytes=len(payload),
            created_at=utc_now(),
        )
        store.put_if_absent(update.payload_key, payload)
        while True:
            try:
                broker.publish("fed.updates", encode_update(update))
                break
            except Transient:
                time.sleep(1.0)
    broker.close()


@contextmanager
def _running(settings: Settings, folder: Path) -> Iterator[Callable[[], int]]:
    """The server's processes; gives a function that tells the worker's peak of resident memory, KiB."""
    secrets = {"broker_url", "live_url", "store_secret_key"}
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        environment[env_name(name)] = str(value.get_secret_value() if name in secrets else value)
    commands = ["worker --queue merge"] if settings.embedded else ["worker", "ingress"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command.split()[0]}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "cli.main", *command.split()],
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield lambda: max(_peak_kib(pid) for pid in _family(processes[0].pid))
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _family(pid: int) -> list[int]:
    """The process and its children: Celery's tasks run in a child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children)]


def _peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main()
