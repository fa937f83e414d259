"""What the federation reaches on Federated Street: `python -m benchmarks.accuracy run`, then `… report`.

Rows at equal total numbers of gradient steps, three seeds each (docs/accuracy.md explains them):

    central      one training on all images: what a company that owned everything would reach
    alone-a…c    each company of the three-company split by itself, with the steps that it makes in `async`
    async        the three companies, asynchronous, equal speeds
    slow         the three companies, one of them ten times slower; seed 0: a, 1: b, 2: c
    sites20      the authors' twenty devices
    fedavg-slow  synchronous FedAvg with the slow company of `slow`

Every row trains with the product's own code in virtual time (benchmarks/simulation.py), so a figure does not
depend on how busy the machine is. One process per row and seed, as many at a time as there are cores, one thread
each. Results are appended to RESULTS as they come; what is there already for the same settings is not run again, so a
run that was stopped goes on where it was.

    python -m benchmarks.accuracy run --data DIR [--rows async slow] [--seeds 0 1] [--processes 2]
    python -m benchmarks.accuracy report
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aggregator.weighting import group_size
from benchmarks.simulation import Site, federate
from federation.jobs import (
    MAP_50,
    AggregationPolicy,
    ConstantStaleness,
    JobSpec,
    Participation,
    ParticipationStaleness,
    StopRule,
    TrainingPlan,
)

RESULTS = Path(__file__).with_name("accuracy.jsonl")
CLASSES = ("basket", "carton", "chair", "electrombile", "gastank", "sunshade", "table")
BACKBONE = "weights/shufflenet_v2_x0_5_fastestdet_coco_rgbnorm.pth"
COMPANIES = ("A", "B", "C")
DEVICES = tuple(f"{i:02d}" for i in range(1, 21))
SEEDS = (0, 1, 2)
SLOWER = 10.0
EVALUATIONS = 20
"""Points of each curve, the last version among them."""

TOTAL_STEPS = 3000
PLAN = TrainingPlan(
    image_size=192,
    batch_size=4,
    local_steps=5,
    learning_rate=2e-3,
    warmup_steps=10,
    optimizer_state="shared",
)
FEDERATED_LEARNING_RATE = 4e-3
"""A version is the mean of several updates, and so takes steps that are shorter and less noisy: like a larger batch,
that allows a higher rate."""
ASYNC = AggregationPolicy(strategy="fedbuff", buffer_size=2, staleness=ConstantStaleness())
"""Two of three companies: a slow one is not waited for. Its updates are some five versions late, and count in full: it
has images of kinds that nobody else has."""
ASYNC_TURNS = Participation(mode="invited", concurrency=2)
"""Turns go by images, as in central training: weighting by them as well would count them twice."""
SLOW_ASYNC = ASYNC.model_copy(update={"weight_by_examples": True, "staleness": ParticipationStaleness()})
"""Everybody trains all the time, so that weights have to do what turns would: by images, and by how seldom a site
comes."""
SLOW_PLAN = {"local_steps": 2, "learning_rate": 3e-3}
"""While the slow company makes one update the others make twenty: the fewer steps, the less has changed meanwhile."""
DEVICES_PLAN = {"local_steps": 2, "norm_fixed_from": 0.5, "learning_rate": 5e-3}
"""A device has one or two cameras: with more steps it drifts towards them, and its batches' statistics are theirs. The
mean of four allows longer steps."""
DEVICES_ASYNC = AggregationPolicy(strategy="fedbuff", buffer_size=4, weight_by_objects=True)
"""One device shows seven objects an image, another one."""
DEVICES_TURNS = Participation(mode="invited", concurrency=5, max_in_flight=5)
"""Of the twenty devices five are busy, one more than a version takes: so nobody waits for the slowest."""
SYNC = AggregationPolicy(strategy="fedavg")
GAP_TARGETS = {"async": 0.02, "sites20": 0.03}
"""Largest distance in mAP@0.5 from `central`."""
TARGET_SHARE = 0.9
TARGET_TIME = 1 / 3
"""`slow` reaches TARGET_SHARE of central's mAP@0.5 in at most this share of the time of `fedavg-slow`."""


