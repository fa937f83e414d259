"""Jobs that end by what is measured or by the clock; versions that are promoted, rolled back, and held back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from federation.ids import new_update_id
from federation.jobs import EvaluationPolicy, JobSpec, StopRule
from federation.requests import SteerModel
from federation.settings import ENV_PREFIX
from federation.types import (
    Closed,
    Evaluation,
    Head,
    LogRecord,
    Published,
    Quarantined,
    RolledBack,
)
from federation.wire import JobChanged, JobClosed, decode_control, encode_report
from storage.audit import audit
from storage.channels import resolve
from storage.log import VersionLog, refusals
from storage.models import load_model
from tasks.replay import replay
from tests.factories import Arrays, client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import ROOT, Server, until
from tests.toy_site import ToyTrainer, agent

A, B = "site-a", "site-b"
METRIC = "mAP@0.5"


# --- what sites and operators do -------------------------------------------------------------------------------


def new_job(server: Server, **changes: object) -> str:
    job = f"registry-{new_update_id()[-12:]}"
    server.create_job(job_spec(job, **changes))
    return job


def head_of(server: Server, job: str) -> Head:
    return VersionLog(server.store, job).head().head


def records(server: Server, job: str) -> list[LogRecord]:
    return list(VersionLog(server.store, job).history())


def send(server: Server, job: str, value: float, *, base: int, site: str = A) -> str:
    payload = payload_of(toy_arrays(value))
    update = client_update(payload, job=job, site=site, base_version=base)
    server.send(update, payload)
    return update.update_id


def advance(server: Server, job: str, to: int) -> None:
    while (version := head_of(server, job).version) < to:
        send(server, job, float(version + 1), base=version)
        until(f"version {version + 1}", lambda: head_of(server, job).version > version)


def measure(server: Server, job: str, version: int, value: float, site: str = A) -> None:
    """As a site's report over the wire; returns when it is stored."""
    report = Evaluation(
        job=job, version=version, who=site, num_images=10, metrics={METRIC: value}, at=datetime.now(UTC)
    )
    broker = server.as_site(site)
    broker.publish("fed.updates", encode_report(report))
    broker.close()
    key = f"jobs/{job}/metrics/{version:010d}/{site}.json"
    until(f"the report of {site} on {version}", lambda: key in set(server.store.list(key)))


def refused(server: Server, job: str, update_id: str) -> str | None:
    """The reason; None: it is not refused (yet)."""
    found = [r for record in records(server, job) for r in refusals(record.event)]
    reasons = {refusal.update.update_id: refusal.reason for refusal in found}
    return reasons.get(update_id)


def merged(server: Server, job: str) -> dict[str, int]:
    """update -> the version that its merge made."""
    events = [record.event for record in records(server, job)]
    return {c.update.update_id: c.version for e in events if isinstance(e, Published) for c in e.merged}


def fedqueue(server: Server, *words: str, status: int = 0) -> str:
    """What an operator's command says."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        cwd=ROOT,
        env=inherited | server.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def hears(server: Server, site: str, kind: type, job: str) -> Callable[[], bool]:
    """Whether the site's control queue has brought such a message about the job."""
    broker = server.as_site(site)
    heard: list[object] = []

    def look() -> bool:
        heard.extend(decode_control(delivery) for delivery in broker.drain(f"fed.ctl.{site}"))
        return any(isinstance(c, kind) and getattr(c, "job", "") == job for c in heard)

    return look


def assert_sound(server: Server, job: str) -> None:
    """Nothing lost, nothing counted twice, every version made again bit for bit."""
    until("every update to have its end", lambda: not (h := head_of(server, job)).pending or h.quarantine)
    assert [finding for finding in audit(server.store, job) if finding.level == "error"] == []
    assert [step for step in replay(server.store, job) if not step.equal] == []


def assert_late_is_refused(server: Server, job: str) -> None:
    late = send(server, job, 1.0, base=head_of(server, job).version, site=B)
    until("the refusal", lambda: refused(server, job, late) is not None)
    assert refused(server, job, late) == "job-closed"


def closed(server: Server, job: str) -> str:
    until("the job to close", lambda: head_of(server, job).closed is not None)
    (event,) = [record.event for record in records(server, job) if isinstance(record.event, Closed)]
    assert event.reason == head_of(server, job).closed
    return event.reason


# --- convergence -----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    num_images: int


@dataclass
class MeasuringTrainer(ToyTrainer):
    """Measures the mean weight, which every training raises by one."""

    num_validation_images: int = 3

    def evaluate(self, spec: JobSpec, weights: Arrays, on_image: Callable[[int], None]) -> Measured:
        on_image(self.num_validation_images)
        mean = float(np.mean(weights["conv.weight"], dtype=np.float64))
        return Measured({"mean weight": mean}, {}, self.num_validation_images)


def test_agents_train_until_a_target_is_reached(server: Server) -> None:
    policy = EvaluationPolicy(sites_every=2, metric="mean weight")
    job = new_job(server, evaluation=policy, stop=StopRule(max_versions=10_000, target=1.5))
    stop = threading.Event()
    threads = []
    for site in (A, B):
        settings = server.site_settings(site).model_copy(update={"poll_s": 0.1})
        threads.append(threading.Thread(target=agent(settings, job, MeasuringTrainer(0.05), stop).run))
    for thread in threads:
        thread.start()
    try:
        reason = closed(server, job)
        until("the agents to end", lambda: not any(thread.is_alive() for thread in threads))
    finally:
        stop.set()
    assert " reached mean weight " in reason
    assert reason.endswith("the target is 1.5")
    assert_late_is_refused(server, job)
    measured = {int(key.split("/")[-2]) for key in server.store.list(f"jobs/{job}/metrics/")}
    assert head_of(server, job).version in measured, "the last version is measured"
    assert_sound(server, job)


