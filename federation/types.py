"""The nouns of docs/architecture.md as frozen values, and how each is written in JSON.

    Job ─ TrainingPlan, AggregationPolicy, StopRule, EvaluationPolicy, initial ModelRef
    LogRecord ─ Event (Created | Accepted | Refused | Published | Closed), Head after it
    Head ─ version, ModelRef, pending Contributions, remembered ids
    Contribution ─ ClientUpdate with the staleness and the weight that it was given

Every type is a `Value`: checked when made, immutable, `to_json` / `from_json`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from federation.base import Value
from federation.ids import Name, Sha256, UpdateId
from federation.keys import update_key

MAX_VERSION = 10**9
MAX_METRICS = 32
ClassName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:@\[\]/ -]{1,64}$")]
Metrics = Annotated[dict[MetricName, float], Field(max_length=MAX_METRICS)]
PayloadKind = Literal["weights", "difference"]


class ModelRef(Value):
    """A stored tensor file, named by its content."""

    key: str = Field(min_length=1, max_length=512)
    sha256: Sha256
    nbytes: int = Field(ge=1)


# --- what a job says -----------------------------------------------------------------------------------


class TrainingPlan(Value):
    """How a site turns a model version into a client update."""

    image_size: int = Field(default=256, ge=64, le=2048, description="input side, pixels")
    batch_size: int = Field(default=16, ge=1, le=1024, description="images per gradient step")
    local_steps: int = Field(default=40, ge=1, le=100_000, description="gradient steps per update")
    learning_rate: float = Field(default=2e-3, gt=0, le=10, description="peak learning rate (AdamW)")
    weight_decay: float = Field(default=0.02, ge=0, le=1, description="on matrices and kernels only")
    warmup_steps: int = Field(default=10, ge=0, description="linear warm-up at the start of every update")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="cosine: over the job's versions, from base_version / stop.max_versions"
    )
    final_learning_rate_fraction: float = Field(default=0.02, ge=0, le=1)
    gradient_norm_limit: float = Field(default=10.0, gt=0)
    augment: bool = Field(default=True, description="flip, scale-and-crop, brightness and colour jitter")
    norm: Literal["average", "local", "frozen"] = Field(
        default="average",
        description="BatchNorm layers: merged | kept by each site (FedBN, arXiv 2102.07623) | never trained",
    )
    seed: int = Field(default=0, ge=0, lt=2**31)


class ConstantStaleness(Value):
    """s(τ) = 1."""

    kind: Literal["constant"] = "constant"


class PolynomialStaleness(Value):
    """s(τ) = (1+τ)^-a. Xie, Koyejo, Gupta 2019, arXiv 1903.03934."""

    kind: Literal["polynomial"] = "polynomial"
    a: float = Field(default=0.5, ge=0, le=100)


class HingeStaleness(Value):
    """s(τ) = 1 if τ ≤ b else 1/(a(τ-b)+1). Xie, Koyejo, Gupta 2019, arXiv 1903.03934."""

    kind: Literal["hinge"] = "hinge"
    a: float = Field(default=10.0, ge=0, le=1e6)
    b: float = Field(default=4.0, ge=0, le=1e6)


Staleness = Annotated[ConstantStaleness | PolynomialStaleness | HingeStaleness, Field(discriminator="kind")]


class ServerOptimizer(Value):
    """Adaptive server step on the merged direction. Reddi et al. 2021, arXiv 2003.00295; Hsu et al. 2019."""

    kind: Literal["fedavgm", "fedadam", "fedyogi"]
    beta1: float = Field(default=0.9, ge=0, lt=1, description="momentum")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="second moment; not used by fedavgm")
    epsilon: float = Field(
        default=1e-3, ge=1e-12, description="adaptivity τ of the paper; not used by fedavgm"
    )


class AggregationPolicy(Value):
    """How client updates become model versions."""

    strategy: Literal["fedasync", "fedbuff", "fedavg"] = "fedasync"
    alpha: float = Field(default=0.6, gt=0, le=1, description="fedasync: mixing weight of a fresh update")
    staleness: Staleness = PolynomialStaleness()
    buffer_size: int = Field(default=10, ge=1, le=10_000, description="fedbuff: K, updates per flush")
    server_learning_rate: float = Field(default=1.0, gt=0, le=100, description="fedbuff, fedavg: η")
    server_optimizer: ServerOptimizer | None = None
    weight_by_examples: bool = Field(
        default=False, description="fedbuff: weight by num_examples (off in the paper); fedavg always does"
    )
    max_staleness: int = Field(default=100, ge=0, le=1_000_000, description="older updates are rejected")
    max_pending: int = Field(
        default=64,
        ge=1,
        le=10_000,
        description="accepted updates waiting in the head before a publish is forced",
    )

    @property
    def payload_kind(self) -> PayloadKind:
        """What a site uploads: its weights y, or the difference Δ = y - x_base."""
        return "difference" if self.strategy == "fedbuff" else "weights"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strategy == "fedasync" and self.server_optimizer is not None:
            raise ValueError("server_optimizer works on a buffered direction: use strategy fedbuff or fedavg")
        if self.strategy != "fedbuff" and self.weight_by_examples:
            raise ValueError("weight_by_examples is a switch of fedbuff (fedavg always weights by examples)")
        if self.strategy == "fedbuff" and self.max_pending < self.buffer_size:
            raise ValueError("max_pending must be at least buffer_size, or the buffer never fills")
        return self


class StopRule(Value):
    """When the job closes."""

    max_versions: int = Field(
        default=100, ge=1, le=MAX_VERSION, description="close when this version is made"
    )


class EvaluationPolicy(Value):
    """Central evaluation on the server's held-out set, where it has one."""

    every: int = Field(default=0, ge=0, le=MAX_VERSION, description="versions between evaluations; 0: never")


