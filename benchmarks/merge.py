"""What merging costs: `python -m benchmarks.merge`, from the repository's root. Exits 1 if a target is missed.

Time   One update of 170 MB is folded by `Merge`, and in turn, in the same process, plain numpy does
       `x += a * u` over the same bytes: once as written, with its temporary, and once into a temporary that
       is there already, which is the fastest that numpy alone can do. Target: the median of the ratios to
       the *latter* is at most 1.5. fedbuff's share of its flush is included.
Memory The high-water mark of resident memory of a fresh process that folds 16 updates, read from a file one
       after the other, against one that folds 1. Target: at most 10 % more.

`--megabytes` makes it smaller, for a look; the targets are meant for 170.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.blocks import Floats
from aggregator.merge import Merge
from federation.ids import new_update_id
from federation.jobs import MAX_VERSION, AggregationPolicy, JobSpec, StopRule
from federation.keys import update_key
from federation.layout import Layout, TensorSpec
from federation.types import ClientUpdate

TIME_TARGET = 1.5
MEMORY_TARGET = 1.10
UPDATES = 16
BUFFER_SIZE = 10

# name, policy, share of the floats that are running statistics
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("fedasync", {"strategy": "fedasync"}, 0.0),
    ("fedasync, 5 % statistics", {"strategy": "fedasync"}, 0.05),
    ("fedbuff", {"strategy": "fedbuff"}, 0.0),
    ("fedbuff, 5 % statistics", {"strategy": "fedbuff"}, 0.05),
    ("fedavg", {"strategy": "fedavg"}, 0.0),
    ("fedbuff with fedadam", {"strategy": "fedbuff", "server_optimizer": {"kind": "fedadam"}}, 0.0),
]
TIMED = CASES[:4]


def make_layout(floats: int, statistics_share: float) -> Layout:
    layers = int(floats * statistics_share / 2)
    specs = [TensorSpec(name="w", dtype="F32", shape=(floats - 2 * layers,))]
    if layers:
        for suffix in ("running_mean", "running_var"):
            specs.append(TensorSpec(name=f"bn.{suffix}", dtype="F32", shape=(layers,)))
    return Layout.of(specs)


def make_spec(policy: dict[str, Any], group: int) -> JobSpec:
    return JobSpec(
        id="bench",
        classes=("car",),
        participants=tuple(f"site-{i}" for i in range(group)),
        aggregation=AggregationPolicy.model_validate({**policy, "buffer_size": group}),
        stop=StopRule(max_versions=MAX_VERSION),
    )


def make_update(spec: JobSpec) -> ClientUpdate:
    update_id = new_update_id()
    return ClientUpdate(
        update_id=update_id,
        job=spec.id,
        site="site-0",
        base_version=0,
        num_examples=100,
        payload_kind=spec.aggregation.payload_kind,
        payload_key=update_key(spec.id, "site-0", update_id),
        payload_sha256="0" * 64,
        payload_bytes=1,
        created_at=datetime.now(UTC),
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_case(policy: dict[str, Any], share: float, floats: int, rounds: int) -> tuple[float, ...]:
    """Medians: ours in ms, plain in ms, ratio to plain, preallocated in ms, ratio to preallocated."""
    layout, spec = make_layout(floats, share), make_spec(policy, BUFFER_SIZE)
    random = np.random.default_rng(0)
    u = random.random(floats, np.float32)
    x, temporary = u * np.float32(0.5), np.empty(floats, np.float32)
    ints, a = np.zeros(0, np.int64), np.float32(1e-3)
    merge = Merge(spec, layout, x.copy(), ints.copy(), None, 0)
    per_round = BUFFER_SIZE if policy["strategy"] == "fedbuff" else 1

    def ours() -> None:
        for _ in range(per_round):
            merge.add(make_update(spec), u, ints)

    def plain(x: Floats) -> None:
        for _ in range(per_round):
            x += a * u

    def preallocated() -> None:
        for _ in range(per_round):
            np.multiply(u, a, out=temporary)
            np.add(x, temporary, out=x)

    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        times.append((seconds(ours), seconds(lambda: plain(x)), seconds(preallocated)))
    times = times[1:]  # the first round pays for fresh pages
    medians = [1e3 * statistics.median(column) / per_round for column in zip(*times, strict=True)]
    to_plain = statistics.median(o / p for o, p, _ in times)
    to_preallocated = statistics.median(o / p for o, _, p in times)
    return medians[0], medians[1], to_plain, medians[2], to_preallocated


def fold_in_this_process(name: str, count: int, path: Path) -> int:
    """Fold `count` updates from the file and return the high-water mark of this process, in bytes."""
    policy, share = next((policy, share) for case, policy, share in CASES if case == name)
    spec, floats = make_spec(policy, count), path.stat().st_size // 4
    ints = np.zeros(0, np.int64)
    merge = Merge(spec, make_layout(floats, share), np.fromfile(path, np.float32), ints, None, 0)
    for _ in range(count):
        payload = np.fromfile(path, np.float32)
        merge.add(make_update(spec), payload, ints)
        del payload  # else it would still be there while the next one is read
    assert len(merge.finish().merged) == count
    # not getrusage: its maximum is inherited from the parent across fork and exec
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("the memory figure needs Linux: /proc/self/status has no VmHWM here")
    return int(found[1]) * 1024


def peak_bytes(name: str, count: int, path: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.merge", "--peak", name, str(count), str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=170, help="size of one update (10^6 bytes)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds per case")
    parser.add_argument("--peak", nargs=3, metavar=("CASE", "COUNT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, count, path = arguments.peak
        print(fold_in_this_process(name, int(count), Path(path)))
        return 0
    floats = arguments.megabytes * 1_000_000 // 4
    missed = 0

    print(f"time of one update of {arguments.megabytes} MB, medians of {arguments.rounds} interleaved rounds")
    print(f"{'':26} {'fold':>8} {'x += a*u':>10} {'ratio':>6} {'prealloc.':>10} {'ratio':>6}  target")
    for name, policy, share in TIMED:
        fold, plain, to_plain, best, to_best = time_case(policy, share, floats, arguments.rounds)
        met = to_best <= TIME_TARGET
        missed += not met
        print(
            f"{name:26} {fold:5.0f} ms {plain:7.0f} ms {to_plain:6.2f} {best:7.0f} ms {to_best:6.2f}  "
            f"{'met' if met else 'MISSED'} (<= {TIME_TARGET})"
        )

    print(f"\npeak resident memory of folding {UPDATES} updates against 1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.f32"
        np.random.default_rng(0).random(floats, np.float32).tofile(path)
        for name, _, _ in CASES:
            one, many = (peak_bytes(name, count, path) for count in (1, UPDATES))
            met = many / one <= MEMORY_TARGET
            missed += not met
            print(
                f"{name:26} {one / 1e6:5.0f} MB {many / 1e6:7.0f} MB {many / one:6.3f}  "
                f"{'met' if met else 'MISSED'} (<= {MEMORY_TARGET})"
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
