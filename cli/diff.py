"""`fedqueue model diff`: what lies between two versions: figures, contributors, tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from aggregator.change import Change, by_group, changes
from aggregator.lineage import lineage
from cli.options import JobArgument, StoreUrl, chosen_store, console, fail
from cli.versions import Made, number_of, stored_versions
from federation.errors import FedqueueError, NotFound
from federation.types import SERVER, Contribution, Evaluation
from storage.channels import CHANNELS
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog
from storage.models import load_model

First = Annotated[
    str, typer.Argument(envvar="FEDQUEUE_CLI_FIRST", help=f"{', '.join(CHANNELS)}, or a number")
]
Second = Annotated[str, typer.Argument(envvar="FEDQUEUE_CLI_SECOND", help="likewise")]


def diff(
    job: JobArgument,
    first: First,
    second: Second,
    depth: Annotated[
        int,
        typer.Option(envvar="FEDQUEUE_CLI_DEPTH", min=1, help="words of a layer's name that make its group"),
    ] = 2,
    top: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_TOP", min=0, help="tensors to show that changed most")
    ] = 5,
    store_url: StoreUrl = None,
) -> None:
    """Two versions: what was measured of both, whose updates lie between them, and how far their tensors are apart.

    Example: fedqueue model diff street stable latest
    """
    store = chosen_store(store_url)
    try:
        with console.status("reading the log and both models"):
            spec = load_job(store, job).spec
            a, b = (number_of(store, job, wanted) for wanted in (first, second))
            records = list(VersionLog(store, job).history())
            made = stored_versions(records)
            evaluations = list_evaluations(store, job)
            lines = [lineage(records, number).line for number in (a, b)]
            arrays = [load_model(store, made[number].stored.model).arrays() for number in (a, b)]
    except NotFound as exc:
        fail(
            f"{exc}: `fedqueue model list {job}` shows the versions; of one that retention has removed, "
            f"`fedqueue replay {job} --to VERSION --out FILE` makes the file again"
        )
    except FedqueueError as exc:
        fail(exc)
    console.print(f"[bold]{job}[/]  version {a} and version {b}", highlight=False)
    _print_measured(evaluations, a, b, spec.evaluation.metric)
    _print_contributors(made, lines[0], lines[1], a, b)
    _print_change(changes(*arrays), depth, top, a, b)


def _print_measured(evaluations: Iterable[Evaluation], a: int, b: int, metric: str) -> None:
    by = {(e.version, e.who): e for e in evaluations}
    who = sorted({name for version, name in by if version in (a, b)}, key=lambda name: (name != SERVER, name))
    if not who:
        console.print("nobody has measured either of them")
        return
    table = Table("who", "measure", str(a), str(b), "change", box=None)
    for name in who:
        old, new = by.get((a, name)), by.get((b, name))
        for measure in dict.fromkeys(m for e in (old, new) if e for m in e.metrics):
            values = [e.metrics.get(measure) if e else None for e in (old, new)]
            table.add_row(name, escape(measure), *_cells(*values))
        tables = [e.per_class.get(metric, {}) if e else {} for e in (old, new)]
        for label in dict.fromkeys(label for per_class in tables for label in per_class):
            values = [per_class.get(label) for per_class in tables]
            table.add_row(name, escape(f"  {metric} of {label}"), *_cells(*values))
    console.print(table)


def _cells(old: float | None, new: float | None) -> list[str]:
    shown = ["" if value is None else f"{value:.3f}" for value in (old, new)]
    return [*shown, "" if old is None or new is None else f"{new - old:+.3f}"]


def _print_contributors(
    made: dict[int, Made], first: tuple[int, ...], second: tuple[int, ...], a: int, b: int
) -> None:
    """What is in one of them and not in the other, since the last version that both come from."""
    common = max(set(first) & set(second))
    sides = [(number, _merged(made, line, common)) for number, line in ((a, first), (b, second))]
    if common not in (a, b):
        console.print(f"both come from version {common}", highlight=False)
    for number, merged in sides:
        if not merged:
            continue
        console.print()
        console.print(f"in version {number} alone: {len(merged)} updates", highlight=False)
        table = Table("site", "updates", "sum of weights", box=None)
        updates = Counter(c.update.site for c in merged)
        for site in sorted(updates):
            weight = sum(c.weight for c in merged if c.update.site == site)
            table.add_row(escape(site), str(updates[site]), f"{weight:.2f}")
        console.print(table)


def _merged(made: dict[int, Made], line: tuple[int, ...], since: int) -> list[Contribution]:
    after = line[line.index(since) + 1 :]
    return [contribution for number in after for contribution in made[number].merged]


def _print_change(found: list[Change], depth: int, top: int, a: int, b: int) -> None:
    console.print()
    if not any(change.moved for change in found):
        console.print("the tensors are the same")
        return
    table = Table("layers", "numbers", f"change, % of version {a}", box=None)
    for group in by_group(found, depth):
        table.add_row(escape(group.name), str(group.count), _percent(group))
    console.print(table)
    most = sorted(found, key=lambda change: -change.relative)[:top]
    if most:
        table = Table("changed most", "numbers", f"change, % of version {a}", box=None)
        for change in most:
            table.add_row(escape(change.name), str(change.count), _percent(change))
        console.print()
        console.print(table)


def _percent(change: Change) -> str:
    return "from 0" if not change.before and change.moved else f"{100 * change.relative:.3g}"
