"""What a job says: classes, architecture, training plan, aggregation policy, stop rule. docs/jobs.md explains it.

`JobSpec` is what a submitter writes; `Job` is `job.json`, with the initial model beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    AwareDatetime,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from federation.base import Value, findings
from federation.ids import Name, Sha256, UpdateId

MAX_VERSION = 10**9
MAP_50 = "mAP@0.5"
OBJECTS = "objects"
"""Metric of an update: ground-truth objects in the images that its steps have seen."""
ClassName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:@\[\]/ -]{1,64}$")]
LayerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)]
PayloadKind = Literal["weights", "difference"]


class ModelRef(Value):
    """A stored tensor file, named by its content."""

    key: str = Field(min_length=1, max_length=512)
    sha256: Sha256
    nbytes: int = Field(ge=1)


class Augmentation(Value):
    """How training varies the images: each in another way every time it is seen."""

    flip: float = Field(default=0.5, ge=0, le=1, description="share of the images mirrored left to right")
    rescale: float = Field(default=0.5, ge=0, le=1, description="share scaled and cropped or padded")
    min_scale: float = Field(default=0.75, ge=0.1, le=1)
    max_scale: float = Field(default=1.5, ge=1, le=4, description="images are decoded at this size")
    brightness: float = Field(default=0.2, ge=0, le=1, description="strengths: a factor in 1 ± this")
    contrast: float = Field(default=0.2, ge=0, le=1)
    saturation: float = Field(default=0.3, ge=0, le=1)
    hue: float = Field(
        default=0.02, ge=0, le=0.5, description="shift of at most this share of the colour circle"
    )
    hue_share: float = Field(default=0.25, ge=0, le=1, description="share whose hue is shifted; it is costly")

    @property
    def moves(self) -> bool:
        """Whether boxes change their place."""
        return max(self.flip, self.rescale) > 0

    @property
    def colours(self) -> bool:
        """Whether pixels change their colour."""
        return max(self.brightness, self.contrast, self.saturation, min(self.hue, self.hue_share)) > 0


AUGMENTATIONS = {
    "none": Augmentation(flip=0, rescale=0, brightness=0, contrast=0, saturation=0, hue_share=0),
    "light": Augmentation(),
    "strong": Augmentation(
        rescale=0.8,
        min_scale=0.5,
        max_scale=2,
        brightness=0.4,
        contrast=0.4,
        saturation=0.6,
        hue=0.05,
        hue_share=0.5,
    ),
}
"""By name, for job descriptions; `job.json` holds the numbers."""


class TrainingPlan(Value):
    """How a site turns a model version into a client update."""

    image_size: int = Field(default=256, ge=64, le=2048, description="input side, pixels")
    batch_size: int = Field(default=16, ge=1, le=1024, description="images per gradient step")
    local_steps: int = Field(default=40, ge=1, le=100_000, description="gradient steps per update")
    local_epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="passes over the site's images per update; decides when given",
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0, le=10, description="peak learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd")
    optimizer_state: Literal["fresh", "kept", "shared"] = Field(
        default="fresh",
        description="at the start of an update: none | what the site's last update ended with, which never travels | "
        "that of the version, merged from the sites' as the weights are",
    )
    nesterov: bool = Field(default=False, description="sgd")
    weight_decay: float = Field(default=0.02, ge=0, le=1, description="on matrices and kernels only")
    warmup_steps: int = Field(default=10, ge=0, description="linear warm-up of a fresh optimiser")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine",
        description="cosine, linear: over the job's versions, from base_version / stop.max_versions",
    )
    final_learning_rate_fraction: float = Field(default=0.02, ge=0, le=1)
    gradient_norm_limit: float = Field(default=10.0, gt=0)
    proximal_mu: float = Field(
        default=0.0, ge=0, le=1000, description="FedProx: (μ/2)·|w - w_base|² (arXiv 1812.06127)"
    )
    mixed_precision: Literal["off", "bf16", "fp16"] = Field(
        default="off", description="autocast on CUDA; a site that trains on its CPU ignores it"
    )
    augmentation: Augmentation = Field(
        default=AUGMENTATIONS["light"],
        # jobs that are stored may hold the former `augment`, yes or no
        validation_alias=AliasChoices("augmentation", "augment"),
        description="none | light | strong, or its fields one by one",
    )
    norm: Literal["average", "local", "frozen"] = Field(
        default="average",
        description="BatchNorm layers: merged | kept by each site (FedBN, arXiv 2102.07623) | never trained",
    )
    norm_fixed_from: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the job from which on BatchNorm layers train with the model's running statistics instead"
        " of their batch's, and leave them as they are (FixBN, arXiv 2303.06530); 1: never",
    )
    freeze: tuple[LayerName, ...] = Field(
        default=(),
        max_length=1000,
        description="layers that are never trained and never sent, with all below them",
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    def steps_for(self, num_examples: int) -> int:
        """Gradient steps of one update of a site with so many images; at least one."""
        if self.local_epochs is None:
            return self.local_steps
        return max(1, ceil(self.local_epochs * num_examples / self.batch_size))

    @property
    def shared_moments(self) -> int:
        """How many moments of each parameter travel with an update: none, or 1 (sgd), or 2 (adamw)."""
        if self.optimizer_state != "shared":
            return 0
        return 2 if self.optimizer == "adamw" else 1

    def freezes(self, name: str) -> bool:
        """Whether tensor `name` is one of `freeze` or belongs to such a layer."""
        return any(f"{name}.".startswith(f"{layer}.") for layer in self.freeze)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov is a kind of momentum: set optimizer = 'sgd' and momentum above 0")
        if self.optimizer_state == "shared" and self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("sgd without momentum has no state to share: set momentum above 0")
        return self

    @field_validator("augmentation", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return AUGMENTATIONS["light" if value else "none"]
        if not isinstance(value, str):
            return value
        if value not in AUGMENTATIONS:
            raise ValueError(f"must be one of {', '.join(AUGMENTATIONS)}, or a table, is {value!r}")
        return AUGMENTATIONS[value]


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


class ParticipationStaleness(Value):
    """s(τ) = min(1+τ, limit): the versions for which an update stands. After FedAU, Wang, Ji 2024, arXiv 2306.03401.

    A site that trains all the time, one update after the other, is merged once in 1+τ versions. The slower it is the
    less its images count, unless each of its updates counts for more.
    """

    kind: Literal["participation"] = "participation"
    limit: float = Field(default=3.0, ge=1, le=1000)


Staleness = Annotated[
    ConstantStaleness | PolynomialStaleness | HingeStaleness | ParticipationStaleness,
    Field(discriminator="kind"),
]


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
    weight_by_objects: bool = Field(
        default=False,
        description="fedbuff: weight by the objects that the update's steps have seen, its metric `objects`",
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
        if self.strategy != "fedbuff" and (self.weight_by_examples or self.weight_by_objects):
            raise ValueError(
                "weight_by_examples and weight_by_objects are switches of fedbuff (fedavg always weights by examples)"
            )
        if self.strategy != "fedbuff" and self.staleness.kind == "participation":
            raise ValueError(
                "staleness participation takes differences several times over, which only strategy fedbuff merges"
            )
        if self.weight_by_examples and self.weight_by_objects:
            raise ValueError("weight by examples or by objects, not by both")
        if self.strategy == "fedbuff" and self.max_pending < self.buffer_size:
            raise ValueError("max_pending must be at least buffer_size, or the buffer never fills")
        return self


class StopRule(Value):
    """When the job closes: as soon as one of these holds. `aggregator/stopping.py` judges."""

    max_versions: int = Field(
        default=100, ge=1, le=MAX_VERSION, description="close when this version is made"
    )
    target: float | None = Field(
        default=None, description="close when a version reaches this value of evaluation.metric; none: never"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        le=MAX_VERSION,
        description="close after so many measured versions in a row without improvement; none: never",
    )
    min_improvement: float = Field(
        default=0.0,
        ge=0,
        description="patience: a version improves if it beats the last one that did by more",
    )
    deadline: AwareDatetime | None = Field(default=None, description="close at this time; none: never")


class EvaluationPolicy(Value):
    """Which versions are measured: by the server on its held-out set, by each site on its validation images."""

    every: int = Field(
        default=0, ge=0, le=MAX_VERSION, description="versions between evaluations by the server; 0: never"
    )
    sites_every: int = Field(
        default=0, ge=0, le=MAX_VERSION, description="versions between evaluations by the sites; 0: never"
    )
    metric: MetricName = Field(
        default=MAP_50, description="the best version is the one that has most of this"
    )
    max_drop: float | None = Field(
        default=None,
        gt=0,
        description="quarantine a version whose metric is lower than the best before it by more; none: never",
    )

    def server_due(self, previous: int, version: int, closed: bool) -> bool:
        """True if the server measures `version`, which followed `previous`; closed: the job ended with it."""
        return _due(self.every, previous, version, closed)

    def sites_due(self, previous: int, version: int, closed: bool) -> bool:
        """The same for the sites. All go by the log, so they measure the same versions, and can be compared."""
        return _due(self.sites_every, previous, version, closed)


def _due(every: int, previous: int, version: int, closed: bool) -> bool:
    """A multiple of `every` lies in (previous, version]: one publish may advance by more than one version."""
    return every > 0 and (version // every > previous // every or closed)


class Participation(Value):
    """Which sites train, and when."""

    mode: Literal["free-running", "invited"] = Field(
        default="free-running",
        description="every joined site trains whenever it can | the server chooses who trains",
    )
    min_sites: int = Field(
        default=1, ge=1, le=10_000, description="nobody trains before so many sites have joined"
    )
    min_interval_s: float = Field(
        default=0.0, ge=0, le=31_536_000, description="seconds between the starts of two trainings of a site"
    )
    concurrency: int = Field(
        default=4, ge=1, le=10_000, description="invited: so many sites are kept busy at a time"
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="invited: nobody is invited while so many updates are in the making or wait to be merged; the"
        " fewer, the less stale they are; none: no limit",
    )
    max_load: float = Field(
        default=1.5, gt=0, le=1000, description="invited: busier sites are passed over; load average per core"
    )
    lease_s: float = Field(
        default=600.0,
        gt=0,
        le=604_800,
        description="invited: seconds in which an invited site must finish, or another takes its place",
    )


class ReleaseRule(Value):
    """Whose consent it takes to give a version away outside. `aggregator/consent.py` judges."""

    approvals: Literal["all", "majority"] = Field(
        default="all",
        description="of the sites whose work is in the version; a majority is more than half of them",
    )


class JobSpec(Value):
    """What a submitter writes: everything of a job but its id's first model."""

    schema_version: Literal[1] = 1
    id: Name
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=1000)
    arch: str = Field(default="fcos_shufflenet_v2_x0_5", min_length=1, max_length=128)
    participants: tuple[Name, ...] | None = Field(
        default=None, max_length=10_000, description="sites that are invited; none: every enrolled site"
    )
    participation: Participation = Participation()
    plan: TrainingPlan = TrainingPlan()
    aggregation: AggregationPolicy = AggregationPolicy()
    stop: StopRule = StopRule()
    evaluation: EvaluationPolicy = EvaluationPolicy()
    release: ReleaseRule = ReleaseRule()
    max_inflight: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="updates of one site not yet merged; none: from the strategy",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [*self._problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """What does not fit together, each with its field."""
        fedavg, measured = self.aggregation.strategy == "fedavg", self.evaluation.metric
        if len(set(self.classes)) != len(self.classes):
            yield "classes: a name is there twice"
        if self.participants is not None and len(set(self.participants)) != len(self.participants):
            yield "participants: a name is there twice"
        if fedavg and not self.participants:
            yield "participants: fedavg waits for every invited site, so it must name them"
        if self.participants and self.participation.min_sites > len(self.participants):
            yield "participation.min_sites: more than there are participants, so nobody would ever train"
        if fedavg and self.participation.mode == "invited":
            yield "participation.mode: fedavg waits for every participant, so it cannot choose among them"
        if self.plan.shared_moments and self.aggregation.server_optimizer is not None:
            yield (
                "plan.optimizer_state: shared moments and aggregation.server_optimizer are two optimisers for one"
                " model: leave one out"
            )
        if self.aggregation.staleness.kind == "participation" and self.inflight_limit > 1:
            yield (
                "max_inflight: staleness participation counts the versions since a site's last update, which is how"
                " old the next one is only if max_inflight = 1"
            )
        limit, size = self.participation.max_in_flight, self.aggregation.buffer_size
        if limit is not None and self.aggregation.strategy == "fedbuff" and limit <= size:
            yield (
                f"participation.max_in_flight: {limit} is no more than aggregation.buffer_size ({size}), so every"
                " version would wait for the slowest of the sites that were invited for it"
            )
        needs = {
            "stop.target": self.stop.target,
            "stop.patience": self.stop.patience,
            "evaluation.max_drop": self.evaluation.max_drop,
        }
        for field, value in needs.items():
            if value is not None and not (self.evaluation.every or self.evaluation.sites_every):
                yield f"{field}: nobody measures: set evaluation.every, evaluation.sites_every, or both"
        if self.stop.target is not None and "AP@" in measured and not 0 < self.stop.target <= 1:
            yield f"stop.target: {measured} lies between 0 and 1"

    def progress(self, base_version: int) -> tuple[float, float]:
        """How far the job is, 0..1, at the start and at the end of an update from `base_version`.

        An update moves it on by the share of one version, whatever its number of steps.
        """
        versions = self.stop.max_versions
        return min(base_version / versions, 1.0), min((base_version + 1) / versions, 1.0)

    @property
    def inflight_limit(self) -> int:
        """How many updates of one site may wait unmerged before it stops training.

        fedasync and fedavg: 1, so that a site goes on from a model that holds its own work. fedbuff: K, so
        that even a lone site fills the buffer.
        """
        if self.max_inflight is not None:
            return self.max_inflight
        return self.aggregation.buffer_size if self.aggregation.strategy == "fedbuff" else 1


def read_spec(document: Mapping[str, Any]) -> tuple[JobSpec | None, list[str]]:
    """The job description, or None and everything that is wrong with it: `field: message`.

    document: what JSON can say. Fields are checked one by one first, and what does not fit together after that.
    """
    try:
        return JobSpec.model_validate_json(json.dumps(document)), []
    except ValidationError as exc:
        return None, findings(exc)


class Job(Value):
    """`job.json`: a federation. `initial` holds every tensor; versions hold the exchanged ones."""

    schema_version: Literal[1] = 1
    spec: JobSpec
    initial: ModelRef
    max_update_bytes: int = Field(ge=1, description="largest payload that is read")
    submitted_by: Name = Field(default="server", description='a site, or "server": an operator')
    request_id: UpdateId | None = Field(default=None, description="of the request that made it")
    created_at: AwareDatetime

    @property
    def id(self) -> str:
        return self.spec.id
