"""Which version is meant by a name: the channels `latest`, `best`, `stable`, or a number.

    latest    the newest version that is offered: never one in quarantine
    best      the best by what was measured (federation/best.py), without versions in quarantine or rolled back
    stable    the one that was promoted last; it stays until another one is
    41        that version, whatever was said of it since

Everything that takes a version takes these names, and asks here.
"""

from __future__ import annotations

from dataclasses import dataclass

from federation.best import Best, best_of
from federation.errors import NotFound
from federation.types import Head, ModelVersion
from storage.blob import BlobStore
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog

LATEST, BEST, STABLE = CHANNELS = ("latest", "best", "stable")


@dataclass(frozen=True)
class Resolved:
    """A version, and in words why it is the one, or what speaks against it; often nothing.

    `withdrawn`: rolled back or in quarantine, which only `stable` and numbers can be.
    """

    current: ModelVersion
    reason: str = ""
    withdrawn: str | None = None


def check_wanted(text: str) -> str:
    """A version as it may be asked for: a channel or a number. Raises ValueError."""
    text = text.strip().lower()
    if text in CHANNELS:
        return text
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"a version is {', '.join(CHANNELS)} or a number, not {text!r}")
    return str(int(text))


def resolve(store: BlobStore, job_id: str, wanted: str) -> Resolved:
    """The version that `wanted` (check_wanted) means now. A site's account may ask this.

    Raises NotFound if there is none, with what to do; CorruptLog, StoreUnavailable.
    """
    log = VersionLog(store, job_id)
    head = log.head().head
    if wanted == LATEST:
        if head.quarantine is None:
            return Resolved(head.offered)
        return Resolved(head.offered, f"version {head.quarantine.version} and later are in quarantine")
    if wanted == STABLE:
        if head.stable is None:
            raise NotFound(
                f"no version of {job_id} is stable yet: `fedqueue model promote {job_id} VERSION` makes one so"
            )
        return _as_it_is(head, head.stable)
    if wanted == BEST:
        best = best_version(store, job_id, head)
        if best is None:
            raise NotFound(
                f"no version of {job_id} was measured yet, so none is the best: take the latest, or a number from "
                f"`fedqueue model list {job_id}`"
            )
        return Resolved(log.version(best.version), f"{best.metric} {best.value:.3f} by {', '.join(best.who)}")
    return _as_it_is(head, log.version(int(wanted)))


def _as_it_is(head: Head, version: ModelVersion) -> Resolved:
    withdrawn = head.withdrawn(version.version)
    return Resolved(version, withdrawn or "", withdrawn)


def best_version(store: BlobStore, job_id: str, head: Head | None = None) -> Best | None:
    """The best version by the job's `evaluation.metric`; None if nobody has measured that yet.

    head: the job's newest, if it is known. The version's model stays in the store, as that of every measured version
    does. Takes a request per measurement. Raises NotFound if there is no such job.
    """
    metric = load_job(store, job_id).spec.evaluation.metric
    head = head or VersionLog(store, job_id).head().head
    return best_of((e for e in list_evaluations(store, job_id) if not head.withdrawn(e.version)), metric)
