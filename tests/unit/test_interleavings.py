"""Two and three workers on one job, in every order of their steps: each update ends once, whoever is first.

After every schedule the log is checked here by rules of its own and the models by the formula, then both by `audit`
and `replay`; then what the workers asked for is done, and nothing may be left waiting. The last tests break the
protocol on purpose: that a rule is needed is known when its removal is found out.

`pytest -rP` prints how many schedules there were, and what came of them.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from broker.port import Handler
from federation.errors import Conflict
from federation.ids import new_update_id
from federation.jobs import EvaluationPolicy, Job, ModelRef, StopRule
from federation.keys import PROBE_PREFIX, log_key, log_prefix, model_key
from federation.requests import Request, SteerModel, What
from federation.settings import Settings
from federation.types import (
    SERVER,
    Accepted,
    ClientUpdate,
    Evaluation,
    Event,
    Head,
    LogRecord,
    Published,
    Refused,
    RolledBack,
)
from federation.wire import Delivery, Message
from storage.audit import Finding, audit
from storage.blob import BlobStore
from storage.files import Buffer
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.retention import Retention
from storage.tensors import TensorFile, encode, from_arrays
from tasks import celery
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.replay import replay
from tasks.report import record as record_report
from tasks.requests import handle
from tasks.retention import policy
from tests.factories import Arrays, client_update, job_spec, payload_of, toy_arrays
from tests.interleaving import Counterexample, Step, SteppedStore, explore, pause, uuid4

SETTINGS = Settings(keep_versions=1)
WRITTEN = datetime(2026, 1, 1, tzinfo=UTC)

Task = tuple[str, Mapping[str, str]]
Work = Callable[["Worker"], object]
Scene = tuple["Start", dict[str, Work]]


class AgedStore(MemoryStore):
    """Time passes as it likes between two steps: when retention looks, whatever lies here has outlived its grace."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: WRITTEN)

    def modified(self, key: str) -> datetime:
        asks_the_time = key.startswith(PROBE_PREFIX)
        return super().modified(key) + timedelta(days=36500 if asks_the_time else 0)

    def copy(self) -> AgedStore:
        copied = AgedStore()
        for key in self.list(""):
            copied.put(key, self.get(key, max_bytes=1 << 20))
        return copied


class Deaf:
    """A broker for hints that nobody hears. They may be lost."""

    def publish(self, exchange: str, message: Message) -> None:
        pass

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        raise AssertionError("a task does not consume")

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        raise AssertionError("a task does not drain")

    def close(self) -> None:
        pass


class Worker(Context):
    """A worker with a view of the log of its own. What it sends waits in `queue`, first come, first served."""

    def __init__(self, store: BlobStore, queue: list[Task]) -> None:
        super().__init__(SETTINGS, store, Deaf(), self._send)
        self.queue = queue

    def _send(self, name: str, arguments: Mapping[str, str]) -> None:
        pause("send")
        self.queue.append((name, arguments))


class Start:
    """What all schedules of a scenario start from: a job, uploads, and what was done with them before."""

    def __init__(self, **changes: Any) -> None:
        self.store = AgedStore()
        self.worker = Worker(self.store, [])
        spec = job_spec(**changes)
        ref = save_model(self.store, spec.id, from_arrays(toy_arrays()))
        self.job = create(self.worker, spec, ref, ref)
        self.names: dict[str, str] = {}
        self.values: dict[str, float] = {}

    def upload(self, name: str, value: float, **changes: object) -> ClientUpdate:
        payload = payload_of(toy_arrays(value))
        update = client_update(payload, **changes)
        self.store.put(update.payload_key, payload)
        self.names[update.update_id], self.values[update.update_id] = name, value
        return update

    def pending(self, name: str, value: float, **changes: object) -> None:
        accept(self.worker, self.upload(name, value, **changes))

    def merged(self, name: str, value: float, **changes: object) -> None:
        self.pending(name, value, **changes)
        publish_pending(self.worker, self.job)

    def leave_behind(self) -> None:
        """A model of what is pending, that a worker stored and then died before the record."""
        other = Worker(self.store.copy(), [])
        record = publish_pending(other, self.job)
        assert record is not None
        save_model(self.store, self.job.id, load_model(other.store, record.head.current.model))


