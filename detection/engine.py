"""Local training: from a model version to a client update, and nothing of the images leaves.

Every call starts a fresh optimiser from the weights it is given, because between two updates of a site the
global model has moved and old moments point elsewhere. On the CPU the result is a pure function of
(spec, weights, dataset, seed, progress): the same bytes every time on the same machine and thread count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detection.augment import batch
from detection.dataset import Dataset
from detection.threads import keep_freed_memory
from detection.weights import Arrays, load_state, module_for, state
from federation.errors import BadDataset, BadJob, Rejected
from federation.jobs import JobSpec, TrainingPlan

BETAS = (0.9, 0.99)
"""An update is some tens of steps long: a second moment over 1,000 steps would never settle."""


class Diverged(Rejected):
    """Training left the finite numbers; there is no update."""

    reason = "diverged"


@dataclass(frozen=True)
class StepReport:
    """One gradient step, just finished. `epoch`: passes over the local images since this call began."""

    step: int
    steps: int
    loss: float
    epoch: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished local training: the full state, the images behind it, and how it went."""

    weights: Arrays
    num_examples: int
    metrics: dict[str, float]


def train(
    spec: JobSpec,
    weights: Mapping[str, NDArray[np.generic]],
    dataset: Dataset,
    *,
    seed: int,
    progress: float,
    progress_per_step: float,
    steps: int | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    duty: float = 1.0,
) -> Trained:
    """Run the job's plan on local images from the full state `weights`, which is not changed.

    seed: of shuffling, augmentation and sampling; give every update its own.
    progress: how far the job is, 0..1 (base_version / max_versions), for the learning-rate schedule;
        each step moves it on by `progress_per_step`.
    steps: gradient steps; default `spec.plan.local_steps`.
    duty: share of the time, 0 < duty ≤ 1, that may be computed; after each step the rest is slept.

    Raises Diverged when the loss or a weight is no longer finite, BadPayload if `weights` are not this
    architecture's, BadDataset if the data set has other classes than the job or a file cannot be read any
    more. An exception from `on_step` ends training and reaches the caller.
    """
    if tuple(dataset.classes) != tuple(spec.classes):
        raise BadDataset(f"the data set was read for classes {dataset.classes}, the job has {spec.classes}")
    if not 0 < duty <= 1:
        raise ValueError(f"duty must be in (0, 1], is {duty}")
    plan = spec.plan
    total = plan.local_steps if steps is None else steps
    keep_freed_memory()
    module = module_for(spec)
    load_state(module, weights)
    began = time.perf_counter()
    # the samplers of Faster R-CNN draw from torch's global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        losses = _train_steps(
            module,
            dataset,
            plan,
            total,
            np.random.default_rng(seed),
            lambda step: learning_rate(plan, step, progress + step * progress_per_step),
            on_step,
            duty,
        )
    trained = state(module)
    if not all(np.isfinite(array).all() for array in trained.values()):
        raise Diverged(f"a weight is not finite after {total} steps: lower the plan's learning_rate")
    metrics = {
        "loss": float(np.mean(losses[-10:])) if losses else 0.0,
        "steps": float(total),
        "epochs": total * plan.batch_size / dataset.num_examples,
        "seconds": time.perf_counter() - began,
    }
    return Trained(trained, dataset.num_examples, metrics)


def learning_rate(plan: TrainingPlan, step: int, progress: float) -> float:
    """Linear warm-up over the update's first steps, times a cosine over the job's progress (0..1).

    The cosine ends at `final_learning_rate_fraction` of the peak (Loshchilov, Hutter 2017, arXiv 1608.03983).
    """
    warmup = min(1.0, (step + 1) / (plan.warmup_steps + 1))
    if plan.schedule == "constant":
        return plan.learning_rate * warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    floor = plan.final_learning_rate_fraction
    return plan.learning_rate * warmup * (floor + (1 - floor) * cosine)


def _train_steps(
    module: nn.Module,
    dataset: Dataset,
    plan: TrainingPlan,
    steps: int,
    rng: np.random.Generator,
    rate: Callable[[int], float],
    on_step: Callable[[StepReport], None] | None,
    duty: float,
) -> list[float]:
    """Gradient steps in place on `module`; the loss of each."""
    module.train()
    if plan.norm == "frozen":
        _freeze_batch_norm(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, plan)
    indices = _sample(dataset.num_examples, plan.batch_size, rng)
    losses: list[float] = []
    for step in range(steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        images, targets = batch(dataset, next(indices), plan.image_size, rng, plan.augmentation)
        loss = _forward(module, images, targets, plan)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the loss became {value} at step {step + 1} of {steps} (learning rate {rate(step):.2g}):"
                " lower the plan's learning_rate or lengthen warmup_steps"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, plan.gradient_norm_limit)
        optimizer.step()
        losses.append(value)
        if duty < 1:
            time.sleep((time.perf_counter() - began) * (1 / duty - 1))
        if on_step is not None:
            on_step(StepReport(step + 1, steps, value, (step + 1) * plan.batch_size / dataset.num_examples))
    return losses


def _forward(
    module: nn.Module, images: torch.Tensor, targets: list[dict[str, torch.Tensor]], plan: TrainingPlan
) -> torch.Tensor:
    try:
        losses: dict[str, torch.Tensor] = module(images, targets)
    except ValueError as exc:
        # BatchNorm has no statistics of one value: the last maps of SSDlite are 1x1
        if plan.batch_size == 1 and "more than 1 value per channel" in str(exc):
            raise BadJob("this architecture cannot train with batch_size 1: use 2 or more") from exc
        raise
    return torch.stack(list(losses.values())).sum()


def _optimizer(parameters: list[nn.Parameter], plan: TrainingPlan) -> torch.optim.Optimizer:
    """AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101); decay on matrices and kernels only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS, fused=True)


def _sample(count: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Endless batches of `size` indices from shuffled passes, so that a small site too has full batches."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(count).tolist()
        yield waiting[:size]
        del waiting[:size]


def _freeze_batch_norm(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