class JobSpec(Value):
    """What a submitter writes: everything of a job but its id's first model."""

    id: Name
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=1000)
    arch: str = Field(default="fcos_shufflenet_v2_x0_5", min_length=1, max_length=128)
    participants: tuple[Name, ...] | None = Field(
        default=None, max_length=10_000, description="sites that may contribute; none: every enrolled site"
    )
    plan: TrainingPlan = TrainingPlan()
    aggregation: AggregationPolicy = AggregationPolicy()
    stop: StopRule = StopRule()
    evaluation: EvaluationPolicy = EvaluationPolicy()
    max_inflight: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="updates of one site not yet merged; none: from the strategy",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name is there twice")
        if self.participants is not None and len(set(self.participants)) != len(self.participants):
            raise ValueError("participants: a name is there twice")
        if self.aggregation.strategy == "fedavg" and not self.participants:
            raise ValueError("participants: fedavg waits for every invited site, so it must name them")
        return self

    @property
    def inflight_limit(self) -> int:
        """How many updates of one site may wait unmerged before it stops training.

        fedasync and fedavg: 1, so that a site goes on from a model that holds its own work. fedbuff: K, so
        that even a lone site fills the buffer.
        """
        if self.max_inflight is not None:
            return self.max_inflight
        return self.aggregation.buffer_size if self.aggregation.strategy == "fedbuff" else 1


class Job(Value):
    """`job.json`: a federation. `initial` holds every tensor; versions hold the exchanged ones."""

    schema_version: Literal[1] = 1
    spec: JobSpec
    initial: ModelRef
    max_update_bytes: int = Field(ge=1, description="largest payload that is read")
    created_at: AwareDatetime

    @property
    def id(self) -> str:
        return self.spec.id


# --- what a site sends ---------------------------------------------------------------------------------


class ClientUpdate(Value):
    """A site's finished local training. The tensors lie at `payload_key`; only this is sent."""

    schema_version: Literal[1] = 1
    update_id: UpdateId
    job: Name
    site: Name
    base_version: int = Field(ge=0, le=MAX_VERSION, description="version that training started from")
    num_examples: int = Field(ge=1, le=10**12, description="training images behind the update")
    payload_kind: PayloadKind
    payload_key: str = Field(max_length=256)
    payload_sha256: Sha256
    payload_bytes: int = Field(ge=1, le=2**40)
    metrics: Metrics = Field(default_factory=dict)
    created_at: AwareDatetime

    @model_validator(mode="after")
    def _check(self) -> Self:
        expected = update_key(self.job, self.site, self.update_id)
        if self.payload_key != expected:
            raise ValueError(f"payload_key must be {expected}")
        return self


class SiteStatus(Value):
    """One heartbeat. Disposable: it feeds the view of connected sites, nothing is decided by it."""

    schema_version: Literal[1] = 1
    site: Name
    state: Literal["idle", "pulling", "training", "uploading", "waiting", "stopped"]
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
    agent_version: str = Field(default="", max_length=32)
    at: AwareDatetime


# --- what the log says ---------------------------------------------------------------------------------


class Contribution(Value):
    """An accepted update with its frozen numbers.

    `weight` is its coefficient before normalisation over its group: fedasync α·s(τ), fedbuff s(τ) (times
    num_examples if the policy says so), fedavg num_examples. `version` is the one that its merge makes.
    Should an update before it turn out bad when it is read, the numbers in the Published event count.
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
    type: Literal["closed"] = "closed"
    reason: str = Field(max_length=200)


Event = Annotated[Created | Accepted | Refused | Published | Closed, Field(discriminator="type")]


class Remembered(Value):
    """An id that must not be accepted again. `reason` is set if it was refused."""

    update_id: UpdateId
    base_version: int = Field(ge=0)
    reason: str | None = None


class ModelVersion(Value):
    """An immutable global model: the exchanged tensors, and the server optimiser's state beside them."""

    version: int = Field(ge=0, le=MAX_VERSION)
    model: ModelRef
    server_state: ModelRef | None = None


class Head(Value):
    """Everything that the next decision needs, after the newest event."""

    current: ModelVersion
    pending: tuple[Contribution, ...] = ()
    remembered: tuple[Remembered, ...] = ()
    closed: str | None = Field(default=None, max_length=200, description="why no update is merged any more")

    @property
    def version(self) -> int:
        return self.current.version


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
    """`metrics/<version>/<who>.json`: what `who` measured of a version."""

    schema_version: Literal[1] = 1
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    who: Name
    num_images: int = Field(ge=0)
    metrics: Metrics
    per_class: dict[ClassName, float] = Field(default_factory=dict, description="AP@[.5:.95] of each class")
    at: AwareDatetime


class DeadLetter(Value):
    """`deadletters/<id>.json`: a message that was no update of any job, whole, with the reason."""

    schema_version: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f-]{36}$")
    reason: str = Field(max_length=64)
    message: str = Field(max_length=2000)
    queue: str = Field(max_length=255, description="where it was read")
    routing_key: str = Field(max_length=255)
    user_id: str | None = Field(default=None, max_length=255)
    content_type: str | None = Field(default=None, max_length=255)
    headers: str = Field(default="", max_length=8192, description="as text, for reading only")
    body_base64: str
    at: AwareDatetime
