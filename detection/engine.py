"""Local training: from a model version to a client update, and nothing of the images leaves.

Every call starts from the weights that it is given, with a fresh optimiser, with the moments that the site's last
call ended with, or with those of the version, which lie among the weights (federation.layout). On the CPU the result
is a pure function of (spec, weights, dataset, seed, progress, optimizer_state, steps_before): the same bytes every time
on the same machine and thread count. A GPU promises less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detection import moments
from detection.augment import Target, batch
from detection.dataset import Dataset
from detection.threads import is_out_of_memory, keep_freed_memory
from detection.weights import Arrays, load_state, module_for, state
from federation.errors import BadDataset, BadJob, Rejected
from federation.jobs import OBJECTS, JobSpec, TrainingPlan

BETAS = (0.9, 0.99)
"""An update is some tens of steps long: a second moment over 1,000 steps would never settle."""
LOSS_SCALE = 2.0**10
"""Of fp16 at the start of an update. torch's own 2^16 takes several steps, which are skipped, to come down."""


class Diverged(Rejected):
    """Training left the finite numbers; there is no update."""

    reason = "diverged"


class OutOfMemory(Rejected):
    """Training needs more memory than this machine has; there is no update."""

    reason = "out-of-memory"


OptimizerState = dict[int, dict[str, Any]]
"""Moments by number of parameter, as `torch.optim.Optimizer.state_dict` has them."""


