"""The images that a site measures with: files of their own, or a held-out part of those that it would train on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.dataset import Dataset, load_dataset
from detection.held_out import hold_out, require_apart
from federation.settings import Settings

log = logging.getLogger("fedqueue.site")


@dataclass(frozen=True)
class Validation:
    """`annotations` and `images` of a data set; or without them the `fraction`, 0 to 1, of the training images.

    `images`, `format`: found out if None. `others`: classes that may be there besides a job's.
    """

    annotations: Path | None = None
    images: Path | None = None
    fraction: float = 0.0
    format: str | None = None
    others: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: Settings) -> Validation:
        images = settings.site_eval_images or settings.site_images
        return cls(
            settings.site_eval_annotations,
            images,
            settings.site_eval_fraction,
            settings.site_format,
            settings.site_classes or (),
        )

    def apart(self, dataset: Dataset, classes: Sequence[str]) -> tuple[Dataset, Dataset | None]:
        """What to train on, and what to measure with, if there is any. Raises BadDataset."""
        if self.annotations is not None:
            validation = load_dataset(
                self.annotations,
                self.images,
                classes,
                format=self.format,
                others=self.others,
                cache=dataset.cache,  # one bound for both
            )
            require_apart(dataset, validation)
            log.info("%d validation images", validation.num_examples)
            return dataset, validation
        if not self.fraction:
            return dataset, None
        training, held_out = hold_out(dataset, self.fraction)
        if held_out is None:
            log.warning(
                "a fraction of %g of %d images holds no box to measure with: raise site_eval_fraction, or set "
                "site_eval_annotations",
                self.fraction,
                dataset.num_examples,
            )
        else:
            log.info(
                "%d images are held out, %d are trained on", held_out.num_examples, training.num_examples
            )
        return training, held_out
