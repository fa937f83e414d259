"""Jobs, updates and payloads for the tests of the aggregator."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from aggregator.blocks import Floats, Ints
from aggregator.merge import Merge, MergeResult
from aggregator.server_opt import OptimizerState
from aggregator.transitions import accept
from aggregator.weighting import assign
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, Job, JobSpec, ModelRef, StopRule, TrainingPlan
from federation.keys import model_key, update_key
from federation.layout import Layout, TensorSpec
from federation.types import ClientUpdate, Head, ModelVersion

NOW = datetime(2026, 1, 2, tzinfo=UTC)
JOB = "cars"
SITES = ("site-a", "site-b", "site-c")


def make_layout(weights: int, statistics: int = 0, counters: int = 0, integers: int = 0) -> Layout:
    """W, S, counters and other integers as asked."""
    specs = [TensorSpec(name="w", dtype="F32", shape=(weights,))]
    if statistics:
        specs += [
            TensorSpec(name=f"bn.{kind}", dtype="F32", shape=(statistics,))
            for kind in ("running_mean", "running_var")
        ]
    if counters:
        specs.append(TensorSpec(name="bn.num_batches_tracked", dtype="I64", shape=(counters,)))
    if integers:
        specs.append(TensorSpec(name="anchors", dtype="I64", shape=(integers,)))
    return Layout.of(specs)


def make_spec(
    strategy: str = "fedasync",
    *,
    sites: tuple[str, ...] | None = SITES,
    max_versions: int = 1000,
    plan: TrainingPlan | None = None,
    max_inflight: int | None = None,
    **policy: Any,
) -> JobSpec:
    return JobSpec(
        id=JOB,
        max_inflight=max_inflight,
        plan=plan or TrainingPlan(),
        classes=("car",),
        participants=sites,
        aggregation=AggregationPolicy.model_validate({"strategy": strategy, **policy}),
        stop=StopRule(max_versions=max_versions),
    )


def make_job(spec: JobSpec, max_update_bytes: int = 1000) -> Job:
    return Job(spec=spec, initial=make_ref(0), max_update_bytes=max_update_bytes, created_at=NOW)


def make_ref(number: int) -> ModelRef:
    sha256 = f"{number:064x}"
    return ModelRef(key=model_key(JOB, sha256), sha256=sha256, nbytes=100)


def make_version(number: int) -> ModelVersion:
    return ModelVersion(version=number, model=make_ref(number))


def make_head(version: int = 0, **changes: Any) -> Head:
    return Head(current=make_version(version), **changes)


def make_update(
    base_version: int = 0,
    *,
    site: str = "site-a",
    num_examples: int = 1,
    kind: str = "weights",
    payload_bytes: int = 100,
    update_id: str | None = None,
    metrics: dict[str, float] | None = None,
) -> ClientUpdate:
    update_id = update_id or new_update_id()
    return ClientUpdate.model_validate(
        {
            "update_id": update_id,
            "job": JOB,
            "site": site,
            "base_version": base_version,
            "num_examples": num_examples,
            "payload_kind": kind,
            "payload_key": update_key(JOB, site, update_id),
            "payload_sha256": "0" * 64,
            "payload_bytes": payload_bytes,
            "metrics": metrics or {},
            "created_at": NOW,
        }
    )


def queue(spec: JobSpec, head: Head, *updates: ClientUpdate) -> Head:
    """The head after accepting `updates`, without asking whether they should be."""
    for update in updates:
        head = accept(head, assign(spec, update, head.version, len(head.pending)))
    return head


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def integers(*values: int) -> Ints:
    return np.array(values, np.int64)


@dataclass(frozen=True)
class Payload:
    """An update with its tensors."""

    update: ClientUpdate
    flat: Floats
    ints: Ints


def payload_for(
    spec: JobSpec,
    flat: Floats,
    ints: Ints | None = None,
    *,
    base: int = 0,
    site: str = "site-a",
    n: int = 1,
    metrics: dict[str, float] | None = None,
) -> Payload:
    kind = spec.aggregation.payload_kind
    update = make_update(base, site=site, num_examples=n, kind=kind, metrics=metrics)
    flat, ints = flat.copy(), integers() if ints is None else ints.copy()
    flat.flags.writeable = ints.flags.writeable = False  # a merge has no business writing to a payload
    return Payload(update, flat, ints)


def fold(
    spec: JobSpec,
    layout: Layout,
    flat: Floats,
    payloads: list[Payload],
    *,
    ints: Ints | None = None,
    state: OptimizerState | None = None,
    version: int = 0,
) -> MergeResult:
    """Fold all payloads in one Merge; `flat` itself is left alone."""
    merge = Merge(spec, layout, flat.copy(), integers() if ints is None else ints.copy(), state, version)
    for payload in payloads:
        merge.add(payload.update, payload.flat, payload.ints)
    return merge.finish()
