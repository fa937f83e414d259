"""A site's own policy: which jobs it takes part in, and when it trains for them. Pure.

Classes, size and submitters of a job decide whether the site joins or declines. The hours of the day and the load of
the machine decide when a training may begin; one that has begun is not broken off.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import time

from federation.errors import Rejected
from federation.hours import Hours
from federation.jobs import Job
from federation.settings import Settings

MAX_REASON = 200
NAMED = 5
"""Classes that a reason names before it only counts."""


class Declined(Rejected):
    """The site's own policy is against the job."""

    reason = "policy"


@dataclass(frozen=True)
class Policy:
    """None allows everything. `classes`: those that the site's data have."""

    classes: frozenset[str] | None = None
    all_classes: bool = False
    max_model_bytes: int | None = None
    submitters: frozenset[str] | None = None
    hours: Hours | None = None
    max_load: float | None = None

    @classmethod
    def from_settings(cls, settings: Settings, classes: Collection[str] | None = None) -> Policy:
        """`classes`: what the data hold, if the settings do not say it; None: that is not known."""
        chosen = settings.site_classes if settings.site_classes is not None else classes
        return cls(
            classes=None if chosen is None else frozenset(chosen),
            all_classes=settings.site_all_classes,
            max_model_bytes=settings.site_max_model_bytes,
            submitters=None if settings.site_submitters is None else frozenset(settings.site_submitters),
            hours=None if settings.site_hours is None else Hours.parse(settings.site_hours),
            max_load=settings.site_max_load,
        )

    def objection(self, job: Job) -> str | None:
        """Why the site declines `job`; None: it joins. In words that everybody in the federation may read."""
        if self.submitters is not None and job.submitted_by not in self.submitters:
            return f"this site takes part in no job of {job.submitted_by}"
        if self.max_model_bytes is not None and job.initial.nbytes > self.max_model_bytes:
            return f"the model has {job.initial.nbytes} bytes, this site takes at most {self.max_model_bytes}"
        if self.classes is None:
            return None
        missing = [name for name in job.spec.classes if name not in self.classes]
        if len(missing) == len(job.spec.classes):
            return f"this site has none of the job's classes ({_some(missing)})"[:MAX_REASON]
        if missing and self.all_classes:
            return f"this site has not all of the job's classes: no {_some(missing)}"[:MAX_REASON]
        return None

    def not_now(self, at: time, load: float | None) -> str | None:
        """Why no training begins at local time `at` under `load` (load average per core; None: unknown)."""
        if self.hours is not None and at not in self.hours:
            return f"for its hours, {self.hours}"
        if self.max_load is not None and load is not None and load > self.max_load:
            return f"for a load of {self.max_load:g} per core, it is {load:.2f}"
        return None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