@dataclass(frozen=True)
class StepReport:
    """One gradient step, just finished. `epoch`: passes over the local images since this call began."""

    step: int
    steps: int
    loss: float
    epoch: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished local training: the full state, with moments if the plan shares them, and how it went."""

    weights: Arrays
    num_examples: int
    metrics: dict[str, float]
    optimizer_state: OptimizerState
    """Of the parameters that were trained, in their order. For the next update of this site, if the plan keeps it."""


def train(
    spec: JobSpec,
    weights: Mapping[str, NDArray[np.generic]],
    dataset: Dataset,
    *,
    seed: int,
    progress: tuple[float, float],
    steps: int | None = None,
    optimizer_state: OptimizerState | None = None,
    steps_before: int = 0,
    on_step: Callable[[StepReport], None] | None = None,
    duty: float = 1.0,
    device: torch.device | str = "cpu",
) -> Trained:
    """Run the job's plan on local images from the full state `weights`, which is not changed.

    seed: of shuffling, augmentation and sampling; give every update its own.
    progress: how far the job is, 0..1, at the first step and after the last (`JobSpec.progress`), for the
        learning-rate schedule.
    steps: gradient steps; default what the plan says for so many images.
    optimizer_state: what an earlier training of this job returned; there is no warm-up then. None: a fresh one, or if
        the plan shares moments, those among `weights`.
    steps_before: gradient steps that shared moments have seen, for Adam's correction of their beginning at 0.
    duty: share of the time, 0 < duty ≤ 1, that may be computed; after each step the rest is slept.

    Raises Diverged when the loss or a weight is no longer finite, OutOfMemory, BadPayload if `weights` are not
    this architecture's, BadDataset if the data set has other classes than the job or a file cannot be read any
    more. An exception from `on_step` ends training and reaches the caller.
    """
    if tuple(dataset.classes) != tuple(spec.classes):
        raise BadDataset(f"the data set was read for classes {dataset.classes}, the job has {spec.classes}")
    if not 0 < duty <= 1:
        raise ValueError(f"duty must be in (0, 1], is {duty}")
    total = spec.plan.steps_for(dataset.num_examples) if steps is None else steps
    where = torch.device(device)
    try:
        return _train(
            spec, weights, dataset, seed, progress, total, optimizer_state, steps_before, on_step, duty, where
        )
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
    # Raised out here: the exception above holds every tensor of the step until it is forgotten.
    if where.type == "cuda":
        torch.cuda.empty_cache()
    raise OutOfMemory(
        f"the memory of this {'GPU' if where.type == 'cuda' else 'machine'} is not enough: end other programs, or"
        f" lower the plan's batch_size ({spec.plan.batch_size}) or image_size ({spec.plan.image_size})"
    )


def _train(
    spec: JobSpec,
    weights: Mapping[str, NDArray[np.generic]],
    dataset: Dataset,
    seed: int,
    progress: tuple[float, float],
    steps: int,
    optimizer_state: OptimizerState | None,
    steps_before: int,
    on_step: Callable[[StepReport], None] | None,
    duty: float,
    device: torch.device,
) -> Trained:
    plan = spec.plan
    keep_freed_memory()
    module = module_for(spec)
    tensors, shared = moments.apart(weights)
    load_state(module, tensors)
    module.to(device)
    began = time.perf_counter()
    start, end = progress

    def rate(step: int) -> float:
        warmed_up = plan.warmup_steps if shared or optimizer_state is not None else 0
        return learning_rate(plan, warmed_up + step, start + (end - start) * step / steps)

    # the samplers of Faster R-CNN draw from torch's global generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        module.train()
        freeze(module, plan, fixed_norm=plan.norm_fixed_from <= start < 1)
        optimizer = _optimizer([p for p in module.parameters() if p.requires_grad], plan, optimizer_state)
        if shared:
            moments.give(optimizer, module, plan, shared, steps_before)
        losses, objects = _train_steps(
            module, optimizer, dataset, plan, steps, rng, rate, on_step, duty, device
        )
    trained = state(module)
    if not all(np.isfinite(array).all() for array in trained.values()):
        raise Diverged(f"a weight is not finite after {steps} steps: lower the plan's learning_rate")
    if plan.shared_moments:
        trained |= moments.take(optimizer, module, plan, trained)
    metrics = {
        "loss": float(np.mean(losses[-10:])) if losses else 0.0,
        "steps": float(steps),
        OBJECTS: float(objects),
        "epochs": steps * plan.batch_size / dataset.num_examples,
        "seconds": time.perf_counter() - began,
    }
    return Trained(trained, dataset.num_examples, metrics, optimizer.state_dict()["state"])


def learning_rate(plan: TrainingPlan, step: int, progress: float) -> float:
    """Linear warm-up over the update's first steps, times a schedule over the job's progress (0..1).

    Cosine (Loshchilov, Hutter 2017, arXiv 1608.03983) and linear end at `final_learning_rate_fraction` of the peak.
    """
    warmup = min(1.0, (step + 1) / (plan.warmup_steps + 1))
    done = min(1.0, max(0.0, progress))
    falling = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[
        plan.schedule
    ]
    floor = plan.final_learning_rate_fraction
    return plan.learning_rate * warmup * (floor + (1 - floor) * falling)


def _train_steps(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    plan: TrainingPlan,
    steps: int,
    rng: np.random.Generator,
    rate: Callable[[int], float],
    on_step: Callable[[StepReport], None] | None,
    duty: float,
    device: torch.device,
) -> tuple[list[float], int]:
    """Gradient steps in place on `module`: the loss of each, without the proximal term, and the objects seen."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    base = [p.detach().clone() for p in parameters] if plan.proximal_mu else []
    precision, scaler = _mixed_precision(plan, device)
    indices = _sample(dataset.num_examples, plan.batch_size, rng)
    losses: list[float] = []
    objects = 0
    for step in range(steps):
        began, lr = time.perf_counter(), rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, targets = batch(dataset, next(indices), plan.image_size, rng, plan.augmentation)
        with precision:
            loss = _forward(module, *to_device(images, targets, device), plan)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"the loss became {value} at step {step + 1} of {steps} (learning rate {lr:.2g}):"
                " lower the plan's learning_rate or lengthen warmup_steps"
            )
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        if plan.proximal_mu:
            add_proximal_gradient(parameters, base, plan.proximal_mu)
        nn.utils.clip_grad_norm_(parameters, plan.gradient_norm_limit)
        scaler.step(optimizer)
        scaler.update()
        losses.append(value)
        objects += sum(len(target["labels"]) for target in targets)
        if duty < 1:
            time.sleep((time.perf_counter() - began) * (1 / duty - 1))
        if on_step is not None:
            on_step(StepReport(step + 1, steps, value, (step + 1) * plan.batch_size / dataset.num_examples))
    return losses, objects


