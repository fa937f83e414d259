"""What was measured of a job's versions: `fedqueue model metrics`, and columns of `model list` and `job status`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cli.options import JobArgument, StoreUrl, chosen_store, console, fail
from federation.best import Best, best_of
from federation.errors import FedqueueError, NotFound
from federation.jobs import JobSpec
from federation.types import SERVER, Evaluation, Head
from storage.channels import BEST, LATEST, STABLE, best_version
from storage.jobs import list_evaluations, list_jobs, load_job

MAX_COLUMNS = 3
"""Sites side by side; of more, the mean over their images."""


@dataclass(frozen=True)
class Figures:
    """A job's measurements of one metric: version -> who -> Evaluation."""

    metric: str
    head: Head
    best: Best | None
    measured: dict[int, dict[str, Evaluation]]

    @classmethod
    def of(cls, spec: JobSpec, head: Head, evaluations: Iterable[Evaluation]) -> Figures:
        """`head`: the job's newest."""
        metric = spec.evaluation.metric
        measured: dict[int, dict[str, Evaluation]] = {}
        for evaluation in evaluations:
            if metric in evaluation.metrics:
                measured.setdefault(evaluation.version, {})[evaluation.who] = evaluation
        good = [e for by in measured.values() for e in by.values() if not head.withdrawn(e.version)]
        return cls(metric, head, best_of(good, metric), measured)

    @property
    def who(self) -> list[str]:
        """Everybody who measured anything, the server first."""
        everybody = {name for by in self.measured.values() for name in by}
        return sorted(everybody, key=lambda name: (name != SERVER, name))

    @property
    def _columns(self) -> list[tuple[str, list[str]]]:
        sites = [name for name in self.who if name != SERVER]
        columns = [(SERVER, [SERVER])] if SERVER in self.who else []
        if len(sites) > MAX_COLUMNS:
            return [*columns, ("mean of sites", sites)]
        return [*columns, *((name, [name]) for name in sites)]

    def headings(self) -> list[str]:
        """Of table columns, as markup: brackets in a name are no style."""
        return [
            escape(f"{self.metric}, {name}") if i == 0 else name for i, (name, _) in enumerate(self._columns)
        ]

    def row(self, version: int) -> list[str]:
        """One cell per heading."""
        return [_mean(self.measured.get(version, {}), names, self.metric) for _, names in self._columns]

    def mark(self, version: int) -> str:
        """What a version is: the channels that lead to it, and why none should."""
        marks = {
            BEST: self.best is not None and self.best.version == version,
            LATEST: self.head.offered.version == version,
            STABLE: self.head.stable is not None and self.head.stable.version == version,
        }
        withdrawn = self.head.withdrawn(version)
        return ", ".join([*(mark for mark, is_so in marks.items() if is_so), *filter(None, [withdrawn])])


def _mean(by: dict[str, Evaluation], names: list[str], metric: str) -> str:
    found = [by[name] for name in names if name in by]
    images = sum(e.num_images for e in found)
    if not images:
        return ""
    mean = f"{sum(e.metrics[metric] * e.num_images for e in found) / images:.3f}"
    return mean if len(names) == 1 else f"{mean} of {len(found)}"


def metrics(
    job: JobArgument,
    version: Annotated[
        int | None,
        typer.Option(
            "--version",
            envvar="FEDQUEUE_CLI_VERSION",
            help="version number; none: the newest that was measured",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_METRIC", help="measure to show class by class; none: the job's own"
        ),
    ] = None,
    store_url: StoreUrl = None,
) -> None:
    """What the server and each site measured of a version: the means, and class by class.

    Example: fedqueue model metrics street --version 40 --metric "VOC2010 mAP@0.5"
    """
    store = chosen_store(store_url)
    try:
        spec = load_job(store, job).spec
        evaluations = list_evaluations(store, job)
        best = best_version(store, job)
    except NotFound:
        fail(f"there is no job {job!r}; there are: {', '.join(list_jobs(store)) or 'none'}")
    except FedqueueError as exc:
        fail(exc)
    versions = sorted({e.version for e in evaluations})
    if not versions:
        fail(f"nobody has measured a version of {job!r}: see evaluation.every and sites_every (docs/jobs.md)")
    shown = versions[-1] if version is None else version
    found = sorted((e for e in evaluations if e.version == shown), key=lambda e: (e.who != SERVER, e.who))
    if not found:
        measured = ", ".join(map(str, versions))
        fail(f"nobody has measured version {shown}; measured are: {measured}")
    metric = metric or spec.evaluation.metric
    known = sorted({name for e in found for name in (*e.metrics, *e.per_class)})
    if metric not in known:
        fail(f"nobody has measured {metric!r} of version {shown}; measured are: {', '.join(known)}")
    console.print(f"[bold]{job}[/]  version {shown}", highlight=False)
    if best is not None:
        by = "the server" if best.who == (SERVER,) else f"the mean of {', '.join(best.who)}"
        line = f"the best is version {best.version}: {best.metric} {best.value:.3f}, by {by}"
        console.print(line, markup=False)
    console.print(means(found))
    if any(metric in e.per_class for e in found):
        console.print()
        console.print(_by_class(spec, found, metric))


def means(found: list[Evaluation]) -> Table:
    """Who measured what of one version."""
    names = list(dict.fromkeys(name for e in found for name in e.metrics))
    table = Table("who", "images", *map(escape, names), "measured (UTC)", box=None)
    for e in found:
        values = [f"{e.metrics[name]:.3f}" if name in e.metrics else "" for name in names]
        table.add_row(e.who, str(e.num_images), *values, f"{e.at:%Y-%m-%d %H:%M:%S}")
    return table


def _by_class(spec: JobSpec, found: list[Evaluation], metric: str) -> Table:
    tables = {e.who: e.per_class[metric] for e in found if metric in e.per_class}
    table = Table(escape(f"{metric} of class"), *tables, box=None)
    for name in spec.classes:
        cells = [f"{values[name]:.3f}" if name in values else "" for values in tables.values()]
        if any(cells):
            table.add_row(escape(name), *cells)
    return table
