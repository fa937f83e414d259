"""Promote, roll back, clear; and what follows from measurements and the clock: as tasks, on a store in memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, EvaluationPolicy, StopRule
from federation.requests import Answer, Request, SteerModel
from federation.settings import Settings
from federation.types import (
    SERVER,
    Closed,
    Evaluation,
    Head,
    Published,
    Quarantined,
    Refused,
    RolledBack,
)
from storage.channels import resolve
from storage.jobs import list_refusals, save_evaluation
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.tensors import from_arrays
from tasks import celery
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.judge import judge
from tasks.oversee import Memory, oversee
from tasks.publish import publish_pending
from tasks.replay import replay
from tasks.report import record
from tasks.requests import handle
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.unit.audit_cases import NoBroker, errors

METRIC = "mAP@0.5"
BY_SITES = EvaluationPolicy(sites_every=1, max_drop=0.1)


class Toy:
    """A job `toy`, a worker, and the tasks that it sends."""

    def __init__(self, **changes: Any) -> None:
        self.store, self.sent = MemoryStore(), list[tuple[str, dict[str, str]]]()
        self.context = self.worker()
        spec = job_spec(**changes)
        ref = save_model(self.store, "toy", from_arrays(toy_arrays()))
        self.job = create(self.context, spec, ref, ref)

    def worker(self) -> Context:
        """One that has just started."""
        return Context(
            Settings(), self.store, NoBroker(), lambda name, args: self.sent.append((name, dict(args)))
        )

    @property
    def head(self) -> Head:
        return VersionLog(self.store, "toy").head().head

    @property
    def events(self) -> list[Any]:
        return [record.event for record in VersionLog(self.store, "toy").history()]

    def update(self, value: float = 1.0, **changes: Any) -> str:
        payload = payload_of(toy_arrays(value))
        kind = self.job.spec.aggregation.payload_kind
        given = {"base_version": self.head.version, "payload_kind": kind, **changes}
        update = client_update(payload, **given)
        self.store.put(update.payload_key, payload)
        accept(self.context, update)
        return update.update_id

    def versions(self, count: int) -> None:
        for _ in range(count):
            self.update(float(self.head.version + 1))
            publish_pending(self.context, self.job)

    def report(self, version: int, value: float, who: str = "site-a") -> None:
        record(self.context, measured(version, value, who))

    def ask(self, action: str, version: int, who: str = SERVER, **more: Any) -> Answer:
        return handle(self.context, request(action, version, who, **more))

    def sound(self) -> bool:
        return errors(self.store) == [] and all(step.equal for step in replay(self.store, "toy"))


def request(action: Any, version: int, who: str = SERVER, reason: str = "") -> Request:
    what = SteerModel(job="toy", action=action, version=version, reason=reason)
    return Request(request_id=new_update_id(), who=who, what=what, at=datetime.now(UTC))


def measured(version: int, value: float, who: str) -> Evaluation:
    return Evaluation(
        job="toy", version=version, who=who, num_images=10, metrics={METRIC: value}, at=datetime.now(UTC)
    )


# --- promote ------------------------------------------------------------------------------------------------


def test_a_promoted_version_is_stable_until_another_one_is() -> None:
    toy = Toy()
    toy.versions(3)
    assert toy.ask("promote", 2).ok
    toy.versions(1)
    assert resolve(toy.store, "toy", "stable").current.version == 2
    assert toy.ask("promote", 3).ok
    assert toy.ask("promote", 3).message == "version 3 of toy was stable already"
    assert resolve(toy.store, "toy", "stable").current.version == 3
    assert toy.sound()


def test_what_cannot_be_promoted_is_said_why() -> None:
    toy = Toy()
    toy.versions(3)
    assert "no stored version 7" in toy.ask("promote", 7).errors[0]
    assert toy.ask("rollback", 1).ok
    assert toy.ask("promote", 2).errors == ("version 2 of toy is rolled back: promote one that is good",)
    assert "submitted by server" in toy.ask("promote", 1, who="site-a").errors[0]


def test_a_closed_job_can_still_be_promoted() -> None:
    toy = Toy(stop=StopRule(max_versions=2))
    toy.versions(2)
    assert toy.head.closed is not None
    assert toy.ask("promote", 1).ok
    assert "model promote toy 1" in toy.ask("rollback", 1).errors[0]
    assert toy.sound()


# --- roll back ----------------------------------------------------------------------------------------------


def test_a_rollback_makes_a_new_version_of_the_old_model() -> None:
    toy = Toy()
    toy.versions(4)
    before = toy.context.log("toy").version(2)
    answer = toy.ask("rollback", 2, reason="worse on rainy days")
    assert answer.message == "version 5 of toy is version 2 again"
    assert (toy.head.version, toy.head.current.model) == (5, before.model)
    assert (toy.head.is_rolled_back(3), toy.head.is_rolled_back(4)) == (True, True)
    toy.versions(1)
    (merged,) = toy.events[-1].merged
    assert (merged.staleness, merged.version) == (0, 6)
    new, old = (
        load_model(toy.store, ref).arrays()["conv.weight"] for ref in (toy.head.current.model, before.model)
    )
    assert (new == (old + 6) / 2).all(), "version 6 was made of version 2"
    assert toy.sound()


def test_pending_updates_of_the_abandoned_line_are_refused_in_the_same_record() -> None:
    toy = Toy(aggregation=AggregationPolicy(strategy="fedbuff", buffer_size=3), max_inflight=3)
    for _ in range(2):
        for _ in range(3):
            toy.update()
        publish_pending(toy.context, toy.job)
    assert toy.head.version == 2
    old, new = toy.update(base_version=1), toy.update(base_version=2)
    assert toy.ask("rollback", 1).ok
    event = toy.events[-1]
    assert isinstance(event, RolledBack)
    assert [(r.update.update_id, r.reason) for r in event.refused] == [(new, "abandoned-base")]
    assert [c.update.update_id for c in toy.head.pending] == [old]
    assert [r.update.update_id for r in list_refusals(toy.store, "toy")] == [new]
    late = toy.update(base_version=2)
    assert isinstance(toy.events[-1], Refused)
    assert toy.events[-1].refusal.reason == "abandoned-base"
    assert toy.events[-1].refusal.update.update_id == late
    assert toy.sound()


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedyogi"])
def test_the_server_optimisers_state_goes_back_too(kind: str) -> None:
    policy = {"strategy": "fedbuff", "buffer_size": 1, "server_optimizer": {"kind": kind}}
    toy = Toy(aggregation=AggregationPolicy.model_validate(policy))
    toy.versions(3)
    old = toy.context.log("toy").version(1)
    assert old.server_state is not None
    assert toy.ask("rollback", 1).ok
    assert toy.head.current.server_state == old.server_state
    toy.versions(2)
    assert toy.sound()


def test_the_same_request_again_changes_nothing_though_work_came_in_between() -> None:
    toy = Toy()
    toy.versions(3)
    asked = request("rollback", 1)
    handle(toy.context, asked)
    toy.store.delete(f"answers/server/{asked.request_id}.json")  # the worker died before it
    toy.versions(2)
    again = handle(toy.worker(), asked)
    assert again.message == "version 4 of toy is version 1 again"
    assert (toy.head.version, sum(isinstance(e, RolledBack) for e in toy.events)) == (6, 1)


def test_the_same_rollback_asked_for_twice_makes_one_version() -> None:
    toy = Toy()
    toy.versions(3)
    assert "version 4 of toy is version 1 again" in toy.ask("rollback", 1).message
    before = toy.head
    answer = toy.ask("rollback", 1)
    assert answer.ok
    assert "nothing was done" in answer.message
    assert toy.head == before
    toy.versions(1)
    assert "version 6 of toy is version 1 again" in toy.ask("rollback", 1).message
    assert toy.sound()


def test_a_rollback_may_make_the_last_version() -> None:
    """The same exactness as of a publish: it closes in the same record, and nothing is left pending."""
    toy = Toy(stop=StopRule(max_versions=4))
    toy.versions(3)
    toy.update(base_version=1)
    assert toy.ask("rollback", 2).ok
    assert (toy.head.version, toy.head.pending) == (4, ())
    assert toy.head.closed == "version 4, the last of stop.max_versions, is made"
    assert [r.reason for r in toy.events[-1].refused] == ["job-closed"]
    assert toy.sound()


def test_a_rollback_of_what_was_rolled_back_and_back_again() -> None:
    toy = Toy()
    toy.versions(4)
    for version in (2, 4, 1, 6):
        assert toy.ask("rollback", version).ok
        toy.versions(1)
    assert toy.sound()
    for key in list(toy.store.list("jobs/toy/models/")):
        if key not in {toy.head.current.model.key, toy.job.initial.key}:
            toy.store.delete(key)
    steps = list(replay(toy.store, "toy"))  # without the files that it could read instead
    assert all(step.equal for step in steps)
    assert len(steps) == 1 + 4 + 4 * 2


def test_a_rollback_says_that_stable_is_withdrawn() -> None:
    toy = Toy()
    toy.versions(3)
    toy.ask("promote", 3)
    assert "stable is still version 3" in toy.ask("rollback", 1).message
    assert resolve(toy.store, "toy", "stable").reason == "rolled back"


# --- the gate -----------------------------------------------------------------------------------------------


def bad_version() -> Toy:
    """Version 3 failed; version 4 was made before anybody knew."""
    toy = Toy(evaluation=BY_SITES)
    toy.versions(4)
    for version, value in {1: 0.7, 2: 0.8, 3: 0.3}.items():
        toy.report(version, value)
    return toy


def test_a_failed_version_is_put_in_quarantine_with_all_that_followed() -> None:
    toy = bad_version()
    assert isinstance(toy.events[-1], Quarantined)
    assert toy.head.quarantine is not None
    assert (toy.head.quarantine.version, toy.head.offered.version) == (3, 2)
    assert "0.5 lower than at version 2" in toy.head.quarantine.reason
    assert resolve(toy.store, "toy", "latest").current.version == 2
    assert resolve(toy.store, "toy", "best").current.version == 2
    assert toy.head.idle_because is not None
    waiting = toy.update(base_version=3)
    publish_pending(toy.context, toy.job)
    assert [c.update.update_id for c in toy.head.pending] == [waiting], "nothing is merged on top"
    assert toy.sound()


def test_a_cleared_version_stays_so_and_what_waited_is_merged() -> None:
    toy = bad_version()
    toy.update(base_version=3)
    toy.sent.clear()
    assert toy.ask("clear", 4).errors == ("version 4 of toy is not what is in quarantine; version 3 is",)
    assert toy.ask("clear", 3).ok
    assert (celery.PUBLISH, {"job": "toy"}) in toy.sent
    for worker in (toy.context, toy.worker()):
        judge(worker, toy.job)
        oversee(worker, Memory())
    toy.report(3, 0.3)  # again
    assert toy.head.quarantine is None
    publish_pending(toy.context, toy.job)
    assert toy.head.version == 5
    toy.report(5, 0.35)
    assert toy.head.quarantine is None, "as good as what was cleared"
    toy.versions(1)
    toy.report(6, 0.1)
    assert toy.head.quarantine is not None, "a later one may fail"
    assert (toy.head.quarantine.version, toy.head.offered.version) == (6, 5)
    assert toy.ask("clear", 3).ok, "delivered again"
    assert toy.sound()


def test_a_rollback_ends_a_quarantine() -> None:
    toy = bad_version()
    assert "clear that one" in toy.ask("rollback", 3).errors[0]
    assert toy.ask("rollback", 2).ok
    assert (toy.head.quarantine, toy.head.version) == (None, 5)
    judge(toy.worker(), toy.job)
    assert toy.head.quarantine is None
    toy.report(5, 0.82)
    assert resolve(toy.store, "toy", "best").current.version == 5
    assert toy.sound()


def test_the_gate_of_the_server_heeds_no_site() -> None:
    toy = Toy(evaluation=EvaluationPolicy(every=1, sites_every=1, max_drop=0.1))
    toy.versions(3)
    toy.report(1, 0.9)
    toy.report(2, 0.1)
    assert toy.head.quarantine is None
    for version, value in {1: 0.6, 2: 0.65, 3: 0.4}.items():
        save_evaluation(toy.store, measured(version, value, SERVER))
    judge(toy.context, toy.job)
    assert toy.head.quarantine is not None
    assert (toy.head.quarantine.version, toy.head.offered.version) == (3, 2)
    assert toy.sound()


def test_the_last_version_of_a_closed_job_may_fail() -> None:
    toy = Toy(evaluation=BY_SITES, stop=StopRule(max_versions=2))
    toy.versions(2)
    toy.report(1, 0.8)
    toy.report(2, 0.2)
    assert toy.head.closed is not None
    assert resolve(toy.store, "toy", "latest").current.version == 1
    assert toy.ask("clear", 2).ok
    assert resolve(toy.store, "toy", "latest").current.version == 2
    assert toy.sound()


def test_a_measurement_that_cannot_be_read_stops_no_judgement(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy(evaluation=BY_SITES)
    toy.versions(2)
    toy.store.put("jobs/toy/metrics/0000000000/site-b.json", b"{")
    toy.report(1, 0.8)
    toy.report(2, 0.2)
    assert toy.head.quarantine is not None
    assert "left out" in caplog.text


# --- the end ------------------------------------------------------------------------------------------------


def closed_by(toy: Toy) -> str | None:
    closed = [event.reason for event in toy.events if isinstance(event, Closed)]
    assert len(closed) <= 1
    assert (toy.head.closed is not None) == bool(closed)
    return closed[0] if closed else None


def test_a_target_closes_the_job_and_what_waits_is_refused() -> None:
    toy = Toy(evaluation=EvaluationPolicy(sites_every=1), stop=StopRule(target=0.7))
    toy.versions(2)
    waiting = toy.update()
    toy.report(1, 0.69)
    assert closed_by(toy) is None
    toy.report(2, 0.71)
    assert closed_by(toy) == "version 2 reached mAP@0.5 0.71, the target is 0.7"
    assert toy.head.pending == ()
    assert [(r.update.update_id, r.reason) for r in list_refusals(toy.store, "toy")] == [
        (waiting, "job-closed")
    ]
    late = toy.update()
    assert isinstance(toy.events[-1], Refused)
    assert (toy.events[-1].refusal.update.update_id, toy.events[-1].refusal.reason) == (late, "job-closed")
    toy.report(1, 0.9)
    judge(toy.worker(), toy.job)
    assert closed_by(toy) == "version 2 reached mAP@0.5 0.71, the target is 0.7", "once, for the first reason"
    assert toy.sound()


def test_patience_closes_the_job_whatever_the_order_of_the_reports() -> None:
    toy = Toy(evaluation=EvaluationPolicy(sites_every=1), stop=StopRule(patience=2))
    toy.versions(4)
    toy.report(4, 0.5)
    toy.report(2, 0.5)
    assert closed_by(toy) is None
    toy.report(3, 0.6)
    assert closed_by(toy) is None, "version 4 is the first after the best"
    toy.report(1, 0.6)
    assert closed_by(toy) is not None, "of equal ones the first is the best: three others followed"
    assert toy.sound()


def test_a_deadline_closes_the_job_by_the_clock() -> None:
    toy = Toy(stop=StopRule(deadline=datetime.now(UTC) - timedelta(seconds=1)))
    toy.versions(1)
    oversee(toy.context, Memory())
    reason = closed_by(toy)
    assert reason is not None
    assert reason.endswith("has passed at version 1")
    later = Toy(stop=StopRule(deadline=datetime.now(UTC) + timedelta(days=1)))
    oversee(later.context, Memory())
    assert closed_by(later) is None


def test_the_last_version_is_measured_whatever_closed_the_job() -> None:
    """Version 3 is due for nothing but for being the last."""
    toy = Toy(
        evaluation=EvaluationPolicy(every=2),
        stop=StopRule(deadline=datetime.now(UTC) - timedelta(seconds=1)),
    )
    toy.versions(3)
    toy.sent.clear()
    judge(toy.context, toy.job)
    assert toy.sent == [(celery.EVALUATE, {"job": "toy", "version": "3"})]


def test_what_a_worker_that_died_did_not_judge_is_judged_by_the_next() -> None:
    toy = Toy(evaluation=EvaluationPolicy(sites_every=1), stop=StopRule(target=0.7))
    toy.versions(1)
    save_evaluation(toy.store, measured(1, 0.8, "site-a"))
    oversee(toy.worker(), Memory())
    assert closed_by(toy) is not None


def test_a_version_that_was_rolled_back_reaches_no_target() -> None:
    toy = Toy(evaluation=EvaluationPolicy(sites_every=1), stop=StopRule(target=0.7))
    toy.versions(2)
    toy.ask("rollback", 1)
    toy.report(2, 0.9)
    assert closed_by(toy) is None
    toy.report(3, 0.9)
    assert closed_by(toy) is not None
    assert any(isinstance(event, Published) for event in toy.events)
    assert toy.sound()
