"""Detectors by name. Every one keeps torchvision's convention of calling a detector:

    module.train(); losses = module(images, targets)    dict of scalar losses
    module.eval();  found = module(images)              one dict of boxes, labels, scores per image

`images` are float tensors [3, H, W] in 0..1 of any size (or one stacked batch [N, 3, S, S], which skips a
copy); boxes are [M, 4] xyxy in pixels of their own image; labels are 1..C, 0 is background. Inside, every
image is `image_size` x `image_size`.

A name is one of ARCHS (families.py), or of a detector that is not ours and that this machine's operator chose
(federation/plugins.py). Nothing is ever downloaded here. docs/adr/0006 says why the default is what it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detection.families import DEFAULT_ARCH, FAMILIES
from detection.square import SquareTransform
from federation import plugins
from federation.errors import BadJob, BadSettings

__all__ = ["ARCHS", "DEFAULT_ARCH", "build", "known", "unknown"]

ARCHS: tuple[str, ...] = tuple(FAMILIES)


def known(arch: str) -> bool:
    """True if `build` can make it: a built-in, or chosen by this machine's operator."""
    return arch in FAMILIES or arch in plugins.names(plugins.ARCHITECTURES)


def build(arch: str, num_classes: int, image_size: int, *, seed: int = 0) -> nn.Module:
    """A detector of `num_classes` classes (background not counted), the same for the same seed.

    Raises BadJob for an architecture that nobody here knows or chose, or that cannot be made for this size;
    BadSettings for one that was chosen and whose code fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = (
            _built_in(arch, num_classes, image_size)
            if arch in FAMILIES
            else _chosen(arch, num_classes, image_size)
        )
    return module.to(memory_format=torch.channels_last)


def _built_in(arch: str, num_classes: int, image_size: int) -> nn.Module:
    family = FAMILIES[arch]
    if image_size < family.min_image_size:
        raise BadJob(
            f"{arch} needs an image_size of at least {family.min_image_size} pixels, not {image_size}"
        )
    module = family.build(num_classes, image_size)
    own: Any = module.transform
    module.transform = SquareTransform(image_size, list(own.image_mean), list(own.image_std))
    return module


def _chosen(arch: str, num_classes: int, image_size: int) -> nn.Module:
    factory = plugins.find(plugins.ARCHITECTURES, arch)
    if factory is None:
        raise BadJob(unknown(arch))
    try:
        module = factory(num_classes, image_size)
    except Exception as exc:  # whatever somebody else's code does
        raise BadSettings(f"{arch} could not be made: {type(exc).__name__}: {exc}") from exc
    if not isinstance(module, nn.Module):
        raise BadSettings(f"{arch} made a {type(module).__name__}, must make a torch.nn.Module")
    return module


def unknown(arch: str) -> str:
    """What to say of a name that `known` does not know."""
    if plugins.is_path(arch):
        return (
            f"architecture {arch!r} is code that this machine's settings do not list: if you trust it, add it to "
            "FEDQUEUE_PLUGINS (docs/custom-models.md)"
        )
    names = ", ".join([*ARCHS, *plugins.names(plugins.ARCHITECTURES)])
    return f"unknown architecture {arch!r}: use one of {names}, or install the package that brings it"
