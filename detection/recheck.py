"""Image files that were fine when the site started and are not any more: find them, and do without them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from detection.augment import decoded_side
from detection.cache import MemoryCache
from detection.dataset import Dataset
from federation.errors import BadDataset
from federation.jobs import TrainingPlan

log = logging.getLogger("fedqueue.data")


@dataclass(eq=False)
class PresentImages:
    """A data set, and what of it can be read. `left_out`: why an image cannot, by its index."""

    dataset: Dataset
    left_out: dict[int, str] = field(default_factory=dict)
    _usable: Dataset | None = None

    def look_again(self, plan: TrainingPlan) -> Dataset:
        """What can be read; an image that was left out is back as soon as it can. Logs those that cannot.

        Raises BadDataset if nothing can be read.
        """
        if self.left_out:
            self._leave_out(self._unreadable(self.left_out, plan))
            for problem in self.left_out.values():
                log.warning("training without an image: %s", problem)
        return self._usable or self.dataset

    def find_unreadable(self, plan: TrainingPlan, on_image: Callable[[], None]) -> None:
        """Look at every image. `on_image` is called before each, and may raise. Raises as `look_again`."""
        self._leave_out(self._unreadable(range(self.dataset.num_examples), plan, on_image))

    def _unreadable(
        self, indices: Iterable[int], plan: TrainingPlan, on_image: Callable[[], None] = lambda: None
    ) -> dict[int, str]:
        # what lies in memory is not asked: its file may be gone
        files = replace(self.dataset, cache=MemoryCache(0))
        side = decoded_side(plan.image_size, plan.augmentation)
        problems: dict[int, str] = {}
        for index in indices:
            on_image()
            try:
                files.square(index, side)
            except BadDataset as exc:
                problems[index] = str(exc)
        return problems

    def _leave_out(self, problems: dict[int, str]) -> None:
        if problems.keys() != self.left_out.keys():
            self._usable = None
        self.left_out = problems
        if problems and self._usable is None:
            self._usable = _without(self.dataset, problems)


def _without(dataset: Dataset, indices: dict[int, str]) -> Dataset:
    usable = dataset.part(index for index in range(dataset.num_examples) if index not in indices)
    if not usable.items:
        raise BadDataset(
            f"none of the {dataset.num_examples} images can be read any more: is their folder there? The first:"
            f" {indices[0]}"
        )
    return usable