class Meeting:
    """One schedule: workers on a copy of the start."""

    def __init__(
        self,
        start: Start,
        works: Mapping[str, Work],
        stepped: Callable[[BlobStore], BlobStore] = SteppedStore,
        queue: Sequence[Task] = (),
    ) -> None:
        self._start, self._job = start, start.job
        self._store = start.store.copy()
        self._stepped = stepped(self._store)
        self._queue: list[Task] = list(queue)
        self.actors = {name: partial(self._do, work) for name, work in works.items()}

    def _do(self, work: Work) -> None:
        worker = Worker(self._store, self._queue)
        worker.job(self._job.id)
        worker.store = self._stepped
        work(worker)

    def check(self) -> str:
        outcome = "; ".join(filter(None, (self._words(record.event) for record in self._records())))
        worker = Worker(self._store, self._queue)
        while self._queue:
            serve_one(worker)
        records = self._records()
        self._check_ends(records)
        newest = records[-1].head
        assert newest.pending == () or newest.quarantine, "it waits, and nobody was asked to publish it"
        self._check_models(records)
        assert errors(self._store, self._job) == []
        assert [step for step in replay(self._store, self._job.id) if not step.equal] == []
        return outcome

    def _records(self) -> list[LogRecord]:
        keys = list(self._store.list(log_prefix(self._job.id)))
        assert keys == [log_key(self._job.id, seq) for seq in range(len(keys))], "the log has a gap"
        return [LogRecord.from_json(self._store.get(key, max_bytes=1 << 20)) for key in keys]

    def _check_ends(self, records: list[LogRecord]) -> None:
        accepted: list[str] = []
        ended: list[str] = []
        for event in (record.event for record in records):
            match event:
                case Accepted():
                    accepted.append(event.contribution.update.update_id)
                case Refused():
                    ended.append(event.refusal.update.update_id)
                case Published():
                    ended += [contribution.update.update_id for contribution in event.merged]
                    ended += [refusal.update.update_id for refusal in event.refused]
                case RolledBack():
                    ended += [refusal.update.update_id for refusal in event.refused]
        pending = [item.update.update_id for item in records[-1].head.pending]
        assert len(set(accepted)) == len(accepted), f"accepted twice: {self._say(accepted)}"
        assert pending == [known for known in accepted if known not in ended], "what is pending was accepted"
        fates = f"ended {self._say(ended)}, pending {self._say(pending)}"
        assert sorted(ended + pending) == sorted(self._start.names), f"not each update has one fate: {fates}"

    def _check_models(self, records: list[LogRecord]) -> None:
        values: tuple[float, ...] = ()
        lines = {0: values}  # version -> what was merged into its model
        for event, head in ((record.event, record.head) for record in records):
            if isinstance(event, RolledBack):
                values = lines[event.to]
            for merged in event.merged if isinstance(event, Published) else ():
                made = max(lines) + 1
                assert (merged.staleness, merged.version) == (made - 1 - merged.update.base_version, made)
                values = lines[made] = (*values, self._start.values[merged.update.update_id])
            lines[head.version] = values
            assert head.version == max(lines)
            newest = head.current == records[-1].head.current
            if isinstance(event, Published | RolledBack) and (newest or self._has(head.current.model.key)):
                stored = load_model(self._store, head.current.model).arrays()
                for name, expected in mixture(values).items():
                    assert np.array_equal(stored[name], expected), f"{name} of version {head.version}"

    def _has(self, key: str) -> bool:
        return key in self._store.list(key)

    def _words(self, event: Event) -> str:
        match event:
            case Accepted():
                return f"accept {self._say([event.contribution.update.update_id])}"
            case Refused():
                return f"refuse {self._say([event.refusal.update.update_id])}"
            case Published():
                return f"publish {self._say(item.update.update_id for item in event.merged)}"
            case RolledBack():
                refused = self._say(item.update.update_id for item in event.refused)
                return f"back to {event.to}" + (f" without {refused}" if refused else "")
        return "" if event.type == "created" else event.type

    def _say(self, update_ids: Iterable[str]) -> str:
        return "+".join(self._start.names[update_id] for update_id in update_ids)


