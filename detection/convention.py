"""Does a detector that is not ours keep the convention of `detection/registry.py`? Tried before a job is made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from federation.errors import BadJob


def check(module: nn.Module, num_classes: int, image_size: int) -> None:
    """Call it once in training and once in use, on two random images. Raises BadJob saying what is wrong."""
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.2, 0.2, 0.7, 0.7]]) * image_size
    targets = [{"boxes": box, "labels": torch.tensor([num_classes])}] * 2
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            losses = module.train()(images, targets)
            found = module.eval()(images)
    except Exception as exc:  # whatever somebody else's code does
        raise BadJob(f"the architecture fails when it is called: {type(exc).__name__}: {exc}") from exc
    finally:
        module.load_state_dict(kept)  # BatchNorm has counted
    _check_losses(losses)
    check_found(found, len(images))


def _check_losses(losses: object) -> None:
    if not isinstance(losses, dict) or not losses:
        raise BadJob("in training the architecture must return a dict of losses")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim or not torch.isfinite(loss):
            raise BadJob(f"loss {name!r} must be a finite scalar tensor")


def check_found(found: object, images: int) -> None:
    """Raises BadJob if this is no result of a detector for so many images."""
    if not isinstance(found, list) or len(found) != images:
        raise BadJob("in use the architecture must return a list with one dict per image")
    for result in found:
        if not isinstance(result, dict) or not {"boxes", "labels", "scores"} <= result.keys():
            raise BadJob("for each image there must be a dict with boxes, labels and scores")
        count = len(result["scores"])
        shapes = [tuple(result[name].shape) for name in ("boxes", "labels", "scores")]
        if shapes != [(count, 4), (count,), (count,)] or result["labels"].dtype != torch.int64:
            raise BadJob("boxes must be [N, 4], labels int64 [N], scores [N]")
