"""An operator's view of sites and of what a job cost, over a running server: a site is killed, the view is wiped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cli.main import app
from federation.ids import new_update_id
from federation.jobs import StopRule
from federation.keys import log_prefix
from federation.requests import DeclineJob
from federation.types import ClientUpdate
from storage.liveness import Seen, open_liveness
from storage.open import local_path
from tests.factories import job_spec
from tests.integration.backlog import merged
from tests.integration.servers import Server, end, site_process, until
from tests.toy_site import ToyTrainer

VERSIONS = 3


@pytest.fixture
def job(server: Server) -> str:
    """A new job that ends at version VERSIONS."""
    name = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(name, stop=StopRule(max_versions=VERSIONS)))
    return name


@contextmanager
def site(server: Server, folder: Path, job: str, seconds: float, **settings: str) -> Iterator[Server]:
    """The process of site-a, whose trainings take `seconds`."""
    process = site_process(server, folder, job, seconds, **settings)
    process.start("agent")
    try:
        yield process
    finally:
        print(process.logs())
        end(process)


def fedqueue(server: Server, *command: str) -> str:
    """What an operator reads."""
    result = CliRunner().invoke(app, [*command], env=server.environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def look(server: Server, job: str) -> Seen | None:
    """The last heartbeat of site-a, if it is of this job's agent."""
    for seen in open_liveness(server.settings).sites():
        if (seen.status.site, seen.status.job) == ("site-a", job):
            return seen
    return None


def condition(server: Server, seen: Seen | None) -> str:
    settings = server.settings
    return "" if seen is None else seen.condition(settings.heartbeat_s, settings.heartbeat_ttl_s)


def training(server: Server, job: str) -> bool:
    seen = look(server, job)
    return seen is not None and seen.status.state == "training" and condition(server, seen) == "connected"


def test_a_site_that_is_killed_is_gone_within_15_seconds(server: Server, job: str, tmp_path: Path) -> None:
    with site(server, tmp_path, job, seconds=600.0) as process:
        until("the site to train", lambda: training(server, job))
        (listed,) = [
            s for s in json.loads(fedqueue(server, "site", "list", "--json")) if s["site"] == "site-a"
        ]
        machine = listed["status"]["machine"]
        assert listed["condition"] == "connected"
        assert listed["load_per_core"] == machine["load"] / machine["cores"]
        assert 0 < machine["memory_used_bytes"] < machine["memory_total_bytes"]
        process.kill("agent")
        killed_at = datetime.now(UTC)
        observed: list[Seen] = []

        def gone() -> bool:
            seen = look(server, job)
            assert seen is not None
            observed.append(seen)
            return condition(server, seen) == "gone"

        until("the site to be gone", gone)
    # nothing came after the kill but what was on its way, so 15 s after the last stamp are not later than that
    assert len({seen.seen_at for seen in observed[-10:]}) == 1
    assert observed[-1].seen_at <= killed_at + timedelta(seconds=2)
    for seen in observed:
        expected = "gone" if seen.age_s >= 15 else "silent" if seen.age_s > 11 else "connected"
        assert condition(server, seen) == expected
    (listed,) = [s for s in json.loads(fedqueue(server, "site", "list", "--json")) if s["site"] == "site-a"]
    assert (listed["condition"], listed["status"]["state"]) == ("gone", "training")
    assert [
        line for line in fedqueue(server, "site", "list").splitlines() if "site-a" in line and "gone" in line
    ]


def test_the_view_is_wiped_and_refills_by_itself(server: Server, job: str, tmp_path: Path) -> None:
    declined = DeclineJob(job=job, reason="no such class here")
    assert server.answer(server.ask(declined, "site-b")).ok
    with site(server, tmp_path, job, seconds=600.0, heartbeat_s="0.5"):
        until("the site to train", lambda: training(server, job))
        before, head = look(server, job), server.head(job)
        assert before is not None
        wipe(server)
        shown = json.loads(fedqueue(server, "site", "show", "site-b", "--json"))
        (part,) = [part for part in shown["jobs"] if part["job"] == job]
        assert shown["seen"] is None  # of site-b nothing was ever heard, and yet
        assert (part["member"]["answer"], part["member"]["reason"]) == ("declined", "no such class here")
        until("the view to refill", lambda: look(server, job) is not None)
        after = look(server, job)
        assert after is not None
        assert after.seen_at > before.seen_at
        assert condition(server, after) == "connected"
        assert after.status.state == "training"
        assert server.head(job) == head
    assert server.alive()


