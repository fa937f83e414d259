"""What the server may be told of a failure: its kind, and words that quote nothing of the site's own."""

from __future__ import annotations

from federation.errors import Rejected

PUBLIC = {"bad-job", "diverged", "negative-variance", "not-finite", "out-of-memory", "policy"}
"""Failures whose words are about settings and tensors. Those of all others may name files or quote data: they go no
further than the site's own log."""
INSTEAD = {
    "bad-dataset": "images cannot be read; the site's log names them",
    "trainer-failed": "the site's own trainer raised an error; the site's log says which",
}
ELSE = "the site's log says why"
MAX_WORDS = 200


def kind_of(exc: Rejected | MemoryError) -> str:
    """A short stable word."""
    return exc.reason if isinstance(exc, Rejected) else "out-of-memory"


def words_of(exc: Rejected | MemoryError) -> str:
    """For the site's own log."""
    return str(exc) or "the memory of this machine is not enough"


def public(exc: Rejected | MemoryError) -> str:
    """`kind: words`, for everybody, of an attempt at training that failed."""
    kind = kind_of(exc)
    words = words_of(exc) if kind in PUBLIC else INSTEAD.get(kind, ELSE)
    return f"{kind}: {words}"[:MAX_WORDS]


def public_refusal(exc: Rejected) -> str:
    """The same of a job that a site cannot take part in."""
    kind = kind_of(exc)
    return f"{kind}: {words_of(exc) if kind in PUBLIC else ELSE}"[:MAX_WORDS]