def errors(store: BlobStore, job: Job) -> list[Finding]:
    return [finding for finding in audit(store, job.id) if finding.level == "error"]


@cache
def mixture(values: tuple[float, ...]) -> Arrays:
    """FedAsync with α = ½: each update halfway; of the variance that of the mixture; counters take the larger."""
    if not values:
        return toy_arrays()
    model, update = mixture(values[:-1]), toy_arrays(values[-1])
    halfway = {name: (model[name] + update[name]) / 2 for name in model}
    apart = update["norm.running_mean"] - model["norm.running_mean"]
    counter = "norm.num_batches_tracked"
    return halfway | {
        "norm.running_var": halfway["norm.running_var"] + apart**2 / 4,
        counter: np.maximum(model[counter], update[counter]),
    }


def serve_one(worker: Worker) -> None:
    """Do the task that has waited longest."""
    name, arguments = worker.queue.pop(0)
    if name == celery.ACCEPT:
        accept(worker, ClientUpdate.from_json(arguments["update"]))
    else:
        assert name == celery.PUBLISH
        publish_pending(worker, worker.job(arguments["job"]))


def serve(worker: Worker) -> None:
    """Do tasks until there is none."""
    while True:
        pause("take")
        if not worker.queue:
            return
        serve_one(worker)


def collect(worker: Worker, job: Job) -> None:
    Retention(worker.store, worker.log(job.id), job, policy(worker.settings, job)).collect()


def meet(
    start: Start,
    works: Mapping[str, Work],
    *,
    least: int,
    queue: Sequence[Task] = (),
    preemptions: int | None = None,
    crashes: int = 0,
) -> set[str]:
    """What came out of all schedules. `least` of them there must be, or something is no longer stepped."""
    explored = explore(lambda: Meeting(start, works, queue=queue), preemptions=preemptions, crashes=crashes)
    bound = "" if preemptions is None else f" with at most {preemptions} preemptions"
    print(f"{explored.schedules} schedules of {', '.join(works)}, {crashes} of them killed{bound}:")
    for outcome, times in explored.outcomes.most_common():
        print(f"{times:7} {outcome}")
    assert explored.schedules >= least
    return set(explored.outcomes)


@pytest.fixture(autouse=True)
def _no_chance_and_no_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(uuid, "uuid4", uuid4)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


# --- who meets -----------------------------------------------------------------------------------------------


def two_accepts() -> Scene:
    start = Start()
    return start, {
        "A": partial(accept, update=start.upload("a", 1.0)),
        "B": partial(accept, update=start.upload("b", 3.0, site="site-b")),
    }


def accept_and_publish() -> Scene:
    start = Start()
    start.pending("a", 1.0)
    return start, {
        "P": partial(publish_pending, job=start.job),
        "B": partial(accept, update=start.upload("b", 3.0, site="site-b")),
    }


def two_publishes() -> Scene:
    start = Start()
    start.pending("a", 1.0)
    start.pending("b", 3.0, site="site-b")
    return start, {name: partial(publish_pending, job=start.job) for name in "PQ"}


def publish_and_retention() -> Scene:
    """Retention finds what a dead worker left behind, and what P has stored and not recorded."""
    start = Start()
    start.pending("a", 1.0)
    start.leave_behind()
    return start, {"P": partial(publish_pending, job=start.job), "R": partial(collect, job=start.job)}


def late_deletion() -> Scene:
    """A second retention, so that R may be stopped between its record and its deletions for as long as it likes."""
    start, works = publish_and_retention()
    return start, {"R": works["R"], "S": works["R"], "P": works["P"]}


