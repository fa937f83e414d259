"""Appending to a job's log what is no update: decide on the newest head, append, and on a conflict decide again."""

from __future__ import annotations

from collections.abc import Callable

from federation.errors import Conflict
from federation.types import Event, Head, LogRecord
from tasks.context import Context

Decide = Callable[[LogRecord], tuple[Event, Head] | None]
"""What to append to the newest record; None: nothing. May raise Rejected."""


def append(context: Context, job_id: str, decide: Decide) -> LogRecord | None:
    """Returns the record that was appended, or None if there was nothing to append. Raises NotFound, Transient."""
    versions = context.log(job_id)
    while True:
        newest = versions.head()
        decided = decide(newest)
        if decided is None:
            return None
        try:
            return versions.append(newest, *decided)
        except Conflict:
            continue
