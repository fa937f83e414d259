"""What each site contributed, counted from the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from federation.types import LogRecord, Published, Refusal, Refused


@dataclass
class Share:
    """One site's part in a job. `sent_bytes`: payloads, of merged and refused updates alike."""

    merged: int = 0
    refused: int = 0
    staleness: int = 0
    weight: float = 0.0
    sent_bytes: int = 0

    @property
    def mean_staleness(self) -> float:
        return self.staleness / self.merged if self.merged else 0.0


def shares(records: Iterable[LogRecord]) -> dict[str, Share]:
    """By site."""
    result: dict[str, Share] = defaultdict(Share)
    for record in records:
        refusals: tuple[Refusal, ...] = ()
        if isinstance(record.event, Published):
            refusals = record.event.refused
            for contribution in record.event.merged:
                share = result[contribution.update.site]
                share.merged += 1
                share.staleness += contribution.staleness
                share.weight += contribution.weight
                share.sent_bytes += contribution.update.payload_bytes
        elif isinstance(record.event, Refused):
            refusals = (record.event.refusal,)
        for refusal in refusals:
            result[refusal.update.site].refused += 1
            result[refusal.update.site].sent_bytes += refusal.update.payload_bytes
    return dict(result)
