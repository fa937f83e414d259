"""What the GPU is and how full its memory is, for a site's heartbeats."""

from __future__ import annotations

import sys

from federation.types import Gpu


def gpu_figures(device: str) -> Gpu | None:
    """Of the GPU that setting `device` means. None if it means none, if there is none, or if it does not answer.

    In a process that has not loaded torch nothing computes on a GPU: there it is not asked, which would load it. The
    first call makes the process's CUDA context, as the first training would.
    """
    if device == "cpu" or "torch" not in sys.modules:
        return None
    import torch

    where = torch.device("cuda" if device == "auto" else device)
    try:
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info(where)
        name = torch.cuda.get_device_name(where)
    except (RuntimeError, AssertionError):  # no such device, or CUDA fails: training will say so
        return None
    return Gpu(name=name[:64], memory_used_bytes=total - free, memory_total_bytes=total)
