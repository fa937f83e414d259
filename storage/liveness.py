"""Which sites are there: the last heartbeat of each, stamped with the time at which the server had it.

Redis:    live:<site>              {"seen_at", "status": SiteStatus}, by the clock of Redis
Folder:   <folder>/<site>.json     the same, by this machine's clock

One clock both stamps and tells the age, whoever asks: that of the sites counts for nothing, and neither that of the
machine where an operator looks. A silent site stays in the view, with what it did last, for KEEP_S.

Disposable: no update depends on it, and whatever is lost comes again with the next heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol, get_args

import redis
from pydantic import AwareDatetime
from redis.backoff import NoBackoff
from redis.retry import Retry

from federation.base import Value
from federation.errors import BadSettings, Rejected, Transient
from federation.settings import Settings
from federation.types import SiteStatus
from storage.files import replace_quickly
from storage.open import local_path

REDIS_PREFIX = "live:"
REDIS_TIMEOUT_S = 2.0
KEEP_S = 30 * 86_400
SLACK_S = 1.0
"""What a heartbeat may take on its way, and clocks may differ by."""

Condition = Literal["connected", "silent", "gone"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


@dataclass(frozen=True)
class Seen:
    """The last heartbeat of a site, and how long ago the server had it, by the clock that stamped it."""

    status: SiteStatus
    seen_at: datetime
    age_s: float

    def condition(self, heartbeat_s: float, ttl_s: float) -> Condition:
        """connected: `status` is what the site does now. silent: two heartbeats are missing. gone: all of `ttl_s`
        seconds of them are, or it said that it stops.

        A stamp of the future (`age_s` negative) was made before the clock was set back: had the site been heard since,
        it would have another. It may be there or not, so it is silent.
        """
        if self.status.state == "stopped" or self.age_s >= ttl_s:
            return "gone"
        if -SLACK_S <= self.age_s <= 2 * heartbeat_s + SLACK_S:
            return "connected"
        return "silent"


class Liveness(Protocol):
    """The last known status of each site."""

    def beat(self, status: SiteStatus) -> None:
        """The site is there now. Raises Transient."""
        ...

    def sites(self) -> list[Seen]:
        """All that were there in the last KEEP_S, by name. Raises Transient."""
        ...


class _Beat(Value):
    seen_at: AwareDatetime
    status: SiteStatus


class RedisLiveness:
    """Liveness for any number of server processes. Connects at the first call."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # once, for a connection that went stale; the next beat is near
        )

    def beat(self, status: SiteStatus) -> None:
        try:
            beat = _Beat(seen_at=self._now(), status=status)
            self._redis.set(f"{REDIS_PREFIX}{status.site}", beat.to_json(), ex=KEEP_S)
        except redis.RedisError as exc:
            raise _unanswered(exc) from exc

    def sites(self) -> list[Seen]:
        try:
            names = list(self._redis.scan_iter(match=f"{REDIS_PREFIX}*", count=1000))
            values = self._redis.mget(names) if names else []
            now = self._now()
        except redis.RedisError as exc:
            raise _unanswered(exc) from exc
        return _seen((value for value in values if value is not None), now)

    def _now(self) -> datetime:
        seconds, microseconds = self._redis.time()
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=microseconds)


class FolderLiveness:
    """Liveness for the processes of one machine. `clock` gives Unix seconds."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock

    def beat(self, status: SiteStatus) -> None:
        beat = _Beat(seen_at=self._now(), status=status)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_quickly(self._folder / f"{status.site}.json", beat.to_json())
        except OSError as exc:
            raise Transient(f"the liveness folder {self._folder} cannot be written: {exc}") from exc

    def sites(self) -> list[Seen]:
        try:
            found = [path.read_bytes() for path in self._folder.glob("*.json")]
        except OSError as exc:
            raise Transient(f"the liveness folder {self._folder} cannot be read: {exc}") from exc
        return _seen(found, self._now())

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def _seen(beats: Iterable[bytes | str], now: datetime) -> list[Seen]:
    found = []
    for raw in beats:
        try:
            beat = _Beat.from_json(raw)
        except Rejected:
            continue  # of another release: a view of sites must not fail while they are upgraded
        age_s = (now - beat.seen_at).total_seconds()
        if age_s < KEEP_S:
            found.append(Seen(beat.status, beat.seen_at, age_s))
    return sorted(found, key=lambda seen: seen.status.site)


def _unanswered(exc: redis.RedisError) -> Transient:
    return Transient(f"Redis did not answer: {exc}; check live_url and its health")


def open_liveness(settings: Settings) -> Liveness:
    """What the settings' live_url names. Connects to nothing yet. Raises BadSettings."""
    url = settings.live_url.get_secret_value()
    if url.startswith("file:"):
        return FolderLiveness(local_path(url))
    try:
        return RedisLiveness(url)
    except ValueError as exc:
        raise BadSettings(f"live_url: {exc}") from exc
