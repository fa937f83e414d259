"""How large and how fast an architecture is on this machine: what `fedqueue model archs` shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from detection.engine import to_device
from detection.registry import ARCHS, build
from detection.threads import is_out_of_memory, keep_freed_memory
from detection.weights import Arrays
from federation.errors import BadJob

BOXES = 4
"""Per image: as many as a street camera sees."""


@dataclass(frozen=True)
class Speed:
    """Images per second."""

    training: float
    inference: float


def outline(arch: str, num_classes: int, image_size: int) -> tuple[int, Arrays]:
    """Number of parameters, and every tensor of an update as zeros that take no memory. Raises BadJob, BadSettings."""
    with torch.device("meta" if arch in ARCHS else "cpu"):
        module = build(arch, num_classes, image_size)
    types = {torch.float32: np.float32, torch.int64: np.int64}
    arrays: Arrays = {}
    for name, tensor in module.state_dict().items():
        if tensor.dtype not in types:
            raise BadJob(f"tensor {name!r} is {tensor.dtype}: only float32 and int64 are exchanged")
        arrays[name] = np.broadcast_to(np.zeros((), types[tensor.dtype]), tuple(tensor.shape))
    return sum(p.numel() for p in module.parameters()), arrays


def measure(
    arch: str,
    num_classes: int,
    image_size: int,
    batch_size: int,
    seconds: float,
    on_step: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> Speed:
    """Train and detect on random images for `seconds` each, at least one step after one that is not counted.

    A training step is forward, backward and AdamW, without reading images. Raises BadJob, also if the memory is not
    enough.
    """
    try:
        return _measure(arch, num_classes, image_size, batch_size, seconds, on_step, device)
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
    raise BadJob(f"the memory is not enough for batches of {batch_size} images of {image_size} pixels")


def _measure(
    arch: str,
    num_classes: int,
    image_size: int,
    batch_size: int,
    seconds: float,
    on_step: Callable[[], None],
    device: str,
) -> Speed:
    keep_freed_memory()
    module = build(arch, num_classes, image_size).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, image_size, image_size, generator=generator)
    targets = [_target(num_classes, image_size, generator) for _ in range(batch_size)]
    images, targets = to_device(images, targets, torch.device(device))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def finish() -> None:
        if images.is_cuda:
            torch.cuda.synchronize()  # a step is over when it is computed, not when it is queued
        on_step()

    def train() -> None:
        losses = module(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        finish()

    def detect() -> None:
        with torch.inference_mode():
            module(images)
        finish()

    return Speed(
        batch_size * _per_second(module.train(), train, seconds),
        batch_size * _per_second(module.eval(), detect, seconds),
    )


def _per_second(module: nn.Module, step: Callable[[], None], seconds: float) -> float:
    step()
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not steps:
        step()
        steps += 1
    return steps / elapsed


def _target(num_classes: int, image_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    corners = torch.rand(BOXES, 2, generator=generator) * 0.7
    boxes = torch.cat([corners, corners + 0.1 + 0.2 * torch.rand(BOXES, 2, generator=generator)], dim=1)
    return {
        "boxes": boxes * image_size,
        "labels": torch.randint(1, num_classes + 1, (BOXES,), generator=generator),
    }
