"""How many CPU threads torch may take on a machine that has other work too."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Let torch compute with `count` threads in this process; 0: as many as it finds right."""
    if count > 0:
        torch.set_num_threads(count)