@dataclass(frozen=True)
class Row:
    """One line of the table for one seed."""

    name: str
    seed: int
    files: tuple[str, ...]
    """Annotation files below `annotations/`, one per site; a lone one is trained without a federation."""
    spec: JobSpec
    steps: int
    step_times: dict[str, float] = field(default_factory=dict)
    """Virtual time of a gradient step of the sites that are not of speed 1."""

    @property
    def settings(self) -> str:
        """A digest of everything that decides the result; the code is not in it."""
        # without defaults, or each new field of a job would make everything that was measured another setting
        fields = asdict(self) | {"spec": self.spec.model_dump(mode="json", exclude_defaults=True)}
        # which kind it is is a default of each kind
        fields["staleness"] = self.spec.aggregation.staleness.model_dump(mode="json")
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """The global model at one moment. `time`: virtual, in gradient steps of a site of speed 1."""

    time: float
    steps: int
    version: int
    metrics: dict[str, float]


def rows(seed: int) -> Iterator[Row]:
    """All rows of the table for one seed."""
    slow = COMPANIES[seed % len(COMPANIES)].lower()
    companies = tuple(f"sites3/{name}.json" for name in COMPANIES)
    yield Row("central", seed, ("train.json",), _alone(seed, TOTAL_STEPS), TOTAL_STEPS)
    for name in COMPANIES:
        one = f"alone-{name.lower()}"
        steps = TOTAL_STEPS // len(COMPANIES)
        yield Row(one, seed, (f"sites3/{name}.json",), _alone(seed, steps), steps)
    merged = _federated(seed, ASYNC, participation=ASYNC_TURNS)
    yield Row("async", seed, companies, merged, TOTAL_STEPS)
    uneven = _federated(seed, SLOW_ASYNC, plan=SLOW_PLAN)
    yield Row("slow", seed, companies, uneven, TOTAL_STEPS, {slow: SLOWER})
    devices = tuple(f"sites20/{name}.json" for name in DEVICES)
    turns = _federated(
        seed,
        DEVICES_ASYNC,
        participation=DEVICES_TURNS,
        plan=DEVICES_PLAN,
    )
    yield Row("sites20", seed, devices, turns, TOTAL_STEPS)
    rounds = _federated(seed, SYNC, participants=tuple(name.lower() for name in COMPANIES))
    yield Row("fedavg-slow", seed, companies, rounds, TOTAL_STEPS, {slow: SLOWER})


def _alone(seed: int, steps: int) -> JobSpec:
    """One training of `steps` in a piece, with one optimiser and one warm-up."""
    plan = PLAN.model_copy(update={"seed": seed, "local_steps": steps, "optimizer_state": "fresh"})
    return JobSpec(id="street", classes=CLASSES, plan=plan)


def _federated(
    seed: int, aggregation: AggregationPolicy, plan: dict[str, Any] | None = None, **more: Any
) -> JobSpec:
    """TOTAL_STEPS over all sites. plan: what is not as in PLAN."""
    changes = {"seed": seed, "learning_rate": FEDERATED_LEARNING_RATE} | (plan or {})
    # a site that went on before its last update is merged would push the same way twice
    spec = JobSpec(
        id="street",
        classes=CLASSES,
        plan=PLAN.model_copy(update=changes),
        aggregation=aggregation,
        max_inflight=1,
        **more,
    )
    versions = TOTAL_STEPS // (spec.plan.local_steps * group_size(spec))
    return spec.model_copy(update={"stop": StopRule(max_versions=versions)})


# --- running -------------------------------------------------------------------------------------------


