"""What the job's log says to a site: the newest version, and what became of its own updates.

The log is read record by record from the last one seen, so that a site learns every outcome, however long it
was away and whatever control messages it missed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from federation.types import Head, LogRecord, Published
from producers.outbox import Outbox
from storage.log import VersionLog, refusals

log = logging.getLogger("fedqueue.site")


@dataclass
class Follower:
    """One site's view of one job."""

    log: VersionLog
    outbox: Outbox
    on_record: Callable[[Head, Head], None] = lambda before, after: None
    """Told of each head and the one that followed it; of the first one, that it follows itself."""
    _last: LogRecord | None = None

    def look(self) -> Head:
        """The newest head. Settles those of our updates whose fate the log tells.

        Raises NotFound if the job has no log yet, StoreUnavailable; the next call goes on where this one was.
        """
        if self._last is None:
            self._last = self._start()
            self.on_record(self._last.head, self._last.head)
        for record in self.log.history(self._last.seq + 1):
            self._settle(record)
            self.on_record(self._last.head, record.head)
            self._last = record
        return self._last.head

    def _start(self) -> LogRecord:
        """Where to begin: no record up to here names what an earlier run of this agent sent."""
        bases = [update.base_version for update in self.outbox.sent()]
        return self.log.first_at(min(bases)) if bases else self.log.head()

    def _settle(self, record: LogRecord) -> None:
        event = record.event
        if isinstance(event, Published):
            for contribution in event.merged:
                if self.outbox.settle(contribution.update.update_id):
                    log.info(
                        "%s: update %s: merged into version %d, staleness %d, weight %.4f",
                        *(record.job, contribution.update.update_id, contribution.version),
                        *(contribution.staleness, contribution.weight),
                    )
        for refusal in refusals(event):
            if self.outbox.settle(refusal.update.update_id):
                log.warning(
                    "%s: update %s: rejected (%s): %s",
                    *(record.job, refusal.update.update_id, refusal.reason, refusal.message),
                )
