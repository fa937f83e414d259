"""The Trainer port: all that the agent does not know of training. detection_trainer.py is the one for detectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from federation.jobs import JobSpec


class Trained(Protocol):
    """What training returns."""

    @property
    def weights(self) -> Mapping[str, NDArray[np.generic]]: ...
    @property
    def num_examples(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Progress:
    """Where training is: gradient steps done of how many, and passes over the local images.

    `left_out`: images that training does without because they cannot be read.
    """

    step: int
    steps: int
    epoch: float
    left_out: int = 0


class Trainer(Protocol):
    """Local training for one job."""

    def prepare(self, spec: JobSpec) -> None:
        """Check the local data against the job. Raises BadDataset with every defect, BadJob."""
        ...

    @property
    def num_images(self) -> int:
        """Training images, after `prepare`; the server is told. 0: nobody knows."""
        ...

    def train(
        self,
        spec: JobSpec,
        weights: Mapping[str, NDArray[np.generic]],
        *,
        base_version: int,
        seed: int,
        on_progress: Callable[[Progress], None],
    ) -> Trained:
        """Run the job's plan from `weights`, all tensors of the model. Same arguments, same result on a CPU.

        Raises Rejected or MemoryError if this attempt came to nothing; the agent makes another.
        """
        ...


@runtime_checkable
class KnowsImages(Protocol):
    """What a Trainer may be besides: able to say how much stays at home."""

    @property
    def image_bytes(self) -> int:
        """Size of the image files that it trains on, after `prepare`."""
        ...


TrainerFactory = Callable[[JobSpec], Trainer]
"""One trainer per job: each has its own classes, and so its own view of the site's data. Raises Rejected."""