def full_queue() -> Scene:
    """Each worker has to publish what waits before it accepts its own."""
    start = Start(aggregation=job_spec().aggregation.model_copy(update={"max_pending": 1}))
    start.pending("a", 1.0)
    return start, {
        "B": partial(accept, update=start.upload("b", 3.0, site="site-b")),
        "C": partial(accept, update=start.upload("c", 8.0, site="site-c")),
    }


def superseded() -> tuple[Start, Work]:
    """Version 2 is about to be published, after which version 1 may go."""
    start = Start()
    start.merged("m", 8.0)
    start.pending("a", 1.0)

    def publish_and_collect(worker: Worker) -> None:
        publish_pending(worker, start.job)
        collect(worker, start.job)

    return start, publish_and_collect


# --- pairs, in every order -----------------------------------------------------------------------------------

CRASHES = pytest.mark.parametrize("crashes", [0, 1])


@CRASHES
def test_accept_and_accept(crashes: int) -> None:
    found = meet(*two_accepts(), crashes=crashes, least=(4, 30)[crashes])
    assert found == {"accept a; accept b", "accept b; accept a"}


@CRASHES
def test_the_same_update_is_accepted_twice_at_once(crashes: int) -> None:
    start = Start()
    update = start.upload("a", 1.0)
    works = {name: partial(accept, update=update) for name in "AB"}
    assert meet(start, works, crashes=crashes, least=(4, 24)[crashes]) == {"accept a"}


@CRASHES
def test_the_same_hopeless_update_is_refused_twice_at_once(crashes: int) -> None:
    """The head does not remember it: both search the whole log."""
    start = Start()
    for version in range(4):
        start.merged(f"m{version}", 1.0 + version, base_version=version)
    update = start.upload("a", 1.0, base_version=0)
    works = {name: partial(accept, update=update) for name in "AB"}
    (outcome,) = meet(start, works, crashes=crashes, least=(10, 90)[crashes])
    assert outcome.endswith("; publish m3; refuse a")


@CRASHES
def test_accept_and_publish(crashes: int) -> None:
    outcomes = {
        "accept a; accept b; publish a+b",
        "accept a; accept b; publish a",
        "accept a; publish a; accept b",
    }
    if crashes:  # after its record, so that it comes again
        outcomes |= {
            "accept a; accept b; publish a; publish b",
            "accept a; publish a; accept b; publish b",
        }
    assert meet(*accept_and_publish(), crashes=crashes, least=(4, 27)[crashes]) == outcomes


@CRASHES
def test_publish_and_publish(crashes: int) -> None:
    found = meet(*two_publishes(), crashes=crashes, least=(4, 20)[crashes])
    assert found == {"accept a; accept b; publish a+b"}


@CRASHES
def test_publish_and_retention(crashes: int) -> None:
    outcomes = {"accept a; publish a; collected", "accept a; collected; publish a"}
    if crashes:  # before retention has deleted what it said, so that it says so again
        outcomes |= {
            "accept a; publish a; collected; collected",
            "accept a; collected; publish a; collected",
            "accept a; collected; collected; publish a",
        }
    assert meet(*publish_and_retention(), crashes=crashes, least=(6, 150)[crashes]) == outcomes


def test_publish_on_a_version_that_is_superseded_and_removed() -> None:
    """P has read the head. Then Q publishes, and retention takes version 1."""
    start, publish_and_collect = superseded()
    works: dict[str, Work] = {"P": partial(publish_pending, job=start.job), "Q": publish_and_collect}
    found = meet(start, works, least=18)
    assert found == {"accept m; publish m; accept a; publish a; collected"}


def test_an_audit_beside_publish_and_retention_finds_nothing() -> None:
    start, publish_and_collect = superseded()

    def look(worker: Worker) -> None:
        assert errors(worker.store, start.job) == []

    found = meet(start, {"U": look, "Q": publish_and_collect}, least=20)
    assert found == {"accept m; publish m; accept a; publish a; collected"}


