"""A torch optimiser's moments by the names of their parameters, as updates carry them (federation.layout)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.weights import Arrays
from federation.jobs import TrainingPlan
from federation.layout import MOMENT_SUFFIXES, is_moment, is_statistic

_ADAM = ("exp_avg", "exp_avg_sq")
_SGD = ("momentum_buffer",)


def apart(
    arrays: Mapping[str, NDArray[np.generic]],
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """A module's tensors, and the moments among them."""
    return (
        {name: array for name, array in arrays.items() if not is_moment(name)},
        {name: array for name, array in arrays.items() if is_moment(name)},
    )


def give(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    plan: TrainingPlan,
    moments: Mapping[str, NDArray[np.generic]],
    steps: int,
) -> None:
    """Let a fresh `optimizer` of `module` go on from `moments`, which have seen `steps` gradient steps."""
    for parameter, name in _trained(optimizer, module):
        state: dict[str, Tensor] = {
            key: torch.empty_like(parameter).copy_(torch.tensor(moments[name + suffix]))
            for key, suffix in zip(_keys(plan), MOMENT_SUFFIXES, strict=False)
        }
        if plan.optimizer == "adamw":
            state["step"] = torch.tensor(
                float(steps), device=parameter.device
            )  # where a fused optimiser wants it
        optimizer.state[parameter] = state


def take(optimizer: torch.optim.Optimizer, module: nn.Module, plan: TrainingPlan, trained: Arrays) -> Arrays:
    """The moments of every tensor of `trained` that is merged as a weight; zeros for one without gradient."""
    state = {name: optimizer.state.get(parameter, {}) for parameter, name in _trained(optimizer, module)}
    found: Arrays = {}
    for name, array in trained.items():
        if array.dtype != np.float32 or is_statistic(name):
            continue
        for key, suffix in zip(_keys(plan), MOMENT_SUFFIXES, strict=False):
            moment = state.get(name, {}).get(key)
            found[name + suffix] = (
                np.zeros(array.shape, np.float32)
                if moment is None
                else np.array(moment.detach().cpu().numpy(), order="C")
            )
    return found


def _keys(plan: TrainingPlan) -> tuple[str, ...]:
    """As torch's optimiser names its moments, first and second."""
    return _ADAM if plan.optimizer == "adamw" else _SGD


def _trained(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[tuple[nn.Parameter, str]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [(p, names[p]) for group in optimizer.param_groups for p in group["params"]]
