"""What the run came to, as Markdown: the faults with their recovery times, and what became of the updates."""

from __future__ import annotations

import bisect
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.accounting import Ledger
from tests.chaos.killer import Done
from tests.chaos.plan import OUTAGES, Fault, Kind

OF_SITES = (Kind.KILL_SITE, Kind.CUT_SITE)
OF_REDIS = (Kind.REDIS_RESTART, Kind.REDIS_FLUSH)
RECOVERY = """\
Recovery is counted from the end of the fault (the kill, the repair of the line, the server being up again): of a site
until its next confirmed publish, of Redis until a heartbeat can be seen, of all others until the next record of the
log. Faults overlap, so a time includes what else went wrong meanwhile."""


@dataclass(frozen=True)
class Recovered:
    """A fault and the seconds until the system worked again; None: it never did."""

    done: Done
    seconds: float | None


def recoveries(
    done: Iterable[Done], records: Sequence[float], confirms: Mapping[str, Sequence[float]]
) -> list[Recovered]:
    """`records`: Unix times of the log's records; `confirms`: of each site's confirmed publishes. Both ascend."""
    found = []
    for one in done:
        if one.fault.kind in OF_REDIS:
            seconds = one.recovered_s
        else:
            times = confirms[one.target] if one.fault.kind in OF_SITES else records
            after = bisect.bisect_right(times, one.ended)
            seconds = times[after] - one.ended if after < len(times) else None
        found.append(Recovered(one, seconds))
    return found


@dataclass(frozen=True)
class Run:
    """Everything that the report tells."""

    seed: int
    seconds: float
    recovered: Sequence[Recovered]
    missed: Sequence[Fault]
    in_sites: Mapping[str, int]
    """Faults that the sites' wrappers played, by "broker repeat" and the like."""
    confirmed: Sequence[str]
    """Update id of each confirmed publish, repetitions included."""
    ledger: Ledger
    duplicates: int
    """Times that a worker found an update in the log already."""
    dropped_publishes: int
    """Folds that were dropped because another worker had published first."""
    own_ends: Mapping[str, int]
    """Processes that ended although nobody killed them, and how often."""
    verdicts: Sequence[str]
    """Last lines of `fedqueue audit` and `fedqueue replay`."""
    problems: Sequence[str]

    def markdown(self) -> str:
        verdict = "passed" if not self.problems else "FAILED"
        parts = [
            f"# Chaos run, seed {self.seed}, {self.seconds:.0f} s: {verdict}",
            *(f"- {problem}" for problem in self.problems),
            *(f"    {verdict}" for verdict in self.verdicts),
            _table(("fault", "times", "recovery p50, s", "recovery max, s"), self._faults()),
            RECOVERY,
            _table(("fault inside the sites", "times"), sorted(self.in_sites.items())),
            _table(("", "count"), self._updates()),
        ]
        return "\n\n".join(parts) + "\n"

    def _faults(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for kind in Kind:
            of_kind = [one.seconds for one in self.recovered if one.done.fault.kind is kind]
            times = [seconds for seconds in of_kind if seconds is not None]
            median, worst = (statistics.median(times), max(times)) if times else (None, None)
            rows.append((kind.value, len(of_kind), _seconds(median), _seconds(worst)))
        rows.append(("all", len(self.recovered), "", ""))
        rows.append(("planned, but there was nothing to hit", len(self.missed), "", ""))
        return rows

    def _updates(self) -> list[tuple[object, ...]]:
        ledger = self.ledger
        unique, merged = len(set(self.confirmed)), len(ledger.merged)
        reasons = Counter(refusal.reason for refusal in ledger.refused)
        dead = ledger.dead.ids - ledger.names().keys()
        away_s = sum(r.done.ended - r.done.began for r in self.recovered if r.done.fault.kind in OUTAGES)
        return [
            ("seconds without broker or store", round(away_s)),
            ("updates with a confirmed publish", unique),
            ("publishes confirmed again for the same update", len(self.confirmed) - unique),
            ("merged", merged),
            *((f"rejected: {reason}", count) for reason, count in sorted(reasons.items())),
            ("dead letters: updates that ended there", len(dead)),
            ("dead letters: copies of updates that the log names", len(ledger.dead.ids) - len(dead)),
            ("dead letters: other tasks", ledger.dead.others),
            ("duplicates that a worker recognised", self.duplicates),
            ("publishes dropped because another worker was first", self.dropped_publishes),
            ("log records", len(ledger.times)),
            ("model versions stored, per merged update", f"{ledger.published / max(1, merged):.3f}"),
            ("model files written, per merged update", f"{ledger.models / max(1, merged):.3f}"),
            *((f"{name} ended by itself", count) for name, count in sorted(self.own_ends.items())),
        ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
