"""Where a detector's first weights come from, besides the seed: a file, or torchvision's own pretrained ones.

Either is a mapping of names to tensors, and as much of it is taken as fits by name and shape: a whole detector
(whose class predictions stay behind if its classes are others), its backbone, or the classifier that the
backbone was cut from. `Match` says what became of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_weight

from detection.families import FAMILIES, Rename
from federation.errors import BadJob, Transient

COUNTER = "num_batches_tracked"
"""Of BatchNorm: a file may leave it out, and a counter is no weight."""


@dataclass(frozen=True)
class Match:
    """What became of the tensors of a file and of a module.

    loaded: names in the module that were filled. missing: names in the module that were not.
    used, unused: names in the file that found a place or did not; `other_shape` are those that fitted but for that.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    used: tuple[str, ...]
    unused: tuple[str, ...]
    other_shape: tuple[str, ...]

    def report(self) -> list[str]:
        """Numbers and names, a whole layer or part of the model as one name, for people."""
        lines = [
            f"{len(self.loaded)} tensors loaded: {_shortened(self.loaded, self.missing)}",
            f"{len(self.missing)} missing, so random: {_shortened(self.missing, self.loaded)}",
            f"{len(self.unused)} of the file unused: {_shortened(self.unused, self.used)}",
        ]
        if self.other_shape:
            lines.append(f"unused because of their shape (other classes?): {', '.join(self.other_shape)}")
        return lines


def fill(module: nn.Module, stored: Mapping[str, Any], rename: Rename | None = None) -> Match:
    """Copy tensors or arrays of `stored` into `module` where name and shape agree.

    A name may be the module's own, with or without "backbone." or "backbone.body." before it, or that of a
    classifier's tensor, which `rename` translates. Raises BadJob if nothing fits.
    """
    own = module.state_dict()
    loaded: dict[str, Tensor] = {}
    used: list[str] = []
    unused: list[str] = []
    other_shape: list[str] = []
    for name, value in stored.items():
        target = next((candidate for candidate in _candidates(name, rename) if candidate in own), None)
        tensor = torch.tensor(value) if not isinstance(value, Tensor) else value
        if target is not None and _fits(own[target], tensor):
            loaded[target] = tensor
            used.append(name)
            continue
        unused.append(name)
        if target is not None:
            other_shape.append(name)
    if not any(not name.endswith(COUNTER) for name in loaded):
        raise BadJob("no tensor fits this architecture, by name and shape")
    module.load_state_dict(loaded, strict=False)
    missing = [name for name in own if name not in loaded and not name.endswith(COUNTER)]
    return Match(tuple(loaded), tuple(missing), tuple(used), tuple(unused), tuple(other_shape))


def _candidates(name: str, rename: Rename | None) -> Iterator[str]:
    bare = name.removeprefix("module.")  # as torch's DataParallel saves it
    yield bare
    if rename is not None:
        yield rename(bare)
    yield f"backbone.{bare}"
    yield f"backbone.body.{bare.removeprefix('backbone.')}"


def _fits(own: Tensor, stored: Tensor) -> bool:
    return own.shape == stored.shape and own.is_floating_point() == stored.is_floating_point()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A .pth file: a state dict, or a checkpoint with one as "model" or "state_dict". Raises BadJob.

    Read with weights_only, so a hostile file cannot run code.
    """
    try:
        stored: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch's older format is a bare pickle, whose reader fails in any way
        raise BadJob(f"{path}: not a weights file that torch can load safely: {exc}") from exc
    for key in ("model", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        raise BadJob(f"{path}: must hold a state dict, names to tensors")
    return {str(name): tensor for name, tensor in stored.items()}


def torchvision_weights(arch: str, name: str) -> WeightsEnum:
    """One of torchvision's pretrained weights: `ResNet50_Weights.IMAGENET1K_V2`, or, where they are the
    architecture's own or its backbone's, `COCO_V1` alone. Raises BadJob.
    """
    family = FAMILIES.get(arch)
    own = family.pretrained() if family else []
    for member in own:
        if member.name == name:
            return member
    try:
        found: WeightsEnum = get_weight(name)
    except (ValueError, AttributeError, KeyError) as exc:
        offered = ", ".join(str(member) for member in own) or "ClassName_Weights.MEMBER"
        raise BadJob(
            f"{name!r} is no file, and torchvision has no weights of this name: for {arch} it has {offered}"
        ) from exc
    return found


def download(weights: WeightsEnum) -> dict[str, Tensor]:
    """torchvision's file, from its cache if it lies there. Raises Transient if it cannot be had."""
    try:
        stored: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as exc:
        raise Transient(
            f"{weights} could not be downloaded ({exc}): fetch {weights.url} where there is internet, and give "
            "the file with --weights FILE"
        ) from exc
    return stored


def _shortened(names: Iterable[str], others: Iterable[str]) -> str:
    """`names`, with a prefix and its count for all below it where none of `others` is below it, too."""
    foreign = {prefix for name in others for prefix in _prefixes(name)}
    groups: dict[str, int] = {}
    for name in names:
        group = next((prefix for prefix in _prefixes(name) if prefix not in foreign), name)
        groups[group] = groups.get(group, 0) + 1
    shown = (group if count == 1 else f"{group}.* ({count})" for group, count in groups.items())
    return ", ".join(shown) or "none"


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
