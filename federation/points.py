"""Where a process may die: the steps between which kill -9 must cost nothing, named in one place.

The code calls `reach(Point.X)` right after the step that X names. In production that does nothing. The crash
test (tests/integration/test_crash_points.py) installs a hook that kills the process there, restarts it and audits
the job; it takes its cases from this enumeration, and tests/unit/test_points.py requires each point to be reached
in the code.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Point(StrEnum):
    """A step that is done, when the next one is not."""

    # a site
    TRAINED = "trained, nothing on disk"
    OUTBOX_PAYLOAD = "the outbox has the payload, not the entry"
    OUTBOX_PUT = "the outbox has the update, nothing is uploaded"
    UPLOADED = "the payload is in the store, nothing is published"
    CONFIRMED = "the broker has the message, the outbox does not know"
    OUTBOX_MOVED = "the entry is among the sent ones, its payload still lies there"
    # ingress
    TASK_SENT = "the task is sent, the site's message is not acknowledged"
    LETTER_SENT = "the dead letter is sent, the message that it is about is not acknowledged"
    LETTER_PASSED = "the task that keeps a dead letter is sent, the letter is not acknowledged"
    # a worker: one update
    ACCEPTED = "the update is in the log, no publish is asked for"
    PUBLISH_ASKED = "a publish is asked for, the update's message is not acknowledged"
    REFUSED = "the refusal is in the log, but not under rejected/, and the site is not told"
    # a worker: one version
    FOLDED = "the payloads are folded, the model is not stored"
    MODEL_STORED = "the model is stored, no record names it"
    PUBLISHED = "the version is in the log, nobody is told"
    TOLD = "the sites are told, the publish's message is not acknowledged"
    # a worker: the rest
    REPORT_KEPT = "a site's report is stored, its message is not acknowledged"
    MODELS_COPIED = "the models of a new job are copied, job.json is not written"
    JOB_WRITTEN = "job.json is written, the log has not begun"
    ANSWERED = "the answer to a request is stored, its message is not acknowledged, uploads still lie there"
    LETTER_KEPT = "the dead letter is stored, its message is not acknowledged"
    COLLECTED = "the log says what retention removes, nothing is deleted"
    DELETED = "the first of these objects is deleted, the others are not"
    # an operator
    REQUEUE_BEGAN = "the letter says that its requeue began, nothing is sent"
    REQUEUE_SENT = "the letter's message is sent again, the letter still waits"
    # the local folder as object store
    FILE_WRITTEN = "an object's bytes are on disk, without its name"
    FILE_NAMED = "an object has its name, which is not yet durable"


def _nothing(point: Point) -> None:
    pass


_hook: Callable[[Point], None] = _nothing


def reach(point: Point) -> None:
    """The step that `point` names is done."""
    _hook(point)


def watch(hook: Callable[[Point], None] | None) -> None:
    """Call `hook` at every point of this process from now on, in the thread that reaches it; None: no more."""
    global _hook
    _hook = hook or _nothing
