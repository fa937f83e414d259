"""Is loading the bottleneck? `python -m benchmarks.loading`, from the repository's root. Exits 1 if a target is missed.

Loading   A batch as training takes it, augmented: images decoded and resized from their files (cold), from the cache on
          disk, from the cache in memory. Files come from the system's page cache: what is measured is work, not a disk.
Training  Steps of the small default with its usual batch and augmentation, from images in memory.

All in CPU seconds of one thread, so that other work on the machine does not count, in rounds of one after the other;
the ratio is the median of the rounds' own. 8 x means that loading is eight times as fast as training with images
in memory.
Target: at least 5 from either cache. Cold has none: it happens once for what fits into a cache.

Images are generated scenes, at the size of a small and of a usual street camera, or your own with --data.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from detection import engine
from detection.augment import batch
from detection.cache import DiskCache, MemoryCache
from detection.check import check
from detection.dataset import Dataset, load_dataset
from detection.scenes import render
from detection.threads import use_threads
from detection.weights import Arrays, initial_state
from federation.jobs import JobSpec

SIZES = [(480, 392), (1920, 1080)]
IMAGES_PER_CAMERA = 32
WAYS = ("cold", "disk", "memory")
TARGET = 5.0
ENOUGH_BYTES = 1 << 34


@dataclass(frozen=True)
class Case:
    """The same data set without a cache, with a cache on disk alone, and with one in memory."""

    name: str
    cold: Dataset
    disk: Dataset
    memory: Dataset


def rate(images: int, work: Callable[[], object]) -> float:
    """Images per CPU second."""
    began = time.process_time()
    work()
    return images / (time.process_time() - began)


def make_case(annotations: Path, images: Path | None, folder: Path) -> Case:
    checked = check(annotations, images).require()
    memory = load_dataset(annotations, images, checked.classes, cache=MemoryCache(ENOUGH_BYTES))
    cold = replace(memory, cache=MemoryCache(0))
    disk = replace(cold, disk=DiskCache(folder, ENOUGH_BYTES))
    first = memory.items[0]
    return Case(f"{memory.num_examples} images of {first.width}x{first.height}", cold, disk, memory)


def load_pass(spec: JobSpec, dataset: Dataset) -> None:
    """One pass over the images in the plan's batches."""
    rng, size = np.random.default_rng(0), spec.plan.batch_size
    for first in range(0, dataset.num_examples, size):
        indices = range(first, min(first + size, dataset.num_examples))
        batch(dataset, indices, spec.plan.image_size, rng, spec.plan.augmentation)


def train_steps(spec: JobSpec, weights: Arrays, dataset: Dataset, steps: int) -> None:
    engine.train(spec, weights, dataset, seed=0, progress=(0.0, 0.0), steps=steps)


def measure(case: Case, spec: JobSpec, rounds: int, steps: int) -> dict[str, list[float]]:
    """Images per CPU second in each round: loading in each of the WAYS, and "training"."""
    weights = initial_state(spec)
    for dataset in (case.disk, case.memory):
        load_pass(spec, dataset)
    train_steps(spec, weights, case.memory, 1)
    rates: dict[str, list[float]] = {name: [] for name in (*WAYS, "training")}
    for _ in range(rounds):
        for name, dataset in zip(WAYS, (case.cold, case.disk, case.memory), strict=True):
            rates[name].append(rate(dataset.num_examples, partial(load_pass, spec, dataset)))
        images = steps * spec.plan.batch_size
        rates["training"].append(rate(images, partial(train_steps, spec, weights, case.memory, steps)))
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="annotations of your own (docs/data.md)")
    parser.add_argument("--images", type=Path, help="their images, if not beside them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="training steps a round")
    arguments = parser.parse_args()
    use_threads(1)
    logging.getLogger("fedqueue.data").setLevel(logging.ERROR)  # notes on the data set
    missed = 0
    print(f"images per CPU second, medians of {arguments.rounds} rounds, and as a multiple of training")
    print(f"{'':28}" + "".join(f"{name:>17}" for name in WAYS) + f"{'training':>10}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources: list[tuple[Path, Path | None]] = [(arguments.data, arguments.images)]
        if arguments.data is None:
            drawn = [render(folder / str(size[0]), 0, IMAGES_PER_CAMERA, 0, size) for size in SIZES]
            sources = [(scenes.sites["north"], scenes.images) for scenes in drawn]
        for number, (annotations, images) in enumerate(sources):
            case = make_case(annotations, images, folder / f"cache-{number}")
            spec = JobSpec(id="bench", classes=case.memory.classes)
            rates = measure(case, spec, arguments.rounds, arguments.steps)
            line = f"{case.name:28}"
            for way in WAYS:
                pairs = zip(rates[way], rates["training"], strict=True)
                ratio = statistics.median(loaded / trained for loaded, trained in pairs)
                line += f"{statistics.median(rates[way]):10.0f}{ratio:5.1f} x"
                missed += way != "cold" and ratio < TARGET
            print(f"{line}{statistics.median(rates['training']):10.1f}")
    print("targets met" if not missed else f"{missed} targets MISSED")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
