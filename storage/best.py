"""Which version of a job is its best, from what was measured of its versions.

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


def best_of(evaluations: Iterable[Evaluation], metric: str) -> Best | None:
    """None if nobody has measured `metric`. `evaluations` are of one job."""
    measured = [e for e in evaluations if metric in e.metrics and e.num_images]
    central = [e for e in measured if e.who == SERVER]
    if central:
        best = max(central, key=lambda e: (e.metrics[metric], e.version))
        return Best(best.version, metric, best.metrics[metric], (SERVER,))
    versions: dict[int, dict[str, Evaluation]] = {}
    for evaluation in measured:
        versions.setdefault(evaluation.version, {})[evaluation.who] = evaluation
    champion: int | None = None
    for version in sorted(versions):
        if champion is None or _replaces(versions[version], versions[champion], metric):
            champion = version
    if champion is None:
        return None
    sites = versions[champion]
    return Best(champion, metric, _mean(sites, sites, metric), tuple(sorted(sites)))


def _replaces(new: Mapping[str, Evaluation], old: Mapping[str, Evaluation], metric: str) -> bool:
    either = {**old, **new}  # by the newer numbers of images
    both = {site: e for site, e in either.items() if site in old and site in new}
    if 2 * _images(both) < _images(either):
        return False
    return _mean(new, both, metric) >= _mean(old, both, metric)


def _images(sites: Mapping[str, Evaluation]) -> int:
    return sum(e.num_images for e in sites.values())


def _mean(values: Mapping[str, Evaluation], weights: Mapping[str, Evaluation], metric: str) -> float:
    """Over the sites of `weights`, by their numbers of images."""
    return sum(values[site].metrics[metric] * e.num_images for site, e in weights.items()) / _images(weights)
