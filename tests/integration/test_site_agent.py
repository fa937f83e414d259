"""The site agent against a real server: it contributes until the job closes, and never loses finished work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from federation.errors import BadPayload
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, EvaluationPolicy, JobSpec, StopRule
from federation.settings import Settings
from federation.types import Evaluation, LogRecord, Published
from producers.outbox import Outbox
from storage.channels import best_version
from storage.jobs import list_evaluations
from storage.log import VersionLog
from storage.models import load_model
from tests.factories import Arrays, client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import Server, until
from tests.toy_site import ToyTrained, ToyTrainer, agent


def new_job(server: Server, **changes: object) -> str:
    name = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(name, **changes))
    return name


def site_settings(server: Server, site: str) -> Settings:
    return server.site_settings(site).model_copy(update={"poll_s": 0.1})


def records(server: Server, job: str) -> list[LogRecord]:
    return list(VersionLog(server.store, job).history())


def merged_ids(server: Server, job: str) -> list[str]:
    events = [record.event for record in records(server, job)]
    return [c.update.update_id for e in events if isinstance(e, Published) for c in e.merged]


def run_until_closed(server: Server, job: str, sites: dict[str, ToyTrainer]) -> None:
    stop = threading.Event()
    threads = [
        threading.Thread(target=agent(site_settings(server, site), job, trainer, stop).run)
        for site, trainer in sites.items()
    ]
    for thread in threads:
        thread.start()
    try:
        until("the agents to end", lambda: not any(thread.is_alive() for thread in threads))
    finally:
        stop.set()


def test_two_sites_work_until_the_job_closes(server: Server) -> None:
    job = new_job(server, stop=StopRule(max_versions=12))
    sites = {"site-a": ToyTrainer(0.02), "site-b": ToyTrainer(0.2)}
    run_until_closed(server, job, sites)
    head = server.head(job)
    assert head is not None
    assert head.closed is not None
    assert head.version == 12
    ids = merged_ids(server, job)
    assert len(ids) == len(set(ids)) == 12
    assert len(sites["site-a"].bases) > len(sites["site-b"].bases) > 0  # nobody waits for the slow one
    for site in sites:
        assert Outbox(site_settings(server, site).site_state / job).sent() == []  # every fate is known


def test_staleness_is_counted_from_the_updates_own_base(server: Server) -> None:
    job = new_job(server, stop=StopRule(max_versions=10))
    run_until_closed(server, job, {"site-a": ToyTrainer(0.02), "site-b": ToyTrainer(0.4)})
    merged = [c for r in records(server, job) if isinstance(r.event, Published) for c in r.event.merged]
    for number, contribution in enumerate(merged):
        assert contribution.version == number + 1
        assert contribution.staleness == number - contribution.update.base_version


def test_the_merged_model_is_what_the_formula_says(server: Server) -> None:
    job = new_job(server)
    for value in (1.0, 3.0):
        payload = payload_of(toy_arrays(value))
        server.send(client_update(payload, job=job), payload)
    until("two merges", lambda: (head := server.head(job)) is not None and head.version == 2)
    head = server.head(job)
    assert head is not None
    arrays = load_model(server.store, head.current.model).arrays()
    # x = 0 -> 0.5·1 -> 0.5 + 0.5·(3 - 0.5), in either order of arrival
    assert arrays["conv.weight"].flat[0] in (np.float32(1.75), np.float32(1.25))
    assert int(arrays["norm.num_batches_tracked"]) == 3


def test_fedbuff_sends_differences_and_a_lone_site_fills_the_buffer(server: Server) -> None:
    policy = AggregationPolicy(strategy="fedbuff", buffer_size=3)
    job = new_job(server, aggregation=policy, stop=StopRule(max_versions=2))
    run_until_closed(server, job, {"site-a": ToyTrainer()})
    head = server.head(job)
    assert head is not None
    assert head.version == 2
    arrays = load_model(server.store, head.current.model).arrays()
    assert 1.0 < arrays["conv.weight"].flat[0] <= 2.0  # two flushes of differences of one, some of them stale


def test_what_a_killed_agent_had_finished_is_delivered_by_the_next_one_under_its_id(server: Server) -> None:
    job = new_job(server, stop=StopRule(max_versions=1))
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload, job=job)
    settings = site_settings(server, "site-a")
    Outbox(settings.site_state / job).put(
        update, payload
    )  # as the agent leaves it when it is killed before the upload
    stop = threading.Event()
    trainer = ToyTrainer()
    thread = threading.Thread(target=agent(settings, job, trainer, stop).run)
    thread.start()
    until("the agent to end", lambda: not thread.is_alive())
    assert merged_ids(server, job) == [update.update_id]
    assert trainer.bases == []


class TroubledTrainer(ToyTrainer):
    """Diverges at every first attempt from a version."""

    def train(self, spec: JobSpec, weights: Arrays, *, base_version: int, **more: Any) -> ToyTrained:
        trained = super().train(spec, weights, base_version=base_version, **more)
        if self.bases.count(base_version) == 1:
            raise BadPayload("a weight is not finite")
        return trained


def test_a_failed_training_sends_nothing_and_is_tried_again(server: Server) -> None:
    job = new_job(server, stop=StopRule(max_versions=2))
    trainer = TroubledTrainer()
    run_until_closed(server, job, {"site-a": trainer})
    assert trainer.bases == [0, 0, 1, 1]
    assert len(merged_ids(server, job)) == 2


@dataclass
class ToyMeasured:
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    num_images: int


@dataclass
class MeasuringTrainer(ToyTrainer):
    """Measures the mean weight on `num_validation_images` images."""

    num_validation_images: int = 3

    def evaluate(self, spec: JobSpec, weights: Arrays, on_image: Callable[[int], None]) -> ToyMeasured:
        on_image(self.num_validation_images)
        mean = float(np.mean(weights["conv.weight"], dtype=np.float64))
        return ToyMeasured(
            {"mean weight": mean}, {"mean weight": {"thing": mean}}, self.num_validation_images
        )


def test_sites_report_what_they_measured_of_the_same_versions(server: Server) -> None:
    policy = EvaluationPolicy(sites_every=3, metric="mean weight")
    job = new_job(server, stop=StopRule(max_versions=7), evaluation=policy)
    images = {"site-a": 3, "site-b": 9}
    run_until_closed(
        server,
        job,
        {site: MeasuringTrainer(0.02, num_validation_images=n) for site, n in images.items()},
    )

    def found() -> list[Evaluation]:
        return list_evaluations(server.store, job)

    until("both to report on the last version", lambda: [e.version for e in found()].count(7) == 2)
    stored = {r.head.version for r in records(server, job)}
    due = {v for u, v in pairwise(sorted(stored)) if v // 3 > u // 3} | {7}
    assert {e.version for e in found()} <= due
    for e in found():
        model = load_model(server.store, VersionLog(server.store, job).version(e.version).model).arrays()
        assert e.metrics["mean weight"] == pytest.approx(float(model["conv.weight"].mean()), abs=1e-5)
        assert e.num_images == images[e.who]
    best = best_version(server.store, job)
    assert best is not None
    assert best.version in due