def wipe(server: Server) -> None:
    url = server.settings.live_url.get_secret_value()
    if url.startswith("redis:"):
        with redis.Redis.from_url(url) as client:
            client.flushall()
    else:
        shutil.rmtree(local_path(url), ignore_errors=True)


def test_what_a_job_cost_is_told(server: Server, job: str, tmp_path: Path) -> None:
    with site(server, tmp_path, job, seconds=0.0) as process:
        until("the job to close", lambda: (head := server.head(job)) is not None and head.closed)
        until("the agent to end", lambda: process.processes["agent"].poll() is not None)
    updates = [contribution.update for contribution in merged(server, job)]
    assert len(updates) == VERSIONS
    check_transfer(server, job, updates)

    status = json.loads(fedqueue(server, "job", "status", job, "--json"))
    account = status["sites"]["site-a"]
    downloaded = sum(update.transfer.downloaded_bytes for update in updates if update.transfer)
    uploaded = sum(update.payload_bytes + len(update.to_json()) for update in updates)
    assert (account["merged"], account["rejected"], account["updates_without_transfer"]) == (VERSIONS, 0, 0)
    assert (account["uploaded_bytes"], account["downloaded_bytes"]) == (uploaded, downloaded)
    assert account["image_bytes"] == ToyTrainer.image_bytes
    assert account["ratio"] == ToyTrainer.image_bytes / (uploaded + downloaded)
    assert status["total"]["ratio"] == account["ratio"]
    assert "images stayed home: 5 MB; travelled: " in fedqueue(server, "job", "status", job)

    families = text_string_to_metric_families(fedqueue(server, "job", "metrics", job))
    samples: dict[str, Any] = {}
    for family in families:
        for sample in family.samples:
            assert sample.labels["job"] == job
            if sample.labels.get("site", "site-a") == "site-a":
                samples[sample.name, sample.labels.get("condition", "")] = sample.value
    assert samples["fedqueue_uploaded_bytes_total", ""] == uploaded
    assert samples["fedqueue_downloaded_bytes_total", ""] == downloaded
    assert samples["fedqueue_home_image_bytes", ""] == ToyTrainer.image_bytes
    assert samples["fedqueue_updates_merged_total", ""] == VERSIONS
    assert samples["fedqueue_job_version", ""] == VERSIONS
    assert samples["fedqueue_job_quarantine", ""] == 0
    assert samples["fedqueue_job_closed", ""] == 1
    assert samples["fedqueue_site_condition", "gone"] == 1  # it said that it stops
    assert samples["fedqueue_site_last_seen_timestamp_seconds", ""] <= time.time() + 1

    (part,) = [
        part
        for part in json.loads(fedqueue(server, "site", "show", "site-a", "--json"))["jobs"]
        if part["job"] == job
    ]
    assert part["account"] == account
    assert part["account"]["last_merged"]["version"] == VERSIONS


def check_transfer(server: Server, job: str, updates: list[ClientUpdate]) -> None:
    """Each update tells of the model that it started from, and of log records; all together no more than there were."""
    log_bytes = sum(server.store.size(key) for key in server.store.list(log_prefix(job)))
    model_bytes = updates[0].payload_bytes  # a version is as large as an update
    told = [update.transfer.downloaded_bytes for update in updates if update.transfer]
    assert len(told) == len(updates)
    assert all(downloaded > model_bytes for downloaded in told)
    # each version is pulled once, and no record read more than twice
    assert sum(told) <= len(told) * model_bytes + 2 * log_bytes
