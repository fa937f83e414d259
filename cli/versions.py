"""What the log says of a job's versions, and how it is printed: for `fedqueue model list`, `show` and `diff`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import typer

from cli.options import fail
from federation.types import Contribution, Event, LogRecord, ModelVersion, Published, RolledBack
from storage.blob import BlobStore
from storage.channels import CHANNELS, check_wanted, resolve

Wanted = Annotated[
    str, typer.Argument(envvar="FEDQUEUE_CLI_VERSION", help=f"{', '.join(CHANNELS)}, or a number")
]


@dataclass(frozen=True)
class Made:
    """A stored version: the record that made it, and the version that it was made from; None of version 0."""

    record: LogRecord
    parent: int | None

    @property
    def stored(self) -> ModelVersion:
        return self.record.head.current

    @property
    def merged(self) -> tuple[Contribution, ...]:
        event = self.record.event
        return event.merged if isinstance(event, Published) else ()

    @property
    def how(self) -> str:
        """Of how many updates, or which version it is again."""
        event = self.record.event
        return f"= version {event.to}" if isinstance(event, RolledBack) else str(len(self.merged))


def stored_versions(records: Iterable[LogRecord]) -> dict[int, Made]:
    """Every version of the log, in order."""
    found: dict[int, Made] = {}
    newest: int | None = None
    for record in records:
        version = record.head.version
        if version != newest:
            found[version] = Made(record, _parent(record.event, newest))
            newest = version
    return found


def _parent(event: Event, newest: int | None) -> int | None:
    return event.to if isinstance(event, RolledBack) else newest


def number_of(store: BlobStore, job: str, wanted: str) -> int:
    """The version that a channel or a number means. Exits if that is no version; raises NotFound."""
    try:
        checked = check_wanted(wanted)
    except ValueError as exc:
        fail(str(exc))
    return resolve(store, job, checked).current.version
