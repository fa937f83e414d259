"""The comparison: every site trains alone, from the same initial model, with as many local steps as it spent
in the federation, one schedule and one optimiser from first to last step."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from cli.demo.data import DemoData
from cli.options import console
from federation.jobs import JobSpec

Arrays = Mapping[str, NDArray[np.generic]]
REPORT_EVERY_STEPS = 5
WORKERS = (os.cpu_count() or 1) + 1
"""One more than cores: sites have different amounts of work, and no core should idle towards the end."""


@dataclass(frozen=True)
class Alone:
    """What a site reaches without the others."""

    steps: int
    metrics: dict[str, float]


def train_alone(
    spec: JobSpec, initial: Mapping[str, NDArray[np.generic]], data: DemoData, steps: dict[str, int]
) -> dict[str, Alone]:
    """By site. `steps`: gradient steps of each."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(WORKERS, mp_context=context) as pool,
        Progress(
            *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        reports = manager.Queue()
        bars = {site: progress.add_task(f"{site} alone", total=steps[site]) for site in data.sites}
        # longest first, so that two processes end at about the same time
        order = sorted(data.sites, key=lambda site: -steps[site])
        futures = {
            site: pool.submit(
                _train, site, spec, initial, data.sites[site], data.images, data.test, steps[site], reports
            )
            for site in order
        }
        while not all(future.done() for future in futures.values()):
            try:
                site, step = reports.get(timeout=0.5)
            except Empty:
                continue
            progress.update(bars[site], completed=step)
        return {site: Alone(steps[site], futures[site].result()) for site in data.sites}


def _train(
    site: str,
    spec: JobSpec,
    initial: Arrays,
    annotations: Path,
    images: Path,
    test: Path,
    steps: int,
    reports: Any,
) -> dict[str, float]:
    from detection import engine
    from detection.dataset import load_dataset
    from detection.evaluate import evaluate
    from detection.threads import use_threads

    use_threads(1)

    def report(done: engine.StepReport) -> None:
        if done.step % REPORT_EVERY_STEPS == 0 or done.step == steps:
            reports.put((site, done.step))

    dataset = load_dataset(annotations, images, spec.classes)
    trained = engine.train(
        spec,
        initial,
        dataset,
        seed=spec.plan.seed,
        progress=(0.0, 1.0),
        steps=steps,
        on_step=report,
    )
    return evaluate(spec, trained.weights, load_dataset(test, images, spec.classes)).metrics