def run(row: Row, data: Path) -> dict[str, Any]:
    """Train and measure one row; the line of RESULTS."""
    # torch reads it at import, and this process is fresh
    os.environ["OMP_NUM_THREADS"] = "1"
    from detection.dataset import Dataset, load_dataset
    from detection.evaluate import evaluate
    from detection.threads import use_threads
    from detection.weights import initial_state

    use_threads(1)

    def load(name: str) -> Dataset:
        return load_dataset(data / "annotations" / name, data / "images", CLASSES)

    began = time.process_time()
    test = load("test.json")
    initial = initial_state(row.spec, data / BACKBONE)
    points: list[Point] = []
    updates: dict[str, int] = {}
    staleness = 0.0
    if len(row.files) == 1:
        from detection import engine

        trained = engine.train(
            row.spec,
            initial,
            load(row.files[0]),
            seed=row.seed,
            progress=(0.0, 1.0),
        )
        measured = evaluate(row.spec, trained.weights, test)
        points.append(Point(row.steps, row.steps, 1, measured.metrics))
    else:
        names = {Path(file).stem.lower(): file for file in row.files}
        sites = [Site(name, load(file), row.step_times.get(name, 1.0)) for name, file in names.items()]
        last = row.spec.stop.max_versions
        due = {last - k * last // EVALUATIONS for k in range(EVALUATIONS)}
        for now in federate(row.spec, sites, initial):
            updates, staleness = now.updates, now.mean_staleness
            if now.version in due:
                measured = evaluate(row.spec, now.model.arrays(), test)
                points.append(Point(now.time, now.steps, now.version, measured.metrics))
    return {
        "row": row.name,
        "seed": row.seed,
        "settings": row.settings,
        "curve": [asdict(point) for point in points],
        "per_class": measured.per_class[MAP_50],
        "updates": updates,
        "mean_staleness": round(staleness, 3),
        "cpu_s": round(time.process_time() - began),
    }


def run_missing(wanted: Iterable[Row], data: Path, processes: int) -> None:
    """Append what RESULTS does not hold yet, one line as each is done."""
    done = {(line["row"], line["seed"], line["settings"]) for line in results()}
    missing = [row for row in wanted if (row.name, row.seed, row.settings) not in done]
    print(f"{len(missing)} runs to do")
    context = multiprocessing.get_context("spawn")
    # a process for each run: the thread count is fixed before torch is imported
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(partial(run, row, data)) for row in missing]):
            line = future.result()
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            final = line["curve"][-1]["metrics"]
            print(f"{line['row']:12} seed {line['seed']}: {final}, {line['cpu_s']} CPU s", flush=True)


