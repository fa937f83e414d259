"""How a training process uses the machine: device, CPU threads and memory."""

from __future__ import annotations

import ctypes

import torch

from federation.errors import BadSettings

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3), malloc.h


def use_threads(count: int) -> None:
    """Compute with `count` CPU threads; 0 leaves it to torch, which takes every core.

    Results are the same bytes for the same count, not across counts: sums are split differently.
    """
    if count:
        torch.set_num_threads(count)


def pick_device(name: str) -> str:
    """torch's name of setting `device`: auto (CUDA if there is any), cpu, cuda or cuda:N. Raises BadSettings."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadSettings(
                f"device is {name}, but torch finds no CUDA here: check the driver, or set it to auto or cpu"
            )
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise BadSettings(f"device is {name}, but there are {count}: take cuda:0 to cuda:{count - 1}")
    return name


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the system.

    Activations of 25 MB and more are otherwise mapped anew in every step, and clearing their pages cost 10 to
    20 % of the training time. Harmless to repeat; on another C library nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(exc: Exception) -> bool:
    """CUDA has a class for it, the allocator of the CPU only words."""
    words = ("not enough memory", "can't allocate memory")
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or any(word in str(exc) for word in words)