def test_two_accepts_of_which_each_has_to_publish_first() -> None:
    outcomes = {
        "accept a; publish a; accept b; publish b; accept c",
        "accept a; publish a; accept c; publish c; accept b",
    }
    assert meet(*full_queue(), least=36) == outcomes
    published_again = {
        "accept a; publish a; accept b; publish b; accept c; publish c",
        "accept a; publish a; accept c; publish c; accept b; publish b",
    }
    assert meet(*full_queue(), crashes=1, preemptions=0, least=20) == outcomes | published_again


# --- what an operator and the gate do meanwhile -----------------------------------------------------------------


def ask(what: What, or_else: str = "") -> Work:
    """A request as the queue holds it: delivered again it is the same one. `or_else`: how it may be refused."""
    request = Request(request_id=new_update_id(), who=SERVER, what=what, at=WRITTEN)

    def work(worker: Worker) -> None:
        answer = handle(worker, request)
        assert answer.ok or (or_else and or_else in answer.errors[0]), answer.errors

    return work


def back_to(version: int) -> Work:
    return ask(SteerModel(job="toy", action="rollback", version=version))


def two_versions(**changes: Any) -> Start:
    start = Start(**changes)
    start.merged("m", 8.0)
    start.merged("n", 4.0, base_version=1)
    return start


@CRASHES
def test_rollback_and_accept(crashes: int) -> None:
    """Of the abandoned line: it is refused by the rollback, or by the accept after it."""
    start = two_versions()
    update = start.upload("a", 1.0, base_version=2)
    works = {"A": partial(accept, update=update), "B": back_to(1)}
    before = "accept m; publish m; accept n; publish n; "
    assert meet(start, works, crashes=crashes, least=(4, 30)[crashes]) == {
        before + "accept a; back to 1 without a",
        before + "back to 1; refuse a",
    }


@CRASHES
def test_rollback_and_an_accept_from_before_it(crashes: int) -> None:
    """It counts in either order, with the staleness that it has then."""
    start = two_versions()
    update = start.upload("a", 1.0, base_version=1)
    works = {"A": partial(accept, update=update), "B": back_to(1)}
    before = "accept m; publish m; accept n; publish n; "
    assert meet(start, works, crashes=crashes, least=(4, 30)[crashes]) == {
        before + "accept a; back to 1",
        before + "back to 1; accept a",
    }


@CRASHES
def test_rollback_and_publish(crashes: int) -> None:
    """A publish that has folded on what is rolled back drops its work; a is merged anew, b refused."""
    start = two_versions()
    start.pending("a", 1.0, base_version=1)
    start.pending("b", 3.0, site="site-b", base_version=2)
    works = {"P": partial(publish_pending, job=start.job), "B": back_to(1)}
    before = "accept m; publish m; accept n; publish n; accept a; accept b; "
    found = meet(start, works, crashes=crashes, least=(4, 40)[crashes])
    assert found >= {before + "publish a+b; back to 1", before + "back to 1 without b"}
    assert found - {before + "back to 1 without b; publish a"} == {
        before + "publish a+b; back to 1",
        before + "back to 1 without b",
    }


def test_the_same_rollback_delivered_twice_with_work_in_between_is_one() -> None:
    start = two_versions()
    twice = back_to(1)
    works = {"B": twice, "C": twice, "A": partial(accept, update=start.upload("a", 1.0, base_version=1))}
    outcomes = meet(start, works, preemptions=1, least=40)
    assert all(outcome.count("back to 1") == 1 for outcome in outcomes)


def test_rollback_and_retention() -> None:
    """Version 1 may go, or is made the newest again: never both."""
    start = two_versions()
    start.merged("o", 2.0, base_version=2)

    back = ask(SteerModel(job="toy", action="rollback", version=1), or_else="not kept any more")
    before = "accept m; publish m; accept n; publish n; accept o; publish o; "
    found = meet(start, {"R": partial(collect, job=start.job), "B": back}, least=6)
    assert found == {before + "collected", before + "back to 1; collected"}