def to_device(images: Tensor, targets: list[Target], device: torch.device) -> tuple[Tensor, list[Target]]:
    """A batch where the module is."""
    return images.to(device), [{name: value.to(device) for name, value in t.items()} for t in targets]


def _forward(module: nn.Module, images: Tensor, targets: list[Target], plan: TrainingPlan) -> Tensor:
    try:
        losses: dict[str, Tensor] = module(images, targets)
    except ValueError as exc:
        # BatchNorm has no statistics of one value: the last maps of SSDlite are 1x1
        if plan.batch_size == 1 and "more than 1 value per channel" in str(exc):
            raise BadJob("this architecture cannot train with batch_size 1: use 2 or more") from exc
        raise
    return torch.stack(list(losses.values())).sum()


@torch.no_grad()
def add_proximal_gradient(parameters: list[nn.Parameter], base: list[Tensor], mu: float) -> None:
    """Add the gradient of (μ/2)·|w - w_base|² to that of the loss. FedProx: Li et al. 2020, arXiv 1812.06127, eq. 2."""
    for parameter, start in zip(parameters, base, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start, alpha=mu)


def _optimizer(
    parameters: list[nn.Parameter], plan: TrainingPlan, state: OptimizerState | None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov, Hutter 2019, arXiv 1711.05101) or SGD; decay on matrices and kernels only.

    It goes on from a copy of `state`, so that an attempt that is dropped leaves no trace.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if plan.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS, fused=True)
    else:
        # not fused: on the CPU that kernel takes the step even if the scaler found infinity
        optimizer = torch.optim.SGD(
            groups, lr=plan.learning_rate, momentum=plan.momentum, nesterov=plan.nesterov
        )
    if state is not None:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": deepcopy(state)})
    return optimizer


def _mixed_precision(
    plan: TrainingPlan, device: torch.device
) -> tuple[AbstractContextManager[object], torch.amp.GradScaler]:
    """How the forward pass is computed, and how the loss is scaled: on the CPU both do nothing.

    fp16 needs the scaling, bf16 has float32's range. Micikevicius et al. 2018, arXiv 1710.03740.
    """
    used = plan.mixed_precision if device.type == "cuda" else "off"
    dtype = torch.float16 if used == "fp16" else torch.bfloat16
    autocast = nullcontext() if used == "off" else torch.autocast(device.type, dtype)
    return autocast, torch.amp.GradScaler(device.type, LOSS_SCALE, enabled=used == "fp16")


def _sample(count: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Endless batches of `size` indices from shuffled passes, so that a small site too has full batches."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(count).tolist()
        yield waiting[:size]
        del waiting[:size]


def freeze(module: nn.Module, plan: TrainingPlan, *, fixed_norm: bool = False) -> None:
    """Hold what the plan does not train: parameters get no gradient, and BatchNorm there counts no statistics.

    No gradient flows back into layers before which everything is frozen, which saves their backward pass.
    fixed_norm: BatchNorm layers go by the running statistics that they have, and their parameters are trained.
    """
    for name, parameter in module.named_parameters():
        if plan.freezes(name):
            parameter.requires_grad_(False)
    for name, layer in module.named_modules():
        if plan.freezes(name):
            layer.eval()
        elif plan.norm == "frozen" and isinstance(layer, _BatchNorm):
            layer.eval().requires_grad_(False)
        elif fixed_norm and isinstance(layer, _BatchNorm):
            layer.eval()
