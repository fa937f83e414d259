"""docs/protocol.md is enough to write a site: tests/protocol_site.py was, and this server merges its work.

The site has its own accounts at broker and object store, with the rights that a real one has, so what it does
is also proof that these rights suffice.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from federation.jobs import EvaluationPolicy
from federation.types import Published
from storage.access import site_policy
from storage.jobs import list_evaluations
from storage.liveness import open_liveness
from storage.log import VersionLog
from storage.models import load_model
from storage.s3 import S3Store
from tests.factories import ALPHA, job_spec, toy_arrays
from tests.integration.servers import Server, real, running, until
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Account, Rgw

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.s3]

SITE = "site-a"
SCRIPT = Path(__file__).parents[1] / "protocol_site.py"
JOB = "protocol"


@pytest.fixture
def server(
    tmp_path: Path, rabbitmq_server: RabbitMQ, redis_server: RedisServer, s3_server: Rgw
) -> Iterator[Server]:
    with running(real(tmp_path, rabbitmq_server, redis_server, s3_server)) as started:
        yield started


def site_environment(server: Server, s3: Rgw) -> dict[str, str]:
    """What the operator hands to the site: two accounts, and where broker and bucket are."""
    account = s3.user(Account("protocol-site", "protocol-key", "protocol-secret"))
    store = server.store
    assert isinstance(store, S3Store)
    store.set_policy(json.dumps(site_policy(server.settings.store_url, {SITE: account.arn}, s3.admin.arn)))
    return {
        "PATH": os.environ["PATH"],
        "AMQP_URL": server.site_urls[SITE],
        "S3_ENDPOINT": s3.endpoint,
        "S3_BUCKET": "fedqueue",
        "S3_ACCESS_KEY": account.access_key,
        "S3_SECRET_KEY": account.secret_key,
    }


def test_a_site_written_from_the_protocol_is_merged_and_seen(
    server: Server, s3_server: Rgw, tmp_path: Path
) -> None:
    server.create_job(job_spec(JOB, evaluation=EvaluationPolicy(sites_every=1)), toy_arrays(1.0))
    command = [sys.executable, "-I", str(SCRIPT), JOB, SITE]
    environment = site_environment(server, s3_server)
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["result"], said["version"], said["staleness"]) == ("merged", 1, 0)

    events = [record.event for record in VersionLog(server.store, JOB).history()]
    merged = [c for event in events if isinstance(event, Published) for c in event.merged]
    assert [(c.update.update_id, c.update.site) for c in merged] == [(said["update_id"], SITE)]
    head = server.head(JOB)
    assert head is not None
    arrays = load_model(server.store, head.current.model).arrays()
    assert np.all(arrays["conv.weight"] == np.float32(1.0 + ALPHA))
    assert np.all(arrays["norm.running_mean"] == np.float32(1.0))

    (measured,) = list_evaluations(server.store, JOB)
    assert (measured.version, measured.who, measured.num_images) == (1, SITE, 12)
    assert measured.per_class == {"mAP@0.5": {"thing": 0.5}}

    def beats() -> list[str]:
        seen = (seen.status for seen in open_liveness(server.settings).sites())
        return [status.detail for status in seen if status.site == SITE]

    until("the heartbeat", lambda: beats() == ["written from the protocol alone"])


def test_the_site_imports_nothing_but_what_the_protocol_asks_for() -> None:
    found = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"pika", "minio"}
