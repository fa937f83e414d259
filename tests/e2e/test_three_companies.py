"""examples/three_companies, as its README says to run it: it ends well, or says where it went another way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.three_companies.companies import NAMES
from tests.integration.servers import ROOT
from tests.servers.__main__ import write_configs
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def play(folder: Path, *more: str) -> str:
    """What was told. Fails with it, and the ends of all logs, if the story breaks off."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.three_companies", "--out", str(folder / "story"), *more],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("FEDQUEUE_")},
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    logs = [f"== {p.name}\n{p.read_text()[-3000:]}" for p in (folder / "story" / "logs").glob("*.log")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    return done.stdout


def test_the_story_embedded(tmp_path: Path) -> None:
    told = play(tmp_path)
    assert "The story went as it is told" in told
    for company in NAMES:
        images = tmp_path / "story" / company / "images"
        assert list(images.glob("*.jpg"))
    stored = [path for path in (tmp_path / "story" / "store").rglob("*") if path.is_file()]
    assert {path.suffix for path in stored} <= {".json", ".safetensors", ".onnx", ".md", ".toml", ""}


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.s3
def test_the_story_over_real_servers_each_company_with_its_own_accounts(
    tmp_path: Path, rabbitmq_server: RabbitMQ, redis_server: RedisServer, s3_server: Rgw
) -> None:
    write_configs(tmp_path / "configs", rabbitmq_server, redis_server, s3_server, NAMES)
    told = play(tmp_path, "--configs", str(tmp_path / "configs"))
    assert "The story went as it is told" in told
