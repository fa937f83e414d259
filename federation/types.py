"""What sites send and what the log says, as frozen values. The nouns of docs/architecture.md.

    LogRecord ─ Event, Head after it
    Event ─ of updates (Accepted | Refused | Published), of the job (Created | Held | Resumed | Closed), of its versions
            (Promoted | Quarantined | Cleared | RolledBack), of its objects (Collected)
    Head ─ version, ModelRef, pending Contributions, remembered ids, and what holds the job or a version back
    Contribution ─ ClientUpdate with the staleness and the weight that it was given

Every type is a `Value`: checked when made, immutable, `to_json` / `from_json`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, field_validator, model_validator

from federation.base import Value
from federation.ids import Name, Sha256, UpdateId
from federation.jobs import MAX_VERSION, ClassName, MetricName, ModelRef, PayloadKind
from federation.keys import update_key

SERVER = "server"
"""Who measures a version, if it is no site. Therefore no name for a site."""
MAP = "mAP@[.5:.95]"
AP = "AP@"
MAX_METRICS = 32
MAX_COLLECTED = 1000
"""Keys in one record; more take several records."""
MAX_EXAMPLES = 10**12
Metrics = Annotated[dict[MetricName, float], Field(max_length=MAX_METRICS)]


# --- what a site sends ---------------------------------------------------------------------------------


class Transfer(Value):
    """What a site's work moved, and what it did not."""

    downloaded_bytes: int = Field(
        ge=0, le=2**60, description="models and log records read since the site's last update of this job"
    )
    image_bytes: int = Field(
        ge=0,
        le=2**60,
        description="size of the image files behind the update, which stayed where they are; 0: not told",
    )


class ClientUpdate(Value):
    """A site's finished local training. The tensors lie at `payload_key`; only this is sent."""

    schema_version: Literal[1] = 1
    update_id: UpdateId
    job: Name
    site: Name
    base_version: int = Field(ge=0, le=MAX_VERSION, description="version that training started from")
    num_examples: int = Field(ge=1, le=MAX_EXAMPLES, description="training images behind the update")
    payload_kind: PayloadKind
    payload_key: str = Field(max_length=256)
    payload_sha256: Sha256
    payload_bytes: int = Field(ge=1, le=2**40)
    metrics: Metrics = Field(default_factory=dict)
    transfer: Transfer | None = None
    created_at: AwareDatetime

    @model_validator(mode="after")
    def _check(self) -> Self:
        expected = update_key(self.job, self.site, self.update_id)
        if self.payload_key != expected:
            raise ValueError(f"payload_key must be {expected}")
        return self


class Gpu(Value):
    """The graphics processor that a site computes on. Figures of the whole device, other programs included."""

    name: str = Field(max_length=64)
    memory_used_bytes: int = Field(ge=0, le=2**60)
    memory_total_bytes: int = Field(ge=1, le=2**60)


class Machine(Value):
    """How busy a site's computer is. What its system does not tell is None."""

    load: float | None = Field(default=None, ge=0, le=1e6, description="load average over one minute")
    cores: int | None = Field(default=None, ge=1, le=2**20, description="CPU cores of the computer")
    cpu: float | None = Field(
        default=None, ge=0, le=1, description="share of all CPU time in use since the last heartbeat"
    )
    memory_used_bytes: int | None = Field(default=None, ge=0, le=2**60)
    memory_total_bytes: int | None = Field(default=None, ge=1, le=2**60)
    gpu: Gpu | None = None

    @property
    def load_per_core(self) -> float | None:
        """Above 1 there is more to do than the cores can."""
        return None if self.load is None or self.cores is None else self.load / self.cores


class SiteStatus(Value):
    """One heartbeat. Disposable: it feeds the view of sites, and whom to invite is chosen by it; what counts is not."""

    schema_version: Literal[1] = 1
    site: Name
    state: Literal["idle", "pulling", "training", "uploading", "evaluating", "waiting", "stopped"]
    job: Name | None = None
    base_version: int | None = Field(default=None, ge=0, le=MAX_VERSION)
    step: int = Field(default=0, ge=0)
    steps: int = Field(default=0, ge=0)
    epoch: float = Field(
        default=0.0, ge=0, description="passes over the local images since the agent started"
    )
    outbox: int = Field(default=0, ge=0, description="updates finished but not confirmed by the broker")
    updates: int = Field(default=0, ge=0, description="updates confirmed since the agent started")
    detail: str = Field(default="", max_length=200, description="what it waits for, in words")
    dropped: int = Field(
        default=0, ge=0, description="attempts at training that failed since the agent started"
    )
    problem: str = Field(
        default="",
        max_length=200,
        description="the last thing that went wrong in training: its kind, then words",
    )
    problem_at: AwareDatetime | None = None
    agent_version: str = Field(default="", max_length=32)
    machine: Machine | None = None
    at: AwareDatetime = Field(description="by the site's own clock")


