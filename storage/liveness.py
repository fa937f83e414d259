"""Which sites are alive: their last heartbeats, each forgotten some seconds after it came.

Redis:    live:<site>              SiteStatus as JSON, SET … PX ttl
Folder:   <folder>/<site>.json     {"expires_at": Unix seconds, "status": SiteStatus}

Disposable: nothing is decided by it, and whatever is lost comes again with the next heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from federation.base import Value
from federation.errors import BadSettings, Rejected, Transient
from federation.settings import Settings
from federation.types import SiteStatus
from storage.files import replace_quickly
from storage.open import local_path

V = TypeVar("V", bound=Value)

REDIS_PREFIX = "live:"
REDIS_TIMEOUT_S = 2.0


class Liveness(Protocol):
    """The last known status of each site that is alive."""

    def beat(self, status: SiteStatus, ttl_s: float) -> None:
        """The site is alive, and for `ttl_s` seconds more. Raises Transient."""
        ...

    def sites(self) -> list[SiteStatus]:
        """Those that are alive now, by name. Raises Transient."""
        ...


class RedisLiveness:
    """Liveness for any number of server processes. Connects at the first call."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # once, for a connection that went stale; the next beat is near
        )

    def beat(self, status: SiteStatus, ttl_s: float) -> None:
        try:
            self._redis.set(f"{REDIS_PREFIX}{status.site}", status.to_json(), px=max(1, round(ttl_s * 1000)))
        except redis.RedisError as exc:
            raise Transient(f"Redis did not answer: {exc}; check live_url and its health") from exc

    def sites(self) -> list[SiteStatus]:
        try:
            names = list(self._redis.scan_iter(match=f"{REDIS_PREFIX}*", count=1000))
            values = self._redis.mget(names) if names else []
        except redis.RedisError as exc:
            raise Transient(f"Redis did not answer: {exc}; check live_url and its health") from exc
        found = (_readable(SiteStatus, value) for value in values if value is not None)
        return sorted((status for status in found if status), key=lambda status: status.site)


class _Beat(Value):
    expires_at: float
    status: SiteStatus


class FolderLiveness:
    """Liveness for the processes of one machine."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock

    def beat(self, status: SiteStatus, ttl_s: float) -> None:
        beat = _Beat(expires_at=self._clock() + ttl_s, status=status)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_quickly(self._folder / f"{status.site}.json", beat.to_json())
        except OSError as exc:
            raise Transient(f"the liveness folder {self._folder} cannot be written: {exc}") from exc

    def sites(self) -> list[SiteStatus]:
        now, alive = self._clock(), []
        try:
            for path in sorted(self._folder.glob("*.json")):
                beat = _readable(_Beat, path.read_bytes())
                if beat and beat.expires_at > now:
                    alive.append(beat.status)
        except OSError as exc:
            raise Transient(f"the liveness folder {self._folder} cannot be read: {exc}") from exc
        return alive


def _readable(kind: type[V], raw: bytes | str) -> V | None:
    """None for what another release wrote: a view of sites must not fail while they are upgraded."""
    try:
        return kind.from_json(raw)
    except Rejected:
        return None


def open_liveness(settings: Settings) -> Liveness:
    """What the settings' live_url names. Connects to nothing yet. Raises BadSettings."""
    url = settings.live_url.get_secret_value()
    if url.startswith("file:"):
        return FolderLiveness(local_path(url))
    try:
        return RedisLiveness(url)
    except ValueError as exc:
        raise BadSettings(f"live_url: {exc}") from exc
