"""How a training process uses the machine: CPU threads and memory."""

from __future__ import annotations

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3), malloc.h


def use_threads(count: int) -> None:
    """Compute with `count` CPU threads; 0 leaves it to torch, which takes every core.

    Results are the same bytes for the same count, not across counts: sums are split differently.
    """
    if count:
        torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the system.

    Activations of 25 MB and more are otherwise mapped anew in every step, and clearing their pages cost 10 to
    20 % of the training time. Harmless to repeat; on another C library nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