# --- what the log says ---------------------------------------------------------------------------------


class Contribution(Value):
    """An accepted update with its frozen numbers.

    `weight` is its coefficient before normalisation over its group: fedasync α·s(τ), fedbuff s(τ) (times
    num_examples or the metric `objects` if the policy says so), fedavg num_examples. `version` is the one that its
    merge makes. Should an update before it turn out bad when it is read, the numbers in the Published event count.
    """

    update: ClientUpdate
    staleness: int = Field(ge=0)
    weight: float = Field(ge=0)
    version: int = Field(ge=1)


class Refusal(Value):
    """An update that will never be merged, and why. Also the content of `rejected/<site>/<id>.json`."""

    update: ClientUpdate
    reason: str = Field(max_length=64, description="a short stable word")
    message: str = Field(max_length=2000)
    version: int = Field(ge=0, description="of the head when it was refused")


class Created(Value):
    type: Literal["created"] = "created"


class Accepted(Value):
    type: Literal["accepted"] = "accepted"
    contribution: Contribution


class Refused(Value):
    type: Literal["refused"] = "refused"
    refusal: Refusal


class Published(Value):
    """Pending contributions became a new version; those that could not be read were refused."""

    type: Literal["published"] = "published"
    merged: tuple[Contribution, ...]
    refused: tuple[Refusal, ...] = ()


class Closed(Value):
    """The job is over. `by`: who ended it; "server" also for its own stop rule."""

    type: Literal["closed"] = "closed"
    reason: str = Field(max_length=200)
    by: Name = SERVER


class Held(Value):
    """Sites start no training until the job is resumed; what they have finished is merged all the same."""

    type: Literal["held"] = "held"
    reason: str = Field(max_length=200)
    by: Name = SERVER


class Resumed(Value):
    type: Literal["resumed"] = "resumed"
    by: Name = SERVER


class Quarantined(Value):
    """Version `version` failed its evaluation gate: it is not offered to sites, and nothing is merged on top of it,
    until an operator clears it or rolls back."""

    type: Literal["quarantined"] = "quarantined"
    version: int = Field(ge=1, le=MAX_VERSION)
    reason: str = Field(max_length=200)


class Cleared(Value):
    """Somebody has decided that quarantined version `version` is good. The gate measures from it on."""

    type: Literal["cleared"] = "cleared"
    version: int = Field(ge=1, le=MAX_VERSION)
    by: Name = SERVER


class Promoted(Value):
    """A version became `stable`."""

    type: Literal["promoted"] = "promoted"
    version: int = Field(ge=0, le=MAX_VERSION)
    by: Name = SERVER


class RolledBack(Value):
    """A new version whose model is that of version `to`. Those in between are the abandoned line.

    `refused`: pending updates that were trained from it.
    """

    type: Literal["rolled-back"] = "rolled-back"
    to: int = Field(ge=0, le=MAX_VERSION)
    reason: str = Field(default="", max_length=200)
    by: Name = SERVER
    refused: tuple[Refusal, ...] = ()
    request_id: UpdateId | None = Field(
        default=None, description="by which the same request, delivered again, is known"
    )


class Collected(Value):
    """Retention removes these objects: whoever finds one missing from here on knows why.

    Appended before the first of them is deleted. So a worker that stored a model and appends its record after
    this one has lost the compare-and-swap once, and sees whether its model is among them.
    """

    type: Literal["collected"] = "collected"
    keys: tuple[str, ...] = Field(min_length=1, max_length=MAX_COLLECTED)


Event = Annotated[
    Created
    | Accepted
    | Refused
    | Published
    | Closed
    | Held
    | Resumed
    | Quarantined
    | Cleared
    | Promoted
    | RolledBack
    | Collected,
    Field(discriminator="type"),
]


class Remembered(Value):
    """An id that must not be accepted again. `reason` is set if it was refused."""

    update_id: UpdateId
    base_version: int = Field(ge=0)
    reason: str | None = None


class ModelVersion(Value):
    """An immutable global model: the exchanged tensors, and the optimiser's state beside them."""

    version: int = Field(ge=0, le=MAX_VERSION)
    model: ModelRef
    server_state: ModelRef | None = None


class Quarantine(Value):
    """Why the newest versions are not offered: `version` failed; `offered` is the newest before it."""

    version: int = Field(ge=1, le=MAX_VERSION)
    reason: str = Field(max_length=200)
    offered: ModelVersion


