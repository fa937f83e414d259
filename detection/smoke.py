"""Does a model work at all? One image of noise goes through it, and every number on the way is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.convention import check_found
from detection.export import noise
from detection.threads import is_out_of_memory
from detection.weights import load_state, module_for
from federation.errors import BadPayload, BadSettings
from federation.jobs import JobSpec


def smoke_test(spec: JobSpec, weights: Mapping[str, NDArray[np.generic]]) -> int:
    """Run the detector with the full state `weights` on the CPU. Returns how many objects it finds.

    A detector leaves out what has no score, so numbers that overflow would look like an empty image: the outputs of
    all layers with weights are looked at, too. Raises BadPayload for weights that do not fit, or a layer whose output
    is not finite, or results that are none; BadJob, BadSettings as `registry.build`, and if memory is short.
    """
    module = module_for(spec).eval()
    load_state(module, weights)
    for name, layer in module.named_modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_hook(_watch(name))
    try:
        with torch.inference_mode():
            found = module(noise(1, spec.plan.image_size))
    except BadPayload:
        raise
    except Exception as exc:  # whatever somebody else's code does
        if is_out_of_memory(exc):
            raise BadSettings("this machine has too little memory for one image") from exc
        raise BadPayload(f"the model fails when it is called: {type(exc).__name__}: {exc}") from exc
    check_found(found, 1)
    (result,) = found
    for name in ("boxes", "scores"):
        if not torch.isfinite(result[name]).all():
            raise BadPayload(f"the model finds {name} that are not finite", "not-finite")
    return len(result["scores"])


def _watch(name: str) -> Any:
    def look(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
            raise BadPayload(f"layer {name} turns one image of noise into NaN or infinity", "not-finite")

    return look
