"""What Liveness promises, on a folder and a real Redis."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from federation.errors import BadSettings, Transient
from federation.settings import Settings
from federation.types import SiteStatus
from storage.liveness import KEEP_S, FolderLiveness, Liveness, RedisLiveness, Seen, open_liveness
from tests.servers.redis import RedisServer

AT = datetime(2030, 1, 1, tzinfo=UTC)
HEARTBEAT_S, TTL_S = 5.0, 15.0


def status(site: str, step: int = 0) -> SiteStatus:
    return SiteStatus(site=site, state="training", step=step, steps=10, at=AT)


@pytest.fixture(params=["folder", pytest.param("redis", marks=pytest.mark.redis)])
def liveness(request: pytest.FixtureRequest, tmp_path: Path) -> Liveness:
    if request.param == "folder":
        return open_liveness(Settings(live_url=SecretStr(f"file:{tmp_path}/live")))
    server: RedisServer = request.getfixturevalue("redis_server")
    redis.Redis.from_url(server.url).flushall()
    return open_liveness(Settings(live_url=SecretStr(server.url)))


def seen(liveness: Liveness) -> list[SiteStatus]:
    return [seen.status for seen in liveness.sites()]


def test_nobody_is_there_at_first(liveness: Liveness) -> None:
    assert liveness.sites() == []


def test_a_beat_is_seen_whole_and_sorted_by_site(liveness: Liveness) -> None:
    for site in ("south", "north", "east"):
        liveness.beat(status(site, 3))
    assert seen(liveness) == [status("east", 3), status("north", 3), status("south", 3)]


def test_the_newest_beat_counts(liveness: Liveness) -> None:
    liveness.beat(status("north", 1))
    (first,) = liveness.sites()
    liveness.beat(status("north", 2))
    (second,) = liveness.sites()
    assert (first.status.step, second.status.step) == (1, 2)
    assert first.seen_at < second.seen_at


def test_a_beat_is_stamped_by_the_server_and_not_by_the_site(liveness: Liveness) -> None:
    before = datetime.now(UTC)
    liveness.beat(status("north"))  # which says that it is 2030
    (seen,) = liveness.sites()
    assert before - timedelta(seconds=1) <= seen.seen_at <= datetime.now(UTC) + timedelta(seconds=1)
    assert 0 <= seen.age_s < 30


def test_the_age_grows_from_look_to_look(liveness: Liveness) -> None:
    liveness.beat(status("north"))
    (first,), (second,) = liveness.sites(), liveness.sites()
    assert first.seen_at == second.seen_at
    assert first.age_s < second.age_s
    assert second.age_s - first.age_s < 30


def test_many_sites(liveness: Liveness) -> None:
    names = [f"site-{n:03d}" for n in range(300)]
    for name in names:
        liveness.beat(status(name))
    assert [status.site for status in seen(liveness)] == names


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_folder_tells_ages_by_its_clock_and_forgets_after_a_month(tmp_path: Path) -> None:
    clock = Clock()
    liveness = FolderLiveness(tmp_path, clock)
    liveness.beat(status("north"))
    at = datetime.fromtimestamp(clock.now, UTC)
    clock.now += 14.5
    assert liveness.sites() == [Seen(status("north"), at, 14.5)]
    clock.now += KEEP_S - 15
    assert seen(liveness) == [status("north")]
    clock.now += 0.5
    assert liveness.sites() == []


def test_a_stepping_clock_misleads_until_the_next_heartbeat_at_most(tmp_path: Path) -> None:
    clock = Clock()
    liveness = FolderLiveness(tmp_path, clock)
    liveness.beat(status("alive"))
    liveness.beat(status("dead"))

    def conditions() -> list[str]:
        return [seen.condition(HEARTBEAT_S, TTL_S) for seen in liveness.sites()]

    assert conditions() == ["connected", "connected"]
    for step in (3600.0, -7200.0):  # forwards, then backwards behind every stamp
        clock.now += step
        assert "connected" not in conditions()  # nobody knows
        liveness.beat(status("alive"))
        assert conditions() == ["connected", "gone" if step > 0 else "silent"]


@pytest.mark.parametrize(
    ("age_s", "condition"),
    [
        (0.0, "connected"),
        (11.0, "connected"),
        (11.1, "silent"),
        (14.9, "silent"),
        (15.0, "gone"),
        (1e6, "gone"),
        (-1.0, "connected"),
        (-1.1, "silent"),
        (-1e6, "silent"),
    ],
)
def test_the_condition_follows_from_the_age(age_s: float, condition: str) -> None:
    assert Seen(status("north"), AT, age_s).condition(HEARTBEAT_S, TTL_S) == condition


def test_who_says_that_it_stops_is_gone_at_once() -> None:
    stopped = status("north").model_copy(update={"state": "stopped"})
    assert Seen(stopped, AT, 0.0).condition(HEARTBEAT_S, TTL_S) == "gone"


def test_with_heartbeats_at_half_the_time_to_live_nobody_is_silent() -> None:
    conditions = {Seen(status("north"), AT, n / 10).condition(5.0, 10.0) for n in range(200)}
    assert conditions == {"connected", "gone"}


def test_what_another_release_wrote_does_not_hide_the_others(tmp_path: Path) -> None:
    liveness = FolderLiveness(tmp_path)
    liveness.beat(status("north"))
    (tmp_path / "south.json").write_bytes(b'{"schema_version": 2}')
    assert seen(liveness) == [status("north")]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("~")] == []


def test_a_folder_that_is_none_is_transient(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    liveness = FolderLiveness(tmp_path / "file")
    with pytest.raises(Transient, match="cannot be written"):
        liveness.beat(status("north"))


@pytest.mark.redis
def test_redis_holds_other_keys_too_and_forgets_after_a_month(redis_server: RedisServer) -> None:
    client = redis.Redis.from_url(redis_server.url)
    client.flushall()
    liveness = RedisLiveness(redis_server.url)
    liveness.beat(status("north"))
    client.set("other", "x")
    client.set("live:south", "not a status")
    assert seen(liveness) == [status("north")]
    remaining = client.ttl("live:north")
    assert isinstance(remaining, int)
    assert KEEP_S - 60 < remaining <= KEEP_S


@pytest.mark.redis
def test_redis_may_go_and_come_back() -> None:
    with RedisServer() as server:
        liveness = RedisLiveness(server.url)
        liveness.beat(status("north"))
        server.stop()
        for call in (liveness.sites, lambda: liveness.beat(status("north"))):
            with pytest.raises(Transient, match="Redis did not answer"):
                call()
        server.start()
        assert liveness.sites() == []
        liveness.beat(status("north"))
        assert seen(liveness) == [status("north")]


def test_a_bad_url_is_named() -> None:
    with pytest.raises(BadSettings, match="live_url"):
        open_liveness(Settings(live_url=SecretStr("redis://host/0?db=first")))
