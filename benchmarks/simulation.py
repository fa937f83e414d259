"""A federation in virtual time: real training, real merging, simulated clocks.

Each site trains with `detection.engine` and each update is merged by `aggregator.Merge`, in the order in which
the sites would finish; only the clock is simulated. So a site that is ten times slower costs no more to simulate,
and the same seed gives the same curve on every machine of one kind, however busy it is.

    a site starts          from the newest version; it trains as many steps as the plan says, of `step_time` each
    it finishes            its update is merged with the staleness that it has then; it starts again at once, or
                           when fewer than the job's `max_inflight` updates of it wait to be merged
    several at once        are all merged before anybody starts: the server invites by a clock (`oversee_every_s`);
                           where it does not invite, this is a convention
    in an invited job      those train that the server would invite (aggregator.selection): all are connected and at
                           rest, so their images and the time since their last turn decide

What this leaves out: transport (milliseconds beside minutes of training), lost messages and crashes, which change
who is late but not what is merged (docs/reliability.md).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from aggregator.merge import Merge
from aggregator.selection import Candidate, select
from aggregator.server_opt import OptimizerState
from detection import engine
from detection.dataset import Dataset
from detection.weights import Arrays
from federation.ids import new_update_id
from federation.jobs import JobSpec
from federation.keys import update_key
from federation.types import ClientUpdate
from producers.local import moments as moments_of
from producers.local import payload as payload_of
from producers.work import training_seed
from storage.tensors import TensorFile, from_arrays
from tasks.state import state_file


@dataclass(frozen=True)
class Site:
    """One data owner. `step_time`: virtual time of one of its gradient steps."""

    name: str
    dataset: Dataset
    step_time: float = 1.0


@dataclass(frozen=True)
class Snapshot:
    """The global model after a merge. `time` virtual, `steps` gradient steps behind it over all sites."""

    time: float
    steps: int
    version: int
    model: TensorFile
    updates: dict[str, int]
    """Merged updates by site."""
    mean_staleness: float


@dataclass(order=True)
class _Finish:
    time: float
    order: int
    site: Site = field(compare=False)
    base: TensorFile = field(compare=False)
    shared: OptimizerState | None = field(compare=False)
    base_version: int = field(compare=False)
    attempt: int = field(compare=False)


def federate(spec: JobSpec, sites: list[Site], initial: Arrays) -> Iterator[Snapshot]:
    """Run `spec` until its last version; yields the model after each version.

    `initial`: the full state of version 0. The job's norm policy must be `average`.
    """
    model, state, version = from_arrays(initial), None, 0
    waiting = {site.name: site for site in sites}
    idle: list[Site] = []
    began: dict[str, float] = {}
    running: list[_Finish] = []
    attempts: Counter[tuple[str, int]] = Counter()
    moments: dict[str, engine.OptimizerState] = {}
    merged: Counter[str] = Counter()
    staleness: list[int] = []
    group: list[tuple[ClientUpdate, TensorFile]] = []
    order = steps = 0
    now = 0.0
    while version < spec.stop.max_versions:
        starting = tuple(waiting)
        if running and running[0].time == now:
            starting = ()  # somebody else finishes at this instant
        elif spec.participation.mode == "invited":
            starting = _invited(spec, sites, waiting, idle, began, now, len(group))
        for name in starting:
            site = waiting.pop(name)
            began[site.name] = now
            attempt = attempts[site.name, version]
            attempts[site.name, version] += 1
            finish = now + spec.plan.steps_for(site.dataset.num_examples) * site.step_time
            heapq.heappush(running, _Finish(finish, order, site, model, state, version, attempt))
            order += 1
        rested = [began[name] + spec.participation.min_interval_s for name in waiting if name in began]
        wake = min((at for at in rested if at > now), default=math.inf)
        if wake < running[0].time:
            now = wake  # somebody may begin before the next one finishes
            continue
        done = heapq.heappop(running)
        now = done.time
        update, tensors, moments[done.site.name] = _train(spec, done, moments.get(done.site.name))
        steps += spec.plan.steps_for(done.site.dataset.num_examples)
        group.append((update, tensors))
        merge = Merge(spec, model.layout, model.flat.copy(), model.ints.copy(), _copy(state), version)
        complete = len(group) == merge.needed
        if complete:
            for one, sent in group:
                staleness.append(merge.add(one, sent.flat, sent.ints).staleness)
                merged[one.site] += 1
            result = merge.finish()
            model, state, version = (
                TensorFile(model.layout, result.flat, result.ints),
                result.state,
                result.version,
            )
            group = []
        idle.append(done.site)
        unmerged = Counter(one.site for one, _ in group)
        waiting |= {site.name: site for site in idle if unmerged[site.name] < spec.inflight_limit}
        idle = [site for site in idle if unmerged[site.name] >= spec.inflight_limit]
        if complete:
            yield Snapshot(now, steps, version, model, dict(merged), float(np.mean(staleness)))


def _invited(
    spec: JobSpec,
    sites: list[Site],
    waiting: Mapping[str, Site],
    idle: list[Site],
    began: Mapping[str, float],
    now: float,
    unmerged: int,
) -> tuple[str, ...]:
    """Names of those that the server would invite now. Who is neither in `waiting` nor `idle` trains.

    began: when the last turn of each site did. unmerged: updates that wait to be merged.
    """
    resting = {site.name for site in idle}
    candidates = [
        Candidate(
            site=site.name,
            num_images=site.dataset.num_examples,
            since_s=now - began[site.name] if site.name in began else None,
            invited=site.name not in waiting and site.name not in resting,
            occupied="its update waits to be merged" if site.name in resting else "",
        )
        for site in sites
    ]
    return select(candidates, spec.participation, unmerged).invite


def _train(
    spec: JobSpec, run: _Finish, moments: engine.OptimizerState | None
) -> tuple[ClientUpdate, TensorFile, engine.OptimizerState]:
    """The site's update, as `producers.work` makes it, and the state of its optimiser."""
    weights = run.base.arrays()
    if spec.plan.shared_moments and run.shared is not None:
        weights |= moments_of(run.base.layout, state_file(run.shared))
    trained = engine.train(
        spec,
        weights,
        run.site.dataset,
        seed=training_seed(spec.plan.seed, run.site.name, run.base_version, run.attempt),
        progress=spec.progress(run.base_version),
        optimizer_state=moments if spec.plan.optimizer_state == "kept" else None,
        steps_before=run.base_version * spec.plan.steps_for(run.site.dataset.num_examples),
    )
    sent = payload_of(spec, run.base, trained.weights)
    update_id = new_update_id()
    update = ClientUpdate(
        update_id=update_id,
        job=spec.id,
        site=run.site.name,
        base_version=run.base_version,
        num_examples=trained.num_examples,
        payload_kind=spec.aggregation.payload_kind,
        payload_key=update_key(spec.id, run.site.name, update_id),
        payload_sha256=hashlib.sha256(sent.flat.tobytes()).hexdigest(),
        payload_bytes=sent.flat.nbytes,
        metrics=dict(trained.metrics),
        created_at=datetime.now(UTC),
    )
    return update, sent, trained.optimizer_state


def _copy(state: OptimizerState | None) -> OptimizerState | None:
    return (
        None if state is None else OptimizerState(state.m.copy(), None if state.v is None else state.v.copy())
    )
