"""Local evaluation: between two updates a site measures versions on its own validation images, and reports figures.

Which versions follows from the job's EvaluationPolicy and the log, so all sites measure the same ones; of several
that are due a site takes the newest. A report that cannot be sent is kept until the next turn, and lost if the
process ends before: that loses nothing but a metric, and never stops training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from broker import topology
from broker.port import Broker
from federation.errors import AccessDenied, BadMessage, BrokerUnavailable, CorruptLog, NotFound, Rejected
from federation.jobs import Job, JobSpec
from federation.types import Evaluation, Head, ModelVersion
from federation.wire import encode_report
from producers.local import LocalModel
from storage.blob import BlobStore
from storage.jobs import load_evaluation

log = logging.getLogger("fedqueue.site")


class Measured(Protocol):
    """What an evaluation returns: figures, and never more than that."""

    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def per_class(self) -> Mapping[str, Mapping[str, float]]: ...
    @property
    def num_images(self) -> int: ...


@runtime_checkable
class Evaluator(Protocol):
    """What a Trainer may be besides: able to measure a version on images that it never trains on."""

    @property
    def num_validation_images(self) -> int | None:
        """After `prepare`. 0: this site has none, and `evaluate` is not called. None: `evaluate` will tell."""
        ...

    def evaluate(
        self, spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], on_image: Callable[[int], None]
    ) -> Measured:
        """Measure `weights`, all tensors of the model; `on_image` is told how many images are done, and may raise."""
        ...


@dataclass
class LocalEvaluation:
    """One site's evaluations for one job. `saw` every record of the log, and take a `turn` now and then."""

    site: str
    job: Job
    model: LocalModel
    store: BlobStore
    broker: Broker
    evaluator: Evaluator
    on_image: Callable[[int, int], None]
    """Told how many images of how many (0: unknown) are done; may raise to end the evaluation."""
    _due: ModelVersion | None = None
    _last: int | None = None
    _unsent: Evaluation | None = None
    _refused: bool = False

    @classmethod
    def of(
        cls,
        site: str,
        model: LocalModel,
        broker: Broker,
        trainer: object,
        on_image: Callable[[int, int], None],
    ) -> LocalEvaluation | None:
        """None if the job does not ask for it, or this site has nothing to measure with. After `prepare`."""
        if not model.job.spec.evaluation.sites_every:
            return None
        if not isinstance(trainer, Evaluator) or trainer.num_validation_images == 0:
            log.info(
                "this job asks sites to measure versions, and this one has no validation images: to take part in "
                "that, set FEDQUEUE_SITE_EVAL_ANNOTATIONS or FEDQUEUE_SITE_EVAL_FRACTION; a trainer of your own needs "
                "evaluate(weights)"
            )
            return None
        return cls(site, model.job, model, model.store, broker, trainer, on_image)

    def saw(self, before: Head, after: Head) -> None:
        """Two heads that follow each other in the log; the same twice: the first that this process saw."""
        due = self.job.spec.evaluation.sites_due(before.version, after.version, after.closed is not None)
        if due and after.version != self._last:
            self._due = after.current

    @property
    def is_due(self) -> bool:
        """A version waits to be measured."""
        return self._due is not None and not self._refused

    def turn(self) -> bool:
        """Measure what is due, and report it. False: nothing was due.

        Raises StoreUnavailable, and what `on_image` raises: it stays due.
        """
        self._send()
        due = self._due
        if due is None or self._refused:
            return False
        if not self._is_reported(due.version):
            self._unsent = self._measure(due)
        self._due, self._last = None, due.version
        self._send()
        return True

    def _measure(self, due: ModelVersion) -> Evaluation | None:
        count = self.evaluator.num_validation_images or 0
        log.info("measuring version %d%s", due.version, f" on {count} images" if count else "")
        try:
            weights = self.model.assemble(self.model.pull(due.model))
            result = self.evaluator.evaluate(self.job.spec, weights, lambda done: self.on_image(done, count))
            measured = Evaluation(
                job=self.job.id,
                version=due.version,
                who=self.site,
                num_images=result.num_images,
                metrics={name: round(value, 6) for name, value in result.metrics.items()},
                per_class={
                    measure: {name: round(value, 6) for name, value in table.items()}
                    for measure, table in result.per_class.items()
                },
                at=datetime.now(UTC),
            )
        except (NotFound, AccessDenied) as exc:  # a site's account is not told which of the two it is
            log.warning("version %d is not kept any more, so it is not measured: %s", due.version, exc)
        except (Rejected, ArithmeticError, ValueError, RuntimeError, MemoryError) as exc:
            # an unreadable image, no memory, a figure that is none: training goes on without the metric
            log.error("version %d could not be measured: %s", due.version, exc)
        else:
            log.info("version %d: %s", due.version, measured.metrics)
            return measured
        return None

    def _is_reported(self, version: int) -> bool:
        """True if the server has a report of ours, from before this process began."""
        try:
            return load_evaluation(self.store, self.job.id, version, self.site) is not None
        except AccessDenied:  # the answer to a site's account where there is no object
            return False
        except CorruptLog as exc:
            log.warning("our report on version %d cannot be read: %s", version, exc)
            return True

    def _send(self) -> None:
        report = self._unsent
        if report is None:
            return
        try:
            message = encode_report(report)
        except BadMessage as exc:
            log.warning("version %d: only the means are reported: %s", report.version, exc)
            message = encode_report(report.model_copy(update={"per_class": {}}))
        try:
            self.broker.publish(topology.UPDATES_EXCHANGE, message)
        except BrokerUnavailable as exc:
            log.warning("the report on version %d waits: %s", report.version, exc)
            return
        except (BadMessage, AccessDenied) as exc:
            log.error(
                "the server takes no reports, so no more versions are measured; its operator should run "
                "`fedqueue server init` and enrol this site again: %s",
                exc,
            )
            self._refused = True
        self._unsent = None
