"""A site's answer to a job, joined or declined: asked of the server until the bucket shows that it has it.

A request that is lost is sent again under its own id, so that it counts once; what is in the store decides, and the
control message `answered` only brings the next look forward.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from broker import topology
from broker.port import Broker
from federation.errors import AccessDenied, BadMessage, BrokerUnavailable
from federation.governance import Member
from federation.ids import new_update_id
from federation.requests import DeclineJob, JoinJob, Request
from federation.wire import encode_request
from storage.blob import BlobStore
from storage.control import load_answer, load_member

log = logging.getLogger("fedqueue.site")

REPEAT_AFTER_S = 30.0
"""A request without an answer for so long may be lost: send it again, and later half as often each time."""
REPEAT_LIMIT_S = 600.0


@dataclass
class Membership:
    """`tend` it now and then until it is `settled`. `refused`: why the server does not let the site take part."""

    site: str
    what: JoinJob | DeclineJob
    store: BlobStore
    broker: Broker
    clock: Callable[[], float] = time.monotonic
    settled: bool = False
    refused: str = ""
    _request: Request | None = None
    _wait_s: float = REPEAT_AFTER_S
    _send_at: float = float("-inf")

    @property
    def request_id(self) -> str | None:
        return None if self._request is None else self._request.request_id

    def tend(self) -> None:
        """Look whether the server has it; else ask. Raises StoreUnavailable."""
        if self.settled or self._is_answered():
            return
        if self.clock() >= self._send_at:
            self._send()

    def _is_answered(self) -> bool:
        if self._request is None:
            known = load_member(self.store, self.what.job, self.site)
            self.settled = known is not None and self._says(known)
            if not self.settled:
                self._request = self._ask(known)
            return self.settled
        answer = load_answer(self.store, self.site, self._request.request_id)
        if answer is None:
            return False
        self.settled = True
        if not answer.ok:
            self.refused = "; ".join(answer.errors)
            log.error("%s: the server refused %s: %s", self.what.job, self.what.kind, self.refused)
        else:
            log.info("%s: %s", self.what.job, answer.message)
        return True

    def _says(self, known: Member) -> bool:
        if isinstance(self.what, JoinJob):
            return (known.answer, known.num_images) == ("joined", self.what.num_images)
        return (known.answer, known.reason) == ("declined", self.what.reason)

    def _ask(self, known: Member | None) -> Request:
        now = datetime.now(UTC)
        if known is not None and known.at >= now:  # the clock was put back; the later answer counts
            now = known.at + timedelta(microseconds=1)
        return Request(request_id=new_update_id(), who=self.site, what=self.what, at=now)

    def _send(self) -> None:
        assert self._request is not None
        try:
            self.broker.publish(topology.UPDATES_EXCHANGE, encode_request(self._request))
        except BrokerUnavailable as exc:
            log.warning("%s: %s waits: %s", self.what.job, self.what.kind, exc)
            self._send_at = self.clock() + REPEAT_AFTER_S
            return
        except (BadMessage, AccessDenied) as exc:
            log.error(
                "%s: the server takes no requests, so it does not know of this site's %s; its operator should run "
                "`fedqueue server init` and enrol this site again: %s",
                *(self.what.job, self.what.kind, exc),
            )
            self.settled = True
            return
        self._send_at = self.clock() + self._wait_s
        self._wait_s = min(2 * self._wait_s, REPEAT_LIMIT_S)
