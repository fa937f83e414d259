"""Every error of fedqueue, in three families that say what the catcher must do.

    FedqueueError
    ├── Transient              try again later, with backoff; nothing was decided
    │   ├── StoreUnavailable       the object store did not answer, or answered "not now"
    │   ├── BrokerUnavailable      the broker did not confirm
    │   └── Conflict               somebody else appended first: read the head again and decide again
    ├── Rejected               the input is wrong for good: record the reason, tell the sender, never retry
    │   ├── BadMessage             a message that is not what docs/protocol.md says
    │   ├── BadPayload             a tensor file that is not what its update or its job declares
    │   ├── BadJob                 a job description with mistakes
    │   └── BadDataset             annotations or images that training could not use
    └── Fatal                  this process cannot do its work: stop loudly
        ├── BadSettings            a setting is missing or out of range
        ├── UnsafeStore            the store does not honour put-if-absent, so exactly-once would be a lie
        ├── AccessDenied           the credentials do not allow what this process has to do
        └── CorruptLog             the stored log contradicts itself
    NotFound                   an object is not there; a fact that the caller decides about

A duplicate or a stale update is an outcome (`aggregator.decide`), not an error.

Every error survives pickling, because Celery moves them between processes: all constructor arguments go
to `Exception.__init__`, and a class adds no others.
"""

from __future__ import annotations


class FedqueueError(Exception):
    """Base of all errors that this project raises on purpose."""


class NotFound(FedqueueError):
    """The object does not exist."""


class Transient(FedqueueError):
    """Try again later: nothing was decided and nothing was lost."""


class StoreUnavailable(Transient):
    """The object store did not answer in time; check its URL and its health."""


class BrokerUnavailable(Transient):
    """The broker did not confirm the message; check its URL and its health."""


class Conflict(Transient):
    """Another writer appended to the log first; read the head and decide again."""


class Rejected(FedqueueError):
    """The input is wrong and stays wrong. `reason` is a short stable word, `str(error)` says what to do."""

    reason: str = "rejected"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message, reason)
        self.reason = reason or type(self).reason

    def __str__(self) -> str:
        return str(self.args[0])


class BadMessage(Rejected):
    """The message is not what docs/protocol.md describes."""

    reason = "malformed-message"


class BadPayload(Rejected):
    """The tensor file is not what its update or its job declares."""

    reason = "bad-payload"


class BadJob(Rejected):
    """The job description has mistakes."""

    reason = "bad-job"


class BadDataset(Rejected):
    """The data set has defects; each is listed with its file and annotation."""

    reason = "bad-dataset"


class Fatal(FedqueueError):
    """This process cannot do its work."""


class BadSettings(Fatal):
    """A setting is missing or out of range."""


class UnsafeStore(Fatal):
    """The object store does not honour `If-None-Match: *`; docs/operations.md lists stores that do."""


class AccessDenied(Fatal):
    """The credentials do not allow this; check the site's permissions."""


class CorruptLog(Fatal):
    """The stored log contradicts itself; run `fedqueue job history` and compare with docs/protocol.md."""
