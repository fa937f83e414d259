"""Between torch modules and named numpy arrays, the form in which models are stored and merged.

A *full* state holds every tensor of the detector. What sites exchange may be less: a job whose norm policy is
`local` or `frozen` leaves BatchNorm layers out whole, statistics, counters and affine parameters, and layers of its
plan's `freeze` are left out, too. So its version files hold the rest and `job.initial` holds all.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detection.families import FAMILIES
from detection.initial import Match, fill, read_state_dict
from detection.registry import build
from federation.errors import BadJob, BadPayload
from federation.jobs import JobSpec, TrainingPlan

Arrays = dict[str, NDArray[np.float32] | NDArray[np.int64]]


def state(module: nn.Module) -> Arrays:
    """Every parameter and buffer, copied: float32 or int64, C-contiguous, by name.

    Raises BadPayload if the module holds a tensor of another type, which the protocol does not carry.
    """
    arrays: Arrays = {}
    for name, tensor in module.state_dict().items():
        if tensor.dtype not in (torch.float32, torch.int64):
            raise BadPayload(f"tensor {name!r} is {tensor.dtype}: only float32 and int64 are exchanged")
        # a copy in C order: the module goes on training, and its kernels lie channels-last
        arrays[name] = np.array(tensor.detach().cpu().numpy(), order="C")
    return arrays


def load_state(module: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy a full state into `module`. Raises BadPayload naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in own.keys() - arrays.keys():
        raise BadPayload(f"tensor {name!r} is missing: a full state is needed")
    for name, array in arrays.items():
        if name not in own:
            raise BadPayload(f"tensor {name!r} is not part of this architecture")
        if tuple(own[name].shape) != array.shape:
            raise BadPayload(f"tensor {name!r} has shape {array.shape}, must have {tuple(own[name].shape)}")
        wanted = np.float32 if own[name].dtype == torch.float32 else np.int64
        if array.dtype != wanted:
            raise BadPayload(f"tensor {name!r} is {array.dtype}, must be {np.dtype(wanted).name}")
    # torch warns about read-only arrays, which memory-mapped files are; load_state_dict copies anyway
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})


def batch_norm_names(module: nn.Module) -> frozenset[str]:
    """Names of all tensors that belong to BatchNorm layers."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        for name in layer.state_dict()
    )


def exchanged_names(module: nn.Module, plan: TrainingPlan) -> list[str]:
    """Names of the tensors that a site sends and receives, sorted.

    Norm policy `average`: all. `local` (FedBN, Li et al. 2021, arXiv 2102.07623) and `frozen`: all but
    BatchNorm's. In each case without the layers of `plan.freeze`. Raises BadJob if one of these is none of the
    module's, or nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    for layer in plan.freeze:
        only = plan.model_copy(update={"freeze": (layer,)})
        if not any(only.freezes(name) for name in parameters):
            raise BadJob(f"plan.freeze: {layer!r} is no layer with weights: {_suggest(module, layer)}")
    kept_home = frozenset() if plan.norm == "average" else batch_norm_names(module)
    exchanged = {name for name in module.state_dict() if name not in kept_home and not plan.freezes(name)}
    if not exchanged & parameters.keys():
        raise BadJob("plan.freeze and plan.norm leave nothing to train together: freeze fewer layers")
    return sorted(exchanged)


def _suggest(module: nn.Module, layer: str) -> str:
    names = [name for name, _ in module.named_modules() if name]
    close = get_close_matches(layer, names, n=3) or [name for name in names if name.count(".") == 0]
    return f"is one of {', '.join(close)} meant?"


def module_for(spec: JobSpec) -> nn.Module:
    """The job's detector, initialised from the plan's seed. Raises BadJob, BadSettings as `registry.build`."""
    return build(spec.arch, len(spec.classes), spec.plan.image_size, seed=spec.plan.seed)


def initial_weights(spec: JobSpec, stored: Mapping[str, Any] | None) -> tuple[Arrays, Match | None]:
    """The full state that a job starts from, and what became of `stored`, tensors or arrays by name.

    The same bytes for the same spec, tensors and torch build. Raises BadJob if nothing of `stored` fits,
    BadPayload if the architecture has tensors that the protocol does not carry.
    """
    module = module_for(spec)
    family = FAMILIES.get(spec.arch)
    match = None if stored is None else fill(module, stored, family.from_classifier if family else None)
    return state(module), match


def initial_state(spec: JobSpec, pretrained: Path | None = None) -> Arrays:
    """`initial_weights` from a .pth file, or from the seed alone."""
    return initial_weights(spec, None if pretrained is None else read_state_dict(pretrained))[0]