def test_promotion_and_retention() -> None:
    start = two_versions()

    promote = ask(SteerModel(job="toy", action="promote", version=1), or_else="not kept any more")
    before = "accept m; publish m; accept n; publish n; "
    found = meet(start, {"R": partial(collect, job=start.job), "B": promote}, least=6)
    assert found == {before + "collected", before + "promoted"}


def report(version: int, value: float) -> Evaluation:
    return Evaluation(
        job="toy",
        version=version,
        who="site-a",
        num_images=10,
        metrics={"mAP@0.5": value},
        at=WRITTEN,
    )


def gated(**stop: Any) -> Start:
    """Version 1 is measured as 0.8, and version 2 about to be as less."""
    start = two_versions(
        evaluation=EvaluationPolicy(sites_every=1, max_drop=0.1),
        stop=StopRule(max_versions=1000, **stop),
    )
    record_report(start.worker, report(1, 0.8))
    return start


@CRASHES
def test_quarantine_and_accept_and_clear(crashes: int) -> None:
    """Nothing is merged until it is cleared, and nothing is lost."""
    start, clear = gated(), ask(SteerModel(job="toy", action="clear", version=2))
    update = start.upload("a", 1.0, base_version=2)

    def measure_and_clear(worker: Worker) -> None:
        record_report(worker, report(2, 0.5))
        clear(worker)

    works = {"A": partial(accept, update=update), "M": measure_and_clear}
    before = "accept m; publish m; accept n; publish n; "
    found = meet(
        start, works, crashes=crashes, preemptions=None if not crashes else 0, least=(8, 20)[crashes]
    )
    assert found == {
        before + "accept a; quarantined; cleared",
        before + "quarantined; accept a; cleared",
        before + "quarantined; cleared; accept a",
    }


@CRASHES
def test_quarantine_and_publish(crashes: int) -> None:
    start = gated()
    start.pending("a", 1.0, base_version=2)
    works = {"P": partial(publish_pending, job=start.job), "M": partial(record_report, report=report(2, 0.5))}
    before = "accept m; publish m; accept n; publish n; accept a; "
    found = meet(start, works, crashes=crashes, least=(4, 30)[crashes])
    assert found == {before + "publish a; quarantined", before + "quarantined"}


@CRASHES
def test_a_stop_rule_closes_while_an_update_comes(crashes: int) -> None:
    """It is merged, or refused once: by the close, or by the accept after it."""
    start = gated(target=0.85)
    update = start.upload("a", 1.0, base_version=2)
    works = {"A": partial(accept, update=update), "M": partial(record_report, report=report(2, 0.9))}
    before = "accept m; publish m; accept n; publish n; "
    found = meet(start, works, crashes=crashes, least=(4, 30)[crashes])
    assert found == {before + "accept a; closed; refuse a", before + "closed; refuse a"}


def test_a_stop_rule_closes_while_a_version_is_made() -> None:
    start = gated(target=0.85)
    start.pending("a", 1.0, base_version=2)
    works = {"P": partial(publish_pending, job=start.job), "M": partial(record_report, report=report(2, 0.9))}
    before = "accept m; publish m; accept n; publish n; accept a; "
    assert meet(start, works, least=4) == {
        before + "publish a; closed",
        before + "closed; refuse a",
    }


# --- three, and whole queues ---------------------------------------------------------------------------------


def test_two_accepts_and_a_publish() -> None:
    start, works = accept_and_publish()
    works |= {"C": partial(accept, update=start.upload("c", 8.0, site="site-c"))}
    found = meet(start, works, least=170)
    assert len(found) == 12, (
        "b and c in two orders; the publish takes one to three, and its record comes after"
    )
    killed = meet(start, works, crashes=1, preemptions=0, least=50)
    assert "accept a; publish a; accept b; accept c; publish b+c" in killed, "a publish came again"


def test_two_publishes_and_an_accept() -> None:
    start, works = accept_and_publish()
    assert meet(start, works | {"Q": works["P"]}, least=150) == {
        "accept a; accept b; publish a+b",
        "accept a; accept b; publish a",
        "accept a; publish a; accept b",
        "accept a; publish a; accept b; publish b",
        "accept a; accept b; publish a; publish b",
    }


