"""When this site may begin its next training for a job: an invitation that is not used, an interval that is over.

    <folder>/turns.json    the last invitation that was used, and when the last training with an update began

It is written just before the update is put into the outbox. So a restart never trains twice for one invitation, and
an attempt that came to nothing, or died with the process, uses none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime

from federation.base import Value
from federation.errors import Rejected
from federation.governance import Invitation
from federation.jobs import Participation
from storage.files import replace_durably

log = logging.getLogger("fedqueue.site")

FILE = "turns.json"


class Kept(Value):
    """`turns.json`."""

    schema_version: Literal[1] = 1
    invited_at: AwareDatetime | None = None
    began_at: AwareDatetime | None = None


@dataclass
class Turns:
    """One site's turns for one job."""

    participation: Participation
    folder: Path
    _kept: Kept = field(init=False)

    def __post_init__(self) -> None:
        self._kept = self._read()

    @property
    def by_invitation(self) -> bool:
        return self.participation.mode == "invited"

    def waits_for(self, invitation: Invitation | None, now: datetime) -> str | None:
        """What is missing for a training to begin; None: nothing."""
        if self.by_invitation and not self._is_good(invitation, now):
            return "for an invitation"
        if self._kept.began_at is not None:
            since = now - self._kept.began_at
            # a clock that was put back keeps nobody waiting
            if timedelta(0) <= since < timedelta(seconds=self.participation.min_interval_s):
                left = self.participation.min_interval_s - since.total_seconds()
                return f"{left:.0f} s until its next training"
        return None

    def use(self, invitation: Invitation | None, began_at: datetime) -> None:
        """A training that began then is finished, and its update comes next. Durable when this returns."""
        if not self.by_invitation and not self.participation.min_interval_s:
            return
        self._kept = Kept(
            invited_at=invitation.invited_at if self.by_invitation and invitation is not None else None,
            began_at=began_at,
        )
        replace_durably(self.folder / FILE, self._kept.to_json())

    def _is_good(self, invitation: Invitation | None, now: datetime) -> bool:
        return (
            invitation is not None
            and now < invitation.expires_at
            and invitation.invited_at != self._kept.invited_at
        )

    def _read(self) -> Kept:
        path = self.folder / FILE
        try:
            return Kept.from_json(path.read_bytes())
        except FileNotFoundError:
            return Kept()
        except Rejected as exc:
            log.warning("%s cannot be used and is begun anew: %s", path, exc)
            return Kept()
