"""Whether a version may be given away: the job's rule, its contributors, and what each of them answered last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from federation.jobs import ReleaseRule


@dataclass(frozen=True)
class Standing:
    """Where a proposal stands. `needed`: so many must approve. Each contributor is in one of the three."""

    needed: int
    approved: tuple[str, ...]
    refused: tuple[str, ...]
    waiting: tuple[str, ...]

    @property
    def met(self) -> bool:
        return len(self.approved) >= self.needed

    @property
    def blocked(self) -> bool:
        """So many refuse that the rule cannot be met, unless one of them thinks better of it."""
        return len(self.approved) + len(self.waiting) < self.needed

    def describe(self) -> str:
        """In words: `1 of 3 approved, 3 needed; refused by a; waiting for b`."""
        total = len(self.approved) + len(self.refused) + len(self.waiting)
        parts = [f"{len(self.approved)} of {total} approved, {self.needed} needed"]
        if self.refused:
            parts.append(f"refused by {', '.join(self.refused)}")
        if self.waiting:
            parts.append(f"waiting for {', '.join(self.waiting)}")
        return "; ".join(parts)


def needed(rule: ReleaseRule, contributors: int) -> int:
    """How many of so many contributors must approve."""
    return contributors if rule.approvals == "all" else contributors // 2 + 1


def judge(rule: ReleaseRule, contributors: Sequence[str], approves: Mapping[str, bool]) -> Standing:
    """`approves`: what each site answered last; of one that is no contributor it does not count."""
    return Standing(
        needed=needed(rule, len(contributors)),
        approved=tuple(site for site in contributors if approves.get(site) is True),
        refused=tuple(site for site in contributors if approves.get(site) is False),
        waiting=tuple(site for site in contributors if site not in approves),
    )