def test_two_workers_serve_one_queue() -> None:
    """Nothing waits at the end, though only some updates ask for a publish."""
    start = Start()
    queue = [
        (celery.ACCEPT, {"update": start.upload(name, value, site=f"site-{name}").to_json().decode()})
        for name, value in (("a", 1.0), ("b", 3.0))
    ]
    found = meet(start, {"V": serve, "W": serve}, queue=queue, preemptions=2, least=200)
    assert found >= {
        "accept a; accept b; publish a+b",
        "accept a; accept b; publish a; publish b",
        "accept b; publish b; accept a; publish a",
    }


def test_a_retention_that_deletes_late_takes_nothing_new() -> None:
    meet(*late_deletion(), preemptions=1, least=150)


# --- without what makes it safe ------------------------------------------------------------------------------


class CheckThenPut(SteppedStore):
    """No compare-and-swap of log records: look whether it is there, then write it."""

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        if "/log/" not in key:
            return super().put_if_absent(key, data)
        if key in self.list(key):
            return False
        self.put(key, data)
        return True


class Careless(VersionLog):
    """Takes a lost compare-and-swap for a won one, whosever nonce the record has."""

    def _commit(self, seq: int, event: Event, head: Head) -> LogRecord:
        with suppress(Conflict):
            return super()._commit(seq, event, head)
        self._newest = LogRecord(
            job=self._job, seq=seq, nonce=uuid.uuid4().hex, at=WRITTEN, event=event, head=head
        )
        return self._newest


def fails(scene: Scene, stepped: Callable[[BlobStore], BlobStore] = SteppedStore) -> list[str]:
    """The turns of the first schedule that fails. One preemption is enough for all that is tried here."""
    with pytest.raises(Counterexample) as caught:
        explore(lambda: Meeting(*scene, stepped=stepped), preemptions=1)
    print(caught.value)
    return caught.value.turns


def test_accept_and_accept_need_the_compare_and_swap() -> None:
    first, second, third = fails(two_accepts(), CheckThenPut)
    assert first.startswith("A: list log, get log/0, size updates/site-a/…")
    assert first.endswith(", list log/1"), "it is not there ..."
    assert second.startswith("B: list log, get log/0, size updates/site-b/…")
    assert second.endswith(", list log/1, put log/1, send")
    assert third == "A: put log/1, send", "... but now it was, and is overwritten"


def publish_and_worker() -> Scene:
    """Q publishes, too, and goes on. That makes it visible: records of the same merge differ in nothing that counts."""
    start, works = accept_and_publish()

    def publish_and_accept(worker: Worker) -> None:
        works["P"](worker)
        works["B"](worker)

    return start, {"P": works["P"], "Q": publish_and_accept}


@pytest.mark.parametrize("scene", [accept_and_publish, publish_and_worker, publish_and_retention])
def test_publish_needs_the_compare_and_swap(scene: Callable[[], Scene]) -> None:
    first, _, third = fails(scene(), CheckThenPut)
    assert first.endswith(", list log/2")
    assert third.startswith("P: put log/2")


