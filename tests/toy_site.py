"""A site with a toy trainer: adds one to every weight. Run as a process: python -m tests.toy_site JOB [seconds]."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from broker.open import connect
from cli.options import log_to_stderr, stop_on_signals
from federation.jobs import JobSpec
from federation.settings import Settings
from producers.agent import SiteAgent
from producers.trainer import Progress
from storage.open import open_store


@dataclass(frozen=True)
class ToyTrained:
    weights: dict[str, NDArray[np.generic]]
    num_examples: int = 10
    metrics: dict[str, float] = field(default_factory=lambda: {"loss": 0.5})


@dataclass
class ToyTrainer:
    """`seconds`: how long one training takes. `bases`: the versions that it was started from."""

    seconds: float = 0.0
    bases: list[int] = field(default_factory=list)
    num_images: int = 10
    image_bytes: int = 5_000_000

    def prepare(self, spec: JobSpec) -> None:
        pass

    def train(
        self,
        spec: JobSpec,
        weights: Mapping[str, NDArray[np.generic]],
        *,
        base_version: int,
        seed: int,
        on_progress: Callable[[Progress], None],
    ) -> ToyTrained:
        self.bases.append(base_version)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            on_progress(Progress(0, 1, 0.0))
            time.sleep(0.02)
        on_progress(Progress(1, 1, 1.0))
        return ToyTrained(
            {name: np.asarray(array + np.ones((), array.dtype)) for name, array in weights.items()}
        )


def agent(settings: Settings, job: str, trainer: ToyTrainer, stop: threading.Event) -> SiteAgent:
    return SiteAgent(
        settings, [job], open_store(settings), lambda: connect(settings), lambda spec: trainer, stop
    )


if __name__ == "__main__":
    log_to_stderr()
    toy = ToyTrainer(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    agent(Settings.load(), sys.argv[1], toy, stop_on_signals()).run()
