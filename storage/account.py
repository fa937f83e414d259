"""What a job cost each site and brought it, counted from the log: updates, bytes that travelled, bytes that did not.

Up are the payloads and messages of updates, each counted once, merged or not; what a lost connection made a site send
again, heartbeats and reports are not. Down is what sites say that they read (`Transfer`): a little less than the truth
after a restart, which forgets what was read since the last update. Images count once, as the newest update has them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from federation.types import Accepted, ClientUpdate, Contribution, LogRecord, Published, Refused
from storage.log import refusals


@dataclass
class Account:
    """One site's part in a job, or the sum of several. Bytes are never negative; `staleness` is a sum over `merged`.

    `untold`: updates that do not say what was downloaded, or how large the images behind them are.
    """

    merged: int = 0
    rejected: int = 0
    staleness: int = 0
    weight: float = 0.0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    image_bytes: int = 0
    untold: int = 0
    last: Contribution | None = None
    """The contribution that was merged last, and when."""
    last_at: datetime | None = None

    @property
    def mean_staleness(self) -> float:
        return self.staleness / self.merged if self.merged else 0.0

    @property
    def travelled_bytes(self) -> int:
        return self.uploaded_bytes + self.downloaded_bytes

    @property
    def ratio(self) -> float | None:
        """Bytes of images that stayed home for each byte that travelled. None: one of the two is not known."""
        return self.image_bytes / self.travelled_bytes if self.image_bytes and self.travelled_bytes else None

    def _sent(self, update: ClientUpdate) -> None:
        self.uploaded_bytes += update.payload_bytes + len(update.to_json())
        moved = update.transfer
        self.untold += moved is None or not moved.image_bytes
        if moved is not None:
            self.downloaded_bytes += moved.downloaded_bytes
            self.image_bytes = moved.image_bytes or self.image_bytes

    def _merged(self, contribution: Contribution, at: datetime) -> None:
        self.merged += 1
        self.staleness += contribution.staleness
        self.weight += contribution.weight
        self.last, self.last_at = contribution, at


def accounts(records: Iterable[LogRecord]) -> dict[str, Account]:
    """By site, sorted; of sites that have sent anything."""
    result: dict[str, Account] = defaultdict(Account)
    waited: set[str] = set()  # ids that were pending before the record
    for record in records:
        event = record.event
        if isinstance(event, Accepted):
            result[event.contribution.update.site]._sent(event.contribution.update)
        elif isinstance(event, Refused) and event.refusal.update.update_id not in waited:
            result[event.refusal.update.site]._sent(event.refusal.update)
        elif isinstance(event, Published):
            for contribution in event.merged:
                result[contribution.update.site]._merged(contribution, record.at)
        for refusal in refusals(event):
            result[refusal.update.site].rejected += 1
        waited = {contribution.update.update_id for contribution in record.head.pending}
    return dict(sorted(result.items()))


def total(parts: Iterable[Account]) -> Account:
    """Their sum."""
    result = Account()
    for part in parts:
        result.merged += part.merged
        result.rejected += part.rejected
        result.staleness += part.staleness
        result.weight += part.weight
        result.uploaded_bytes += part.uploaded_bytes
        result.downloaded_bytes += part.downloaded_bytes
        result.image_bytes += part.image_bytes
        result.untold += part.untold
    return result
