"""What Liveness promises, on a folder and a real Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from federation.errors import BadSettings, Transient
from federation.settings import Settings
from federation.types import SiteStatus
from storage.liveness import FolderLiveness, Liveness, RedisLiveness, open_liveness
from tests.servers.redis import RedisServer

AT = datetime(2030, 1, 1, tzinfo=UTC)


def status(site: str, step: int = 0) -> SiteStatus:
    return SiteStatus(site=site, state="training", step=step, steps=10, at=AT)


@pytest.fixture(params=["folder", pytest.param("redis", marks=pytest.mark.redis)])
def liveness(request: pytest.FixtureRequest, tmp_path: Path) -> Liveness:
    if request.param == "folder":
        return open_liveness(Settings(live_url=SecretStr(f"file:{tmp_path}/live")))
    server: RedisServer = request.getfixturevalue("redis_server")
    redis.Redis.from_url(server.url).flushall()
    return open_liveness(Settings(live_url=SecretStr(server.url)))


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_nobody_is_alive_at_first(liveness: Liveness) -> None:
    assert liveness.sites() == []


def test_a_beat_is_seen_whole_and_sorted_by_site(liveness: Liveness) -> None:
    for site in ("south", "north", "east"):
        liveness.beat(status(site, 3), ttl_s=60)
    assert liveness.sites() == [status("east", 3), status("north", 3), status("south", 3)]


def test_the_newest_beat_counts(liveness: Liveness) -> None:
    liveness.beat(status("north", 1), ttl_s=60)
    liveness.beat(status("north", 2), ttl_s=60)
    assert liveness.sites() == [status("north", 2)]


def test_a_silent_site_is_forgotten(liveness: Liveness) -> None:
    liveness.beat(status("north"), ttl_s=0.05)
    liveness.beat(status("south"), ttl_s=600)
    wait_until(lambda: liveness.sites() == [status("south")])


def test_a_later_beat_prolongs_a_life(liveness: Liveness) -> None:
    liveness.beat(status("north"), ttl_s=0.05)
    liveness.beat(status("north"), ttl_s=600)
    liveness.beat(status("south"), ttl_s=0.05)
    wait_until(lambda: liveness.sites() == [status("north")])


def test_many_sites(liveness: Liveness) -> None:
    names = [f"site-{n:03d}" for n in range(300)]
    for name in names:
        liveness.beat(status(name), ttl_s=60)
    assert [s.site for s in liveness.sites()] == names


def test_a_folder_forgets_by_its_clock(tmp_path: Path) -> None:
    now = [1000.0]
    liveness = FolderLiveness(tmp_path, clock=lambda: now[0])
    liveness.beat(status("north"), ttl_s=15)
    now[0] = 1014.9
    assert liveness.sites() == [status("north")]
    now[0] = 1015.0
    assert liveness.sites() == []


def test_what_another_release_wrote_does_not_hide_the_others(tmp_path: Path) -> None:
    liveness = FolderLiveness(tmp_path)
    liveness.beat(status("north"), ttl_s=60)
    (tmp_path / "south.json").write_bytes(b'{"schema_version": 2}')
    assert liveness.sites() == [status("north")]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("~")] == []


def test_a_folder_that_is_none_is_transient(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    liveness = FolderLiveness(tmp_path / "file")
    with pytest.raises(Transient, match="cannot be written"):
        liveness.beat(status("north"), ttl_s=60)


@pytest.mark.redis
def test_redis_holds_other_keys_too(redis_server: RedisServer) -> None:
    client = redis.Redis.from_url(redis_server.url)
    client.flushall()
    liveness = RedisLiveness(redis_server.url)
    liveness.beat(status("north"), ttl_s=60)
    client.set("other", "x")
    client.set("live:south", "not a status")
    assert liveness.sites() == [status("north")]
    remaining = client.pttl("live:north")
    assert isinstance(remaining, int)
    assert 0 < remaining <= 60_000


@pytest.mark.redis
def test_redis_may_go_and_come_back() -> None:
    with RedisServer() as server:
        liveness = RedisLiveness(server.url)
        liveness.beat(status("north"), ttl_s=60)
        server.stop()
        for call in (liveness.sites, lambda: liveness.beat(status("north"), ttl_s=60)):
            with pytest.raises(Transient, match="Redis did not answer"):
                call()
        server.start()
        assert liveness.sites() == []
        liveness.beat(status("north"), ttl_s=60)
        assert liveness.sites() == [status("north")]


def test_a_bad_url_is_named() -> None:
    with pytest.raises(BadSettings, match="live_url"):
        open_liveness(Settings(live_url=SecretStr("redis://host/0?db=first")))
