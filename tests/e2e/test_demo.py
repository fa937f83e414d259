"""`fedqueue demo` in small, as a user types it: real processes, real training, embedded and over real servers.

Whether the federation beats each site is a matter of minutes of training: `make demo` shows it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from federation.settings import CONFIG_ENV, Settings
from federation.types import LogRecord, Published
from storage.account import accounts
from storage.blob import BlobStore
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import load_model
from storage.open import open_store
from storage.tensors import decode
from tests.integration.servers import ROOT
from tests.servers.__main__ import write_configs
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw

SITES = ("north", "harbour", "market")
VERSIONS = 4


def fedqueue(*arguments: str, config: Path | None = None, limit_s: float = 280, expect: int = 0) -> str:
    """Run the command; its output. Fails with it if the command ends otherwise than expected."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FEDQUEUE_")}
    environment = inherited | ({CONFIG_ENV: str(config)} if config else {}) | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def demo(folder: Path, *more: str, config: Path | None = None) -> str:
    short = ("--versions", str(VERSIONS), "--steps", "2", "--no-alone")
    return fedqueue("demo", "--out", str(folder), *short, *more, config=config)


def assert_proven(records: list[LogRecord], *arguments: str, config: Path | None = None) -> None:
    """The log of the job is whole, and makes these very models."""
    # two updates that arrive together are merged in one publish: two versions, one of them stored
    stored = sum(isinstance(record.event, Published) for record in records)
    audited = fedqueue("audit", "generated", *arguments, config=config)
    assert audited.splitlines()[-1].startswith("pass  generated: ")
    assert f"{stored + 1} versions; updates: {VERSIONS} merged" in audited
    replayed = fedqueue("replay", "generated", *arguments, config=config)
    assert replayed == f"{stored} versions from {VERSIONS} updates, all equal\n"


def assert_trained(folder: Path, store: BlobStore) -> list[LogRecord]:
    """The job in `store` is closed, replays, and `folder` holds what the demo promises."""
    records = list(VersionLog(store, "generated").history())
    assert records[-1].head.closed is not None
    assert records[-1].head.version == VERSIONS
    assert sum(account.merged for account in accounts(records).values()) == VERSIONS
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["version"] == VERSIONS
    assert summary["generated_data"] is True
    assert summary["curve"][-1][1] == summary["federation"]["mAP@0.5"]
    assert all(size > 0 for size in summary["image_bytes"].values())
    for picture in ("detections.png", "map.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200
    final = load_model(store, records[-1].head.current.model)
    assert decode((folder / "model.safetensors").read_bytes()).layout == final.layout
    return records


def test_embedded(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    said = demo(folder)
    assert "federation" in said
    store_url = f"file:{folder / 'store'}"
    store = open_store(Settings(store_url=store_url))
    records = assert_trained(folder, store)
    assert str(VERSIONS) in fedqueue("job", "status", "generated", "--store-url", store_url)
    assert "published" in fedqueue("job", "history", "generated", "--store-url", store_url)
    assert "sha256" in fedqueue("model", "list", "generated", "--store-url", store_url)
    assert_proven(records, "--store-url", store_url)
    out = tmp_path / "pulled.safetensors"
    fedqueue("model", "pull", "generated", "--out", str(out), "--store-url", store_url)
    assert out.read_bytes() == (folder / "model.safetensors").read_bytes()
    image = next((folder / "data" / "images").glob("*.jpg"))
    use = ("predict", str(image), "--job", "generated", "--store-url", store_url)
    use += ("--cache", str(tmp_path / "cache"), "--score", "0.01", "--out", str(tmp_path / "p"))
    fedqueue(*use)
    assert (tmp_path / "p" / image.name).is_file()
    online = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert online["info"]["version"] == VERSIONS
    assert online["results"]
    (folder / "store").rename(folder / "away")
    fedqueue(*use, "--no-draw")
    offline = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert (offline["results"], offline["info"]["offline"]) == (online["results"], True)
    fedqueue(*use, "--version", "best", expect=1)
    assert not isinstance(store, MemoryStore)


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.s3
def test_over_real_servers_with_every_sites_own_accounts(
    tmp_path: Path, rabbitmq_server: RabbitMQ, redis_server: RedisServer, s3_server: Rgw
) -> None:
    write_configs(tmp_path / "configs", rabbitmq_server, redis_server, s3_server, SITES)
    config = tmp_path / "configs" / "server.toml"
    folder = tmp_path / "demo"
    demo(folder, "--site-configs", str(tmp_path / "configs"), config=config)
    environment = os.environ.copy()
    try:
        os.environ[CONFIG_ENV] = str(config)
        store = open_store(Settings.load())
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert_proven(assert_trained(folder, store), config=config)
    # a site's own account is enough to use the best version
    images, used = str(folder / "data" / "images" / "test-north-*.jpg"), tmp_path / "used"
    use = ("predict", images, "--job", "generated", "--version", "best", "--no-draw", "--out", str(used))
    fedqueue(*use, "--cache", str(tmp_path / "cache"), config=tmp_path / "configs" / "north.toml")
    info = json.loads((used / "predictions.json").read_text())["info"]
    assert (info["complete"], info["offline"], info["unreadable"]) == (True, False, [])
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert set(logs) == {"ingress.log", "worker.log", "evaluator.log", *(f"{site}.log" for site in SITES)}
    assert "fedqueue.accept_update" in logs["worker.log"]
    assert "fedqueue.evaluate_version" in logs["evaluator.log"]
    assert not (folder / "store").exists()
    assert not (folder / "queue.db").exists()
