"""How busy a site's computer is: read from what an operating system says, and from one that says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from detection.gpu import gpu_figures
from federation.types import Gpu, Machine, SiteStatus
from federation.wire import MAX_BODY_BYTES, encode_heartbeat
from producers.machine import MachineGauge

GIB = 1 << 30
MEMINFO = (
    f"MemTotal: {16 * 1024**2} kB\nMemFree: 1000 kB\nMemAvailable: {12 * 1024**2} kB\nHugePages_Total: 0\n"
)


def write_stat(proc: Path, *ticks: int) -> None:
    (proc / "stat").write_text("cpu  " + " ".join(map(str, ticks)) + "\ncpu0 1 2 3\n")


def test_cpu_is_the_share_since_the_last_reading(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    # user nice system idle iowait irq softirq steal guest guest_nice
    write_stat(tmp_path, 100, 0, 0, 900, 0, 0, 0, 0, 50, 0)
    gauge = MachineGauge(proc=tmp_path)
    write_stat(tmp_path, 120, 5, 3, 950, 20, 1, 0, 1, 70, 0)  # 30 of 100 busy; guests are within user
    assert gauge.read().cpu == pytest.approx(0.30)
    write_stat(tmp_path, 130, 5, 3, 950, 20, 1, 0, 1, 80, 0)
    assert gauge.read().cpu == 1.0
    assert gauge.read().cpu is None  # no time has passed


def test_memory_is_what_a_new_program_could_not_have(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    machine = MachineGauge(proc=tmp_path).read()
    assert (machine.memory_used_bytes, machine.memory_total_bytes) == (4 * GIB, 16 * GIB)


@pytest.mark.parametrize("said", [None, "", "cpu x\n", "MemTotal: 5 kB\n", "MemTotal:\n", "cpu  1 2 3\n"])
def test_a_system_that_says_something_else_costs_the_figures_alone(tmp_path: Path, said: str | None) -> None:
    if said is not None:
        (tmp_path / "meminfo").write_text(said)
        (tmp_path / "stat").write_text(said)
    machine = MachineGauge(proc=tmp_path).read()
    assert (machine.cpu, machine.memory_used_bytes, machine.memory_total_bytes) == (None, None, None)
    assert machine.cores == os.cpu_count()


def test_this_computer_says_what_is_possible() -> None:
    gpu = Gpu(name="made up", memory_used_bytes=1, memory_total_bytes=2)
    machine = MachineGauge(gpu=lambda: gpu).read()
    assert machine.gpu == gpu
    assert machine.load is not None
    assert machine.load_per_core == machine.load / (os.cpu_count() or 0)
    assert machine.memory_used_bytes is not None
    assert machine.memory_total_bytes is not None
    assert 0 < machine.memory_used_bytes < machine.memory_total_bytes


def test_load_per_core_needs_both() -> None:
    assert Machine(load=3.0, cores=4).load_per_core == 0.75
    assert Machine(load=3.0).load_per_core is None
    assert Machine(cores=4).load_per_core is None


def test_the_gpu_is_asked_only_where_torch_is_loaded() -> None:
    code = "import sys; from detection.gpu import gpu_figures; print(gpu_figures('auto'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]


def test_gpu_figures_are_there_if_there_is_a_gpu() -> None:
    import torch

    assert gpu_figures("cpu") is None
    figures = gpu_figures("auto")
    if torch.cuda.is_available():
        assert figures is not None
        assert 0 < figures.memory_used_bytes < figures.memory_total_bytes
    else:
        assert figures is None


def test_the_fullest_heartbeat_fits_into_a_message() -> None:
    gpu = Gpu(name="€" * 64, memory_used_bytes=2**60, memory_total_bytes=2**60)
    machine = Machine(
        load=1e5 / 3, cores=2**20, cpu=1 / 3, memory_used_bytes=2**60, memory_total_bytes=2**60, gpu=gpu
    )
    at, words = datetime.now(UTC), "€" * 200
    status = SiteStatus(
        site="s" * 63,
        state="evaluating",
        job="j" * 63,
        base_version=10**9,
        step=2**60,
        steps=2**60,
        epoch=1e9 / 3,
        outbox=2**60,
        updates=2**60,
        detail=words,
        dropped=2**60,
        problem=words,
        problem_at=at,
        agent_version="€" * 32,
        machine=machine,
        at=at,
    )
    assert len(encode_heartbeat(status, 15.0).body) <= MAX_BODY_BYTES


def test_a_heartbeat_without_the_newer_fields_is_valid() -> None:
    old = b'{"schema_version":1,"site":"north","state":"idle","at":"2026-01-02T03:04:05Z"}'
    assert SiteStatus.from_json(old).machine is None
