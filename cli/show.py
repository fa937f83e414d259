"""`fedqueue model show`: everything that is known of one version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from aggregator.lineage import Lineage, lineage
from cli.figures import Figures, means
from cli.options import JobArgument, StoreUrl, chosen_store, console, fail, printable
from cli.versions import Made, Wanted, number_of, stored_versions
from federation.errors import FedqueueError, NotFound
from federation.types import Cleared, LogRecord, Promoted, Quarantined, RolledBack
from storage.blob import BlobStore
from storage.channels import LATEST
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog


def show(job: JobArgument, version: Wanted = LATEST, store_url: StoreUrl = None) -> None:
    """One version: of which updates it was made and when, its digest, what was measured, and whose work is in it.

    Example: fedqueue model show street best
    """
    store = chosen_store(store_url)
    try:
        with console.status("reading the log"):
            spec = load_job(store, job).spec
            number = number_of(store, job, version)
            records = list(VersionLog(store, job).history())
            evaluations = list_evaluations(store, job)
            made = stored_versions(records)
            is_kept = _is_kept(store, made[number])
    except (FedqueueError, NotFound) as exc:
        fail(exc)
    figures = Figures.of(spec, records[-1].head, evaluations)
    marks = figures.mark(number)
    console.print(f"[bold]{job}[/]  version {number}{f'  ({marks})' if marks else ''}", highlight=False)
    for line in _facts(made, number, is_kept):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in _decisions(records, number):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _print_updates(made[number])
    found = [e for e in evaluations if e.version == number]
    if found:
        console.print()
        console.print(means(found))
    _print_lineage(lineage(records, number))


def _is_kept(store: BlobStore, made: Made) -> bool:
    try:
        store.size(made.stored.model.key)
    except NotFound:
        return False
    return True


def _facts(made: dict[int, Made], number: int, is_kept: bool) -> Iterator[str]:
    this = made[number]
    event, stored = this.record.event, this.stored
    yield f"made      {this.record.at:%Y-%m-%d %H:%M:%S} UTC, log record {this.record.seq}"
    if isinstance(event, RolledBack):
        why = f": {printable(event.reason)}" if event.reason else ""
        yield f"from      version {event.to}, by a rollback of {event.by}{why}"
    elif this.parent is not None:
        yield f"from      version {this.parent}; updates merged: {len(this.merged)}"
    yield f"model     {stored.model.key}"
    yield f"sha256    {stored.model.sha256}, {stored.model.nbytes} bytes"
    if not is_kept:
        yield "          is not kept any more; `fedqueue replay` makes it again"
    if stored.server_state is not None:
        yield f"optimiser {stored.server_state.sha256}, {stored.server_state.nbytes} bytes"
    same = [str(n) for n, other in made.items() if other.stored.model == stored.model and n != number]
    if same:
        yield f"the same  model is that of version {', '.join(same)}"


def _decisions(records: Sequence[LogRecord], number: int) -> Iterator[str]:
    """What was decided about the version since it was made."""
    for record in records:
        when = f"{record.at:%Y-%m-%d %H:%M:%S} UTC"
        match record.event:
            case Promoted(version=version, by=by) if version == number:
                yield f"promoted  {when} by {by}"
            case Quarantined(version=version, reason=reason) if version == number:
                yield f"failed    {when}: {reason}"
            case Cleared(version=version, by=by) if version == number:
                yield f"cleared   {when} by {by}"
            case RolledBack(to=to, by=by) if to < number < record.head.version:
                yield f"abandoned {when} by a rollback of {by} to version {to}"


def _print_updates(made: Made) -> None:
    if not made.merged:
        return
    table = Table("update", "site", "base", "staleness", "weight", "images", box=None)
    for c in made.merged:
        u = c.update
        table.add_row(
            u.update_id,
            u.site,
            str(u.base_version),
            str(c.staleness),
            f"{c.weight:.4f}",
            str(u.num_examples),
        )
    console.print()
    console.print(table)


def _print_lineage(found: Lineage) -> None:
    if not found.parts:
        return
    spans = ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in found.spans)
    console.print()
    console.print(f"lineage: versions {spans}; {found.updates} updates are in it", highlight=False)
    table = Table("site", "updates", "share", "images", box=None)
    for site, part in found.parts.items():
        table.add_row(escape(site), str(part.updates), f"{part.share:.1%}", str(part.images))
    console.print(table)