class AbandonedLine(Value):
    """Versions `first` to `last` were rolled back: what was trained from them is refused."""

    first: int = Field(ge=1, le=MAX_VERSION)
    last: int = Field(ge=1, le=MAX_VERSION)


class Head(Value):
    """Everything that the next decision needs, after the newest event."""

    current: ModelVersion
    pending: tuple[Contribution, ...] = ()
    remembered: tuple[Remembered, ...] = ()
    remembered_from: int = Field(
        default=0,
        ge=0,
        description="ids of updates from an older base may be missing in `remembered`; the log's history has them",
    )
    closed: str | None = Field(default=None, max_length=200, description="why no update is merged any more")
    hold: str | None = Field(
        default=None, max_length=200, description="why sites start no training at present"
    )
    quarantine: Quarantine | None = None
    stable: ModelVersion | None = Field(default=None, description="the version that was promoted last")
    abandoned: tuple[AbandonedLine, ...] = Field(
        default=(), description="every version that was ever rolled back, in order; lines that touch are one"
    )
    cleared: tuple[int, ...] = Field(
        default=(), description="versions that failed the gate and were found good, in order"
    )

    @property
    def version(self) -> int:
        return self.current.version

    @property
    def offered(self) -> ModelVersion:
        """The newest version that sites and inference may use."""
        return self.current if self.quarantine is None else self.quarantine.offered

    @property
    def idle_because(self) -> str | None:
        """Why sites start no training at present; None: they may."""
        if self.closed is not None:
            return self.closed
        if self.quarantine is not None:
            return f"version {self.quarantine.version} is in quarantine: {self.quarantine.reason}"
        return self.hold

    def is_rolled_back(self, version: int) -> bool:
        """True if `version` lies in an abandoned line."""
        return any(line.first <= version <= line.last for line in self.abandoned)

    def withdrawn(self, version: int) -> str | None:
        """Why `version` is not to be used, so that neither `latest` nor `best` means it; None: nothing against it."""
        if self.is_rolled_back(version):
            return "rolled back"
        if self.quarantine is not None and version >= self.quarantine.version:
            return "in quarantine"
        return None


class LogRecord(Value):
    """`log/<seq>.json`. `nonce` is the writer's, and proves after a lost reply whose record this is."""

    schema_version: Literal[1] = 1
    job: Name
    seq: int = Field(ge=0)
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    at: AwareDatetime
    event: Event
    head: Head


class Evaluation(Value):
    """`metrics/<version>/<who>.json`: what `who` measured of a version; also the report of a site, whole.

    Average precisions (names that contain "AP@") lie in 0..1.
    """

    schema_version: Literal[1] = 1
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    who: Name = Field(description='a site, or "server"')
    num_images: int = Field(ge=0, le=10**12)
    metrics: Metrics
    per_class: dict[MetricName, dict[ClassName, float]] = Field(
        default_factory=dict,
        max_length=MAX_METRICS,
        description="the same measures class by class, of the classes that occur in the images",
    )
    at: AwareDatetime

    @field_validator("per_class", mode="before")
    @classmethod
    def _read_old(cls, value: Any) -> Any:
        """Older objects hold one measure by class, AP@[.5:.95], without its name."""
        if isinstance(value, dict) and value and not any(isinstance(v, dict) for v in value.values()):
            return {MAP: value}
        return value

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        values = {name: [value] for name, value in self.metrics.items()}
        for name, table in self.per_class.items():
            values.setdefault(name, []).extend(table.values())
        wrong = sorted(
            name for name, found in values.items() if AP in name and not all(0 <= v <= 1 for v in found)
        )
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: an average precision lies between 0 and 1")
        return self


class DeadLetter(Value):
    """`deadletters/<id>.json`: a message that was no update of any job, whole, with the reason.

    `requeue_began_at` and `requeued_at` are set in later records of the same letter (storage/jobs.py).
    """

    schema_version: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f-]{36}$")
    reason: str = Field(max_length=64)
    message: str = Field(max_length=2000)
    queue: str = Field(max_length=255, description="where it was read")
    routing_key: str = Field(max_length=255)
    user_id: str | None = Field(default=None, max_length=255)
    type: str | None = Field(default=None, max_length=255)
    content_type: str | None = Field(default=None, max_length=255)
    headers: str = Field(default="", max_length=8192, description="as text, for reading only")
    body_base64: str
    at: AwareDatetime
    requeue_began_at: AwareDatetime | None = None
    requeued_at: AwareDatetime | None = Field(default=None, description="when the broker had it again")
