"""Local training of detectors on a site's own images: `detection` behind the agent's Trainer port."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection import engine
from detection.cache import DiskCache, MemoryCache
from detection.check import classes_of
from detection.dataset import DEFAULT_CACHE_BYTES, Dataset, load_dataset
from detection.evaluate import Evaluated, evaluate
from detection.recheck import PresentImages
from detection.threads import pick_device, use_threads
from detection.weights import module_for
from federation.errors import BadDataset, BadSettings
from federation.jobs import JobSpec
from federation.settings import Settings
from producers.trainer import Progress, Trained
from producers.validation import Validation

DECODED = ".decoded"
"""Folder of decoded images below `site_state`, where each job has a folder of its name: no name has a dot."""

log = logging.getLogger("fedqueue.site")


@dataclass
class DetectionTrainer:
    """`duty`: share of the time, 0 to 1, that training may compute. `images`, `format`: found out if None.

    `disk_cache`: folder of decoded images and its limit in bytes; None: they are kept in memory alone.
    `device`: where it trains and measures, as torch names it. `others`: classes that the data may have besides a job's.
    """

    annotations: Path
    images: Path | None
    duty: float = 1.0
    format: str | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    disk_cache: tuple[Path, int] | None = None
    validation: Validation = field(default_factory=Validation)
    device: str = "cpu"
    others: tuple[str, ...] = ()
    _memory: MemoryCache[Any] | None = None
    _disk: DiskCache | None = None
    _validation: Dataset | None = None
    _dataset: Dataset | None = None
    _present: PresentImages | None = None
    _optimizer_state: engine.OptimizerState | None = None
    """What the last update ended with; a restarted agent begins with a fresh one."""

    @classmethod
    def from_settings(cls, settings: Settings) -> DetectionTrainer:
        """Raises BadSettings if the settings name no data."""
        if settings.site_annotations is None:
            raise BadSettings(
                "a site needs its data: set FEDQUEUE_SITE_ANNOTATIONS (a file or folder, docs/data.md) and"
                " FEDQUEUE_SITE_IMAGES (a folder)"
            )
        use_threads(settings.threads)
        disk_bytes = settings.site_disk_cache_bytes
        return cls(
            settings.site_annotations,
            settings.site_images,
            settings.site_duty,
            settings.site_format,
            settings.site_cache_bytes,
            (settings.site_state / DECODED, disk_bytes) if disk_bytes else None,
            Validation.from_settings(settings),
            pick_device(settings.device),
            settings.site_classes or (),
        )

    def for_job(self, spec: JobSpec) -> DetectionTrainer:
        """A trainer like this one. All share the caches, whose bounds are the site's and not a job's."""
        self._open_caches()
        return replace(self, _validation=None, _dataset=None, _present=None, _optimizer_state=None)

    def classes(self) -> frozenset[str]:
        """Of the boxes in the annotations. Raises BadDataset if these are none."""
        return classes_of(self.annotations, self.images, format=self.format)

    def prepare(self, spec: JobSpec) -> None:
        """Before any training starts: raises BadJob for an architecture that this machine cannot make, BadDataset
        with every defect of the data.
        """
        module_for(spec)
        self._open_caches()
        dataset = load_dataset(
            self.annotations,
            self.images,
            spec.classes,
            format=self.format,
            others=self.others,
            cache=self._memory,
            disk=self._disk,
        )
        self._dataset, self._validation = self.validation.apart(dataset, spec.classes)
        log.info("%d images, %d bytes that stay here", self._dataset.num_examples, self._dataset.image_bytes)
        self._present = PresentImages(self._dataset)

    def _open_caches(self) -> None:
        if self._memory is None:
            self._memory = MemoryCache(self.cache_bytes)
            self._disk = None if self.disk_cache is None else DiskCache(*self.disk_cache)

    @property
    def num_images(self) -> int:
        return 0 if self._dataset is None else self._dataset.num_examples

    @property
    def image_bytes(self) -> int:
        """Size of the files of those images."""
        return 0 if self._dataset is None else self._dataset.image_bytes

    def train(
        self,
        spec: JobSpec,
        weights: Mapping[str, NDArray[np.generic]],
        *,
        base_version: int,
        seed: int,
        on_progress: Callable[[Progress], None],
    ) -> Trained:
        """The job's plan from `weights`; the learning rate follows the job's progress through its versions.

        An image that cannot be read any more ends this attempt with BadDataset, and the next ones do without it until
        it can be read again.
        """
        assert self._present is not None, "prepare() comes first"
        present = self._present.look_again(spec.plan)
        left_out = len(self._present.left_out)
        steps = spec.plan.steps_for(present.num_examples)
        on_progress(Progress(0, steps, 0.0, left_out))
        try:
            trained = engine.train(
                spec,
                weights,
                present,
                seed=seed,
                progress=spec.progress(base_version),
                optimizer_state=self._optimizer_state if spec.plan.optimizer_state == "kept" else None,
                steps_before=base_version * steps,
                duty=self.duty,
                device=self.device,
                on_step=lambda report: on_progress(
                    Progress(report.step, report.steps, report.epoch, left_out)
                ),
            )
        except BadDataset:
            self._present.find_unreadable(spec.plan, lambda: on_progress(Progress(0, steps, 0.0, left_out)))
            raise
        self._optimizer_state = trained.optimizer_state
        metrics = trained.metrics | ({"left_out": float(left_out)} if left_out else {})
        return replace(trained, metrics=metrics)

    @property
    def num_validation_images(self) -> int:
        return 0 if self._validation is None else self._validation.num_examples

    def evaluate(
        self, spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], on_image: Callable[[int], None]
    ) -> Evaluated:
        """Average precision of `weights` on the validation images."""
        assert self._validation is not None, "prepare() found validation images"
        began = time.perf_counter()

        def rest(done: int) -> None:
            nonlocal began
            if self.duty < 1:
                time.sleep((time.perf_counter() - began) * (1 / self.duty - 1))
            on_image(done)
            began = time.perf_counter()

        return evaluate(spec, weights, self._validation, rest, device=self.device)