def test_a_job_ends_when_nothing_improves(server: Server) -> None:
    stop = StopRule(patience=2, min_improvement=0.01)
    job = new_job(server, evaluation=EvaluationPolicy(sites_every=1), stop=stop)
    advance(server, job, 3)
    told = hears(server, A, JobClosed, job)
    measure(server, job, 3, 0.705)  # the newest first: what is measured counts in the order of the versions
    measure(server, job, 1, 0.7)
    assert head_of(server, job).closed is None
    measure(server, job, 2, 0.5)
    assert closed(server, job) == (
        "2 measured versions in a row, 2 to 3, did not beat mAP@0.5 0.7 of version 1 by more than 0.01"
    )
    until("the site to be told", told)
    assert_late_is_refused(server, job)
    assert_sound(server, job)


def test_a_job_ends_at_its_deadline(server: Server) -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=2)
    job = new_job(server, stop=StopRule(deadline=deadline))
    send(server, job, 1.0, base=0)
    assert closed(server, job).startswith("the deadline, ")
    assert datetime.now(UTC) >= deadline
    assert_late_is_refused(server, job)
    assert_sound(server, job)


# --- the registry ----------------------------------------------------------------------------------------------


def test_promote_and_roll_back(server: Server) -> None:
    job = new_job(server, evaluation=EvaluationPolicy(sites_every=1))
    advance(server, job, 4)
    for version, value in {1: 0.5, 2: 0.7, 4: 0.9}.items():
        measure(server, job, version, value)
    assert f"version 2 of {job} is stable now" in fedqueue(server, "model", "promote", job, "2")
    told = hears(server, A, JobChanged, job)
    said = fedqueue(server, "model", "rollback", job, "stable", "--reason", "worse at night")
    assert f"version 5 of {job} is version 2 again" in said
    until("the site to be told", told)

    # in flight when it came: from the abandoned line it is refused, from before it is merged
    gone = send(server, job, 9.0, base=4)
    counts = send(server, job, 9.0, base=2, site=B)
    until("the older one to be merged", lambda: counts in merged(server, job))
    until("the refusal", lambda: refused(server, job, gone) is not None)
    assert refused(server, job, gone) == "abandoned-base"
    assert merged(server, job)[counts] == 6
    advance(server, job, 7)

    log = VersionLog(server.store, job)
    assert log.version(5).model == log.version(2).model
    assert load_model(server.store, log.version(7).model)
    assert resolve(server.store, job, "stable").current == log.version(2)
    assert resolve(server.store, job, "best").current.version == 2, "version 4 had more, and was rolled back"
    listed = {
        line.split()[0]: line for line in fedqueue(server, "model", "list", job).splitlines() if line.strip()
    }
    assert "= version 2" in listed["5"]
    assert "rolled back" in listed["4"]
    assert "stable" in listed["2"]
    assert "by a rollback of server: worse at night" in fedqueue(server, "model", "show", job, "5")
    assert "both come from version 2" in fedqueue(server, "model", "diff", job, "4", "latest")
    assert "no stored version 40" in fedqueue(server, "model", "rollback", job, "40", status=1)
    assert_sound(server, job)


def test_only_the_submitter_and_operators_steer(server: Server) -> None:
    job = new_job(server)
    advance(server, job, 2)
    request = server.ask(SteerModel(job=job, action="rollback", version=1), site=B)
    answer = server.answer(request)
    assert not answer.ok
    assert "only that site or an operator" in answer.errors[0]
    assert head_of(server, job).version == 2


def test_a_version_that_fails_its_gate_waits_for_an_operator(server: Server) -> None:
    policy = EvaluationPolicy(sites_every=1, max_drop=0.1)
    job = new_job(server, evaluation=policy)
    advance(server, job, 3)
    told = hears(server, A, JobChanged, job)
    for version, value in {1: 0.7, 2: 0.8, 3: 0.4}.items():
        measure(server, job, version, value)
    until("the quarantine", lambda: head_of(server, job).quarantine is not None)
    until("the site to be told", told)
    head = head_of(server, job)
    assert (head.offered.version, head.version) == (2, 3)
    assert head.idle_because is not None
    assert f"fedqueue model clear {job} 3" in fedqueue(server, "model", "list", job)

    # what was in flight waits, and is not lost
    waits = send(server, job, 9.0, base=3, site=B)
    until("it to be accepted", lambda: [c.update.update_id for c in head_of(server, job).pending] == [waits])
    assert "is out of quarantine" in fedqueue(server, "model", "clear", job, "3")
    until("it to be merged", lambda: merged(server, job).get(waits) == 4)

    # a later one may fail, and a rollback ends that, too; what waits from the failed line ends with it
    measure(server, job, 4, 0.1)
    until("the quarantine", lambda: head_of(server, job).quarantine is not None)
    assert head_of(server, job).offered.version == 3
    ends = send(server, job, 9.0, base=4, site=B)
    until("it to be accepted", lambda: [c.update.update_id for c in head_of(server, job).pending] == [ends])
    assert "is in quarantine" in fedqueue(server, "model", "rollback", job, "4", status=1)
    fedqueue(server, "model", "rollback", job, "2")
    assert refused(server, job, ends) == "abandoned-base"
    head = head_of(server, job)
    assert (head.version, head.quarantine, head.offered.version) == (5, None, 5)
    advance(server, job, 6)
    kinds = [type(record.event) for record in records(server, job)]
    assert (kinds.count(Quarantined), kinds.count(RolledBack)) == (2, 1)
    assert_sound(server, job)