@pytest.mark.parametrize("scene", [two_accepts, accept_and_publish, publish_and_retention])
def test_a_conflict_must_not_pass_for_success(
    scene: Callable[[], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.context.VersionLog", Careless)
    *_, last = fails(scene())
    assert re.search(r": put_if_absent log/(\d), get log/\1", last)


def test_a_publish_must_not_adopt_a_model_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tasks.publish.save_model", lambda store, job, file, own: save_model(store, job, file, own=False)
    )
    first, second, _ = fails(publish_and_retention())
    (adopted,) = re.findall(r"put_if_absent (models/\S+)$", first)
    assert second.endswith(f"delete {adopted}")


def test_a_publish_must_not_use_a_name_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is free."""

    def save_under_plain_name(store: BlobStore, job: str, file: TensorFile, own: bool) -> ModelRef:
        data = encode(file)
        key = model_key(job, hashlib.sha256(data).hexdigest())
        if store.put_if_absent(key, data):
            return ModelRef(key=key, sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))
        return save_model(store, job, file, own=own)

    monkeypatch.setattr("tasks.publish.save_model", save_under_plain_name)
    *_, last = fails(late_deletion())
    assert re.match(r"R: delete models/\S+$", last)


# --- the explorer itself -------------------------------------------------------------------------------------


class Toy:
    """Actors that follow short programs on a few numbers. Outcome: the order of all steps for which it matters."""

    def __init__(self, programs: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        self.actors: dict[str, Callable[[], None]] = {
            name: partial(self._follow, program) for name, program in programs.items()
        }
        self._numbers: dict[str, int] = {}
        self._taken: list[Step] = []

    def _follow(self, program: Sequence[tuple[str, str]]) -> None:
        actor = threading.current_thread().name
        skip = False
        for operation, target in program:
            if skip:
                skip = False
                continue
            pause(operation, target)
            self._taken.append(Step(actor, operation, target))
            if operation == "put":
                self._numbers[target] = 3 * self._numbers.get(target, 0) + ord(actor[0])
            elif operation == "get":
                skip = self._numbers.get(target, 0) % 2 == 1
            elif operation == "list":
                skip = sum(n for name, n in self._numbers.items() if name.startswith(target)) % 2 == 1

    def check(self) -> str:
        steps = [(step, self._taken[:i].count(step)) for i, step in enumerate(self._taken)]
        ordered = [pair for pair in combinations(steps, 2) if not pair[0][0].commutes_with(pair[1][0])]
        return f"{sorted(map(repr, steps))} {sorted(map(repr, ordered))}"


@pytest.mark.parametrize("seed", range(16))
def test_every_order_is_run_and_each_once(seed: int) -> None:
    """Against all schedules, in any order of all steps."""
    chance = random.Random(seed)
    crashes = seed % 2
    actors, longest = ("AB", 3) if crashes else ("ABC", 2)
    steps = [
        ("put", "x"),
        ("put", "y"),
        ("put", "xz"),
        ("get", "x"),
        ("get", "y"),
        ("list", "x"),
        ("send", ""),
    ]
    programs = {name: chance.choices(steps, k=chance.randint(1, longest)) for name in actors}
    everything = explore(lambda: Toy(programs), preemptions=99, crashes=crashes)
    reduced = explore(lambda: Toy(programs), crashes=crashes)
    assert reduced.outcomes.keys() == everything.outcomes.keys()
    assert set(reduced.outcomes.values()) == {1}


class Counting:
    """Each adds one to n, not in one step."""

    def __init__(self) -> None:
        self.n = 0
        self.actors = {"A": self._add, "B": self._add}

    def _add(self) -> None:
        pause("get", "n")
        n = self.n
        pause("put", "n")
        self.n = n + 1

    def check(self) -> str:
        assert self.n == 2, f"counted {self.n}"
        return "2"


def test_a_failing_schedule_is_shown() -> None:
    assert explore(Counting, preemptions=0).outcomes == {"2": 2}
    for preemptions in (1, None):
        with pytest.raises(Counterexample, match="counted 1") as caught:
            explore(Counting, preemptions=preemptions)
        assert caught.value.turns[0] == "A: get n"
        assert caught.value.turns[-1] == "A: put n"


def test_actors_that_never_end_are_noticed() -> None:
    def spin() -> None:
        while True:
            pause("get", "x")

    toy = Toy({})
    toy.actors["A"] = spin
    with pytest.raises(Counterexample, match="for ever"):
        explore(lambda: toy)


def test_chance_is_noticed() -> None:
    names = iter("xyz")

    def make() -> Toy:
        return Toy({"A": [("put", next(names)), ("put", "n")], "B": [("put", "n")]})

    with pytest.raises(Counterexample, match="does not determine"):
        explore(make)