def results() -> list[dict[str, Any]]:
    """The lines of RESULTS."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


# --- reporting -----------------------------------------------------------------------------------------


def report() -> str:
    """The table of docs/accuracy.md and the goals, from RESULTS for the settings of this file."""
    wanted = {(row.name, row.seed, row.settings) for seed in SEEDS for row in rows(seed)}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in results():
        if (line["row"], line["seed"], line["settings"]) in wanted:
            found.setdefault(line["row"], {})[line["seed"]] = line
    lines = [
        f"{TOTAL_STEPS} gradient steps of {PLAN.batch_size} images in each run",
        "",
        "| row | mAP@0.5 by seed | mean | mAP@[.5:.95] | to central | mean τ |",
        "|---|---|---|---|---|---|",
    ]
    means = {name: _mean(by_seed, "mAP@0.5") for name, by_seed in found.items()}
    for name in dict.fromkeys(row.name for row in rows(SEEDS[0])):
        if name not in found:
            lines.append(f"| {name} | not run | | | | |")
            continue
        by_seed = found[name]
        seeds = ", ".join(
            f"{by_seed[seed]['curve'][-1]['metrics']['mAP@0.5']:.3f}" for seed in sorted(by_seed)
        )
        behind = _behind(found, name)
        gap = "" if behind is None or name == "central" else f"{-behind:+.3f}"
        staleness = statistics.mean(line["mean_staleness"] for line in by_seed.values())
        lines.append(
            f"| {name} | {seeds} | {means[name]:.3f} | {_mean(by_seed, 'mAP@[.5:.95]'):.3f} | {gap} | "
            f"{f'{staleness:.2f}' if len(by_seed) and staleness else ''} |"
        )
    return "\n".join([*lines, "", *_goals(found)])


def _behind(found: dict[str, dict[int, dict[str, Any]]], name: str) -> float | None:
    """Distance of a row's mean from central's, over the seeds that both have."""
    both = found.get(name, {}).keys() & found.get("central", {}).keys()
    if not both:
        return None
    central, own = ({seed: found[row][seed] for seed in both} for row in ("central", name))
    return _mean(central, MAP_50) - _mean(own, MAP_50)


def _mean(by_seed: dict[int, dict[str, Any]], metric: str) -> float:
    return statistics.mean(float(line["curve"][-1]["metrics"][metric]) for line in by_seed.values())


def _goals(found: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
    for name, limit in GAP_TARGETS.items():
        gap = _behind(found, name)
        if gap is not None:
            seeds = len(found[name].keys() & found["central"].keys())
            verdict = "reached" if gap <= limit else "missed"
            yield f"{name} within {limit} of central: {gap:+.3f} over {seeds} seeds, {verdict}"
    complete = [
        seed
        for seed in SEEDS
        if all(seed in found.get(name, {}) for name in ("slow", "fedavg-slow", "central"))
    ]
    groups: list[tuple[int, ...]] = [(seed,) for seed in complete]
    if len(complete) > 1:
        groups.append(tuple(complete))
    for group in groups:
        who = f"seed {group[0]}" if len(group) == 1 else "mean of the curves"
        yield f"{who}: {_against_rounds(found, group)}"


def _against_rounds(found: dict[str, dict[int, dict[str, Any]]], seeds: tuple[int, ...]) -> str:
    """How much sooner than `fedavg-slow` `slow` reaches TARGET_SHARE of central, over the mean of some seeds."""
    curves = {
        name: _mean_curve([found[name][seed] for seed in seeds])
        for name in ("slow", "fedavg-slow", "central")
    }
    bar = TARGET_SHARE * curves["central"][-1][1]
    wanted = f"{TARGET_SHARE:.0%} of central ({bar:.3f})"
    slow, rounds = (_reached(curves[name], bar) for name in ("slow", "fedavg-slow"))
    if slow is None:
        return f"slow never reaches {wanted}, rounds {'neither' if rounds is None else f'at {rounds:,.0f}'}: missed"
    # rounds that never get there would need longer still
    share = slow / (rounds or curves["fedavg-slow"][-1][0])
    verdict = "reached" if share <= TARGET_TIME else "missed"
    return (
        f"slow reaches {wanted} at {slow:,.0f}, {'' if rounds else 'less than '}{share:.2f} of the time of rounds:"
        f" {verdict}"
    )


Curve = list[tuple[float, float]]
"""(virtual time, mAP@0.5) of the measured versions."""


def _mean_curve(lines: list[dict[str, Any]]) -> Curve:
    """Point by point: the runs of a row are measured at the same versions."""
    points = zip(*(line["curve"] for line in lines), strict=True)
    return [
        (statistics.mean(p["time"] for p in same), statistics.mean(p["metrics"][MAP_50] for p in same))
        for same in points
    ]


def _reached(curve: Curve, bar: float) -> float | None:
    """Virtual time of the first measured version with at least `bar` mAP@0.5."""
    return next((time for time, value in curve if value >= bar), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train and measure what is missing")
    runs.add_argument(
        "--data", type=Path, required=True, help="folder with images/, annotations/ and weights/"
    )
    runs.add_argument("--rows", nargs="*", help="names of rows; default all")
    runs.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    runs.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    commands.add_parser("report", help="print the table and the goals")
    options = parser.parse_args()
    if options.command == "report":
        print(report())
        return
    wanted = [row for seed in options.seeds for row in rows(seed)]
    names = {row.name for row in wanted}
    if unknown := set(options.rows or ()) - names:
        parser.error(f"there are no rows {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    run_missing(
        [row for row in wanted if not options.rows or row.name in options.rows],
        options.data,
        options.processes,
    )


if __name__ == "__main__":
    main()
