"""Answers of long ago, and files of submissions that were never sent."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.sqlite import SqliteBroker
from cli.main import app
from federation.ids import new_update_id
from federation.keys import answer_key, update_key
from federation.settings import Settings
from storage.folder import FolderStore
from storage.jobs import save_job
from storage.leftovers import ANSWERED, NEVER_SENT, leftovers
from storage.memory import MemoryStore
from tasks.context import Context
from tasks.retention import tend
from tests.unit.test_storage_models import job

GRACE = timedelta(days=7)
START = datetime(2040, 1, 1, tzinfo=UTC)


class Store(MemoryStore):
    """Its clock is `time`."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: self.time)
        self.time = START

    def add(self, key: str) -> str:
        self.put(key, b"x")
        return key


@pytest.fixture
def store() -> Store:
    return Store()


def found(store: Store) -> dict[str, str]:
    return {item.key: item.why for item in leftovers(store, GRACE)}


def test_old_answers_go_and_young_ones_stay_whoever_asked(store: Store) -> None:
    ids = sorted(new_update_id() for _ in range(2))
    old = {store.add(answer_key(who, ids[0])) for who in ("server", "site-a", "site-a-b", "site-b")}
    assert found(store) == {}
    store.time += GRACE + timedelta(seconds=1)
    for who in ("site-a", "site-a-b", "site-b", "site-c"):
        store.add(answer_key(who, ids[1]))
    assert found(store) == dict.fromkeys(old, ANSWERED)


def test_of_a_job_that_was_never_made_old_uploads_go_and_of_one_that_was_none(store: Store) -> None:
    made = job()
    save_job(store, made)
    never = store.add(update_key("never", "site-a", new_update_id()))
    store.add(update_key(made.id, "site-a", new_update_id()))
    store.time += GRACE + timedelta(seconds=1)
    store.add(update_key("never", "site-a", new_update_id()))
    assert found(store) == {never: NEVER_SENT}


def test_tending_the_jobs_removes_them(store: Store, tmp_path: Path) -> None:
    answer = store.add(answer_key("site-a", new_update_id()))
    upload = store.add(update_key("never", "site-a", new_update_id()))
    broker = SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20)
    context = Context(Settings(gc_grace_s=GRACE.total_seconds()), store, broker, lambda name, arguments: None)
    tend(context, {}, lambda: False)
    assert {answer, upload} <= {*store.list("")}
    store.time += GRACE + timedelta(seconds=1)
    tend(context, {}, lambda: True)
    assert {answer, upload} <= {*store.list("")}
    tend(context, {}, lambda: False)
    assert [*store.list("")] == []
    broker.close()


def test_gc_of_all_jobs_removes_them_and_a_dry_run_only_names_them(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    key = answer_key("site-a", new_update_id())
    store.put(key, b"x")
    past = time.time() - timedelta(days=30).total_seconds()
    os.utime(tmp_path / key, (past, past))
    for arguments in (["gc", "--dry-run"], ["gc"]):
        assert store.size(key) == 1
        result = CliRunner().invoke(app, [*arguments, "--store-url", f"file:{tmp_path}"])
        assert result.exit_code == 0, result.output
        assert key in result.output
    assert [*store.list("answers/")] == []
