"""Local training by somebody else's object, behind the agent's Trainer port: docs/custom-models.md.

The object knows nothing of fedqueue and need not train a detector:

    train(weights, plan) -> (weights, num_examples, metrics)

    weights       dict of name -> numpy array, float32 or int64; the same names, types and shapes come back
    plan          the job's TrainingPlan, whose `seed` is this update's own
    num_examples  training examples behind the update, at least 1
    metrics       dict of name -> number, which everybody in the federation may read

It may also measure versions, on data that it does not train on:

    evaluate(weights) -> metrics

    metrics       as above; `num_images` among them is how much they weigh beside another site's, 1 if it is absent
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from federation import plugins
from federation.base import describe
from federation.errors import BadJob, BadPayload, BadSettings, FedqueueError, Rejected
from federation.jobs import JobSpec, TrainingPlan
from federation.types import Metrics
from producers.trainer import Progress

log = logging.getLogger("fedqueue.site")

Arrays = dict[str, NDArray[Any]]
MAX_SEED = 2**31
_METRICS = TypeAdapter(Metrics, config=ConfigDict(allow_inf_nan=False))


class CustomTrainer(Protocol):
    """What the site's operator brings."""

    def train(
        self, weights: Arrays, plan: TrainingPlan
    ) -> tuple[Mapping[str, Any], int, Mapping[str, float]]: ...


class TrainerFailed(Rejected):
    """The site's own trainer raised an error; there is no update, or no measurement."""

    reason = "trainer-failed"


@dataclass(frozen=True, eq=False)
class CustomTrained:
    weights: Arrays
    num_examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class CustomMeasured:
    metrics: dict[str, float]
    num_images: int
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomTraining:
    """`name`: what the setting `trainer` says, for messages."""

    name: str
    trainer: CustomTrainer

    @classmethod
    def from_settings(cls, name: str) -> CustomTraining:
        """Load what the site's setting `trainer` names: the object, or what makes it when called without arguments.

        Raises BadSettings.
        """
        found = plugins.load(plugins.TRAINERS, name)
        try:
            trainer = found() if isinstance(found, type) or not hasattr(found, "train") else found
        except Exception as exc:  # whatever somebody else's code does
            raise BadSettings(f"trainer {name} could not be made: {type(exc).__name__}: {exc}") from exc
        if not callable(getattr(trainer, "train", None)):
            raise BadSettings(f"trainer {name} has no train(weights, plan): docs/custom-models.md")
        return cls(name, trainer)

    def prepare(self, spec: JobSpec) -> None:
        """The trainer's data are its own business. Raises BadJob if the job's sites share their optimisers' state."""
        if spec.plan.shared_moments:
            raise BadJob(
                f"trainer {self.name} tells nothing of its optimiser, and this job's sites share theirs: a job that"
                ' custom trainers take part in needs plan.optimizer_state = "fresh" or "kept"'
            )
        log.info("architecture %s, trained by %s", spec.arch, self.name)

    @property
    def num_images(self) -> int:
        """Unknown."""
        return 0

    def train(
        self,
        spec: JobSpec,
        weights: Mapping[str, NDArray[np.generic]],
        *,
        base_version: int,
        seed: int,
        on_progress: Callable[[Progress], None],
    ) -> CustomTrained:
        """One call of the trainer, on copies. Raises TrainerFailed, BadPayload for what is no update."""
        inside = Progress(0, 0, 0.0)  # nobody knows how many steps it takes
        on_progress(inside)
        plan = spec.plan.model_copy(update={"seed": seed % MAX_SEED})
        result = self._call(lambda: self.trainer.train(_copies(weights), plan))
        on_progress(inside)
        return self._checked(weights, result)

    @property
    def num_validation_images(self) -> int | None:
        """0 if the trainer has no `evaluate`; how many it measures with, it says afterwards."""
        return None if callable(getattr(self.trainer, "evaluate", None)) else 0

    def evaluate(
        self, spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], on_image: Callable[[int], None]
    ) -> CustomMeasured:
        """One call of the trainer, on copies. Raises TrainerFailed, BadPayload for what are no metrics."""
        on_image(0)
        trainer: Any = self.trainer
        metrics = self._numbers(self._call(lambda: trainer.evaluate(_copies(weights))))
        num_images = metrics.pop("num_images", 1.0)
        if num_images < 1 or not num_images.is_integer():
            raise BadPayload(
                f"trainer {self.name}: num_images must be a whole number from 1 on, is {num_images:g}"
            )
        if spec.evaluation.metric not in metrics:
            log.warning(
                "trainer %s measures %s, but the job's best version goes by %s (evaluation.metric)",
                self.name,
                ", ".join(metrics) or "nothing",
                spec.evaluation.metric,
            )
        return CustomMeasured(metrics, int(num_images))

    def _call(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except FedqueueError:
            raise
        except Exception as exc:  # whatever somebody else's code does
            log.exception("trainer %s failed", self.name)
            raise TrainerFailed(f"trainer {self.name}: {type(exc).__name__}: {exc}") from exc

    def _checked(self, base: Mapping[str, NDArray[np.generic]], result: object) -> CustomTrained:
        if not isinstance(result, tuple) or len(result) != 3:
            raise BadPayload(f"trainer {self.name} must return (weights, num_examples, metrics)")
        trained, num_examples, metrics = result
        if not isinstance(trained, Mapping) or trained.keys() != base.keys():
            got = trained.keys() if isinstance(trained, Mapping) else set()
            raise BadPayload(
                f"trainer {self.name} must return the tensors that it was given: missing {sorted(base.keys() - got)}, "
                f"not asked for {sorted(got - base.keys())}"
            )
        arrays: Arrays = {}
        for name, array in trained.items():
            own = base[name]
            if not isinstance(array, np.ndarray | np.generic) or (array.dtype, array.shape) != (
                own.dtype,
                own.shape,
            ):
                what = f"{array.dtype} {array.shape}" if hasattr(array, "dtype") else type(array).__name__
                raise BadPayload(
                    f"trainer {self.name}: tensor {name!r} is {what}, must be {own.dtype} {own.shape}"
                )
            if not np.isfinite(array).all():
                raise BadPayload(f"trainer {self.name}: tensor {name!r} holds NaN or infinity")
            arrays[name] = np.asarray(array)
        if (
            isinstance(num_examples, bool)
            or not isinstance(num_examples, int | np.integer)
            or num_examples < 1
        ):
            raise BadPayload(
                f"trainer {self.name}: num_examples must be a whole number from 1 on, is {num_examples!r}"
            )
        return CustomTrained(arrays, int(num_examples), self._numbers(metrics))

    def _numbers(self, metrics: Any) -> dict[str, float]:
        try:
            return _METRICS.validate_python({str(k): float(v) for k, v in dict(metrics).items()})
        except ValidationError as exc:
            raise BadPayload(f"trainer {self.name}: metrics: {describe(exc)}") from exc
        except (TypeError, ValueError) as exc:
            raise BadPayload(
                f"trainer {self.name}: metrics must be a dict of names to numbers: {exc}"
            ) from exc


def _copies(weights: Mapping[str, NDArray[np.generic]]) -> Arrays:
    return {name: np.array(array) for name, array in weights.items()}
