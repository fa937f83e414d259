"""How busy this computer is, asked of the operating system: some microseconds for each heartbeat.

Linux tells everything, macOS the load and the cores. In a container the figures are those of its host.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from federation.types import Gpu, Machine

PROC = Path("/proc")


class MachineGauge:
    """Reads the figures. `gpu` adds those of the GPU, or None."""

    def __init__(self, gpu: Callable[[], Gpu | None] = lambda: None, proc: Path = PROC) -> None:
        self._gpu, self._proc = gpu, proc
        self._busy_and_all = _cpu_ticks(proc)

    def read(self) -> Machine:
        """As it is now; `cpu` over the time since the last call, at first since this was made."""
        memory = _memory(self._proc)
        return Machine(
            load=_load(),
            cores=os.cpu_count(),
            cpu=self._cpu(),
            memory_used_bytes=memory and memory[0],
            memory_total_bytes=memory and memory[1],
            gpu=self._gpu(),
        )

    def _cpu(self) -> float | None:
        before, now = self._busy_and_all, _cpu_ticks(self._proc)
        self._busy_and_all = now
        if before is None or now is None or now[1] <= before[1]:
            return None
        return min(1.0, max(0.0, (now[0] - before[0]) / (now[1] - before[1])))


def load_per_core() -> float | None:
    """Load average over one minute, per core; None where nobody counts it."""
    return Machine(load=_load(), cores=os.cpu_count()).load_per_core


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows has none
        return None


def _cpu_ticks(proc: Path) -> tuple[int, int] | None:
    """(busy, all) since the start of the system, summed over its CPUs: first line of /proc/stat, proc_stat(5).

    user nice system idle iowait irq softirq steal; what follows is contained in user and nice.
    """
    try:
        with (proc / "stat").open() as lines:
            ticks = [int(word) for word in lines.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(ticks) - ticks[3] - ticks[4], sum(ticks)) if len(ticks) == 8 else None


def _memory(proc: Path) -> tuple[int, int] | None:
    """(used, total) in bytes. Used is what a new program could not have: caches are not."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, ValueError, LookupError):
        return None
    return (max(0, total - available), total) if total > 0 else None
