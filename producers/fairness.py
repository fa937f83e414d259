"""Whose turn it is to train: start-time fair queueing over a site's jobs, all of equal weight. Pure.

Each training gets a start tag, the later of the job's own last finish tag and the virtual time; its finish tag is that
plus the seconds that it took. The job with the smallest start tag goes first, and the virtual time is the start tag of
the training that was chosen last. So jobs that could always train get equal time, however long each training takes;
and a job that is new, or could not train for a while, starts where the others are: it is not owed the time before.
(Goyal, Vin, Cheng: Start-time Fair Queuing, SIGCOMM 1996.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class FairShare:
    """Training time of one site, shared among its jobs."""

    _virtual: float = 0.0
    _finish: dict[str, float] = field(default_factory=dict)

    def pick(self, jobs: Iterable[str]) -> str | None:
        """Of the jobs that could train now, the one whose turn it is; None if there are none."""
        return min(jobs, key=lambda job: (self._start(job), job), default=None)

    def charge(self, job: str, seconds: float) -> None:
        """`job` was picked, and trained for so long."""
        self._virtual = self._start(job)
        self._finish[job] = self._virtual + seconds

    def forget(self, job: str) -> None:
        """The job is over."""
        self._finish.pop(job, None)

    def _start(self, job: str) -> float:
        return max(self._finish.get(job, 0.0), self._virtual)
