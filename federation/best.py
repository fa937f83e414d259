"""Which version of a job is its best, from what was measured of its versions; and how versions compare at all.

1. Where the server has measured, its figures alone count: the highest value wins, of equal ones the newest version.
2. Otherwise the sites' do. Each has other images, so figures of different sites are never compared. The versions are
   taken in order, and one replaces the best so far if its mean over the sites that measured both is at least as
   high, weighted by their numbers of images. Both have to be measured well enough in common: by sites with half of
   the images of all that measured either, or a version that is good for one site alone would win.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from federation.types import SERVER, Evaluation


@dataclass(frozen=True)
class Best:
    """The best version of a job by `metric`. `value` is what `who` measured: the mean, if it is several sites."""

    version: int
    metric: str
    value: float
    who: tuple[str, ...]


class Course:
    """What was measured of a job's versions by one metric, in the order of the versions, whoever came first."""

    def __init__(self, evaluations: Iterable[Evaluation], metric: str) -> None:
        """`evaluations` are of one job."""
        self.metric = metric
        measured = [e for e in evaluations if metric in e.metrics and e.num_images]
        central = [e for e in measured if e.who == SERVER]
        self._by_version: dict[int, dict[str, Evaluation]] = {}
        for evaluation in sorted(central or measured, key=lambda e: e.version):
            self._by_version.setdefault(evaluation.version, {})[evaluation.who] = evaluation
        self._newest = max(self._by_version, default=-1)
        self._newest_of = {who: e for sites in self._by_version.values() for who, e in sites.items()}

    @property
    def versions(self) -> tuple[int, ...]:
        """Those that were measured, ascending."""
        return tuple(self._by_version)

    def who(self, version: int) -> tuple[str, ...]:
        """Who measured `version`."""
        return tuple(sorted(self._by_version[version]))

    def value(self, version: int) -> float:
        """What `who` measured: the mean, if it is several sites."""
        sites = self._by_version[version]
        return _mean(sites, sites, self.metric)

    def gain(self, version: int, over: int) -> float | None:
        """By how much `version` is better than version `over`; None if they cannot be compared."""
        new, old = self._by_version[version], self._by_version[over]
        either = {**old, **new}  # by the newer numbers of images
        both = {site: e for site, e in either.items() if site in old and site in new}
        if 2 * _images(both) < _images(either):
            return None
        return _mean(new, both, self.metric) - _mean(old, both, self.metric)

    def is_settled(self, version: int) -> bool:
        """True if no report is to be waited for: all that ever measured have, or most of them and time has gone on."""
        here = self._by_version[version]
        if here.keys() == self._newest_of.keys():
            return True
        return version != self._newest and 2 * _images(here) >= _images(self._newest_of)

    def best(self) -> int | None:
        """None if nothing was measured."""
        champion: int | None = None
        for version in self.versions:
            if champion is None or ((gain := self.gain(version, champion)) is not None and gain >= 0):
                champion = version
        return champion


def best_of(evaluations: Iterable[Evaluation], metric: str) -> Best | None:
    """None if nobody has measured `metric`. `evaluations` are of one job."""
    course = Course(evaluations, metric)
    version = course.best()
    if version is None:
        return None
    return Best(version, metric, course.value(version), course.who(version))


def _images(sites: Mapping[str, Evaluation]) -> int:
    return sum(e.num_images for e in sites.values())


def _mean(values: Mapping[str, Evaluation], weights: Mapping[str, Evaluation], metric: str) -> float:
    """Over the sites of `weights`, by their numbers of images."""
    return sum(values[site].metrics[metric] * e.num_images for site, e in weights.items()) / _images(weights)
