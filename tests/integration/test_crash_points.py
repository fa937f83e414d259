"""kill -9 at every point of federation/points.py; after a restart everything has exactly one end.

SCENARIOS says for each point who dies there, and at which work. The process dies at that step and is started again,
as a supervisor would do. In the end all must be as if nothing had happened: each update is merged or refused once,
each message that is no update is one dead letter, every object that follows from the log is there, and audit and
replay pass.

    embedded   every point; each test has a folder and a queue file of its own
    real       the server's points over RabbitMQ, Redis and S3, without retention, because nothing can be made old
               there. The whole Celery worker dies; and once more at some points only the child that runs the task,
               which its parent replaces
"""

from __future__ import annotations

import os
import signal
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker import topology
from broker.open import connect
from federation.ids import new_update_id
from federation.jobs import EvaluationPolicy, StopRule
from federation.keys import job_prefix, log_prefix, updates_prefix
from federation.points import Point
from federation.settings import env_name
from federation.types import SERVER, Accepted, ClientUpdate, DeadLetter, Evaluation, Published, Refusal
from federation.wire import encode_report, encode_update
from storage.audit import audit
from storage.jobs import list_dead_letters, list_evaluations, list_refusals
from storage.log import VersionLog, refusals
from storage.models import load_model, save_model
from storage.tensors import from_arrays
from tasks.celery import TEND_JOBS, embedded_message
from tasks.replay import replay
from tests.crashing import Order
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import Server, embedded, real, running, until
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw

SITE = "site-a"
VERSIONS = 3
"""The last one closes the job."""
LEASE_S = 1.0
"""So long the embedded queue keeps for a dead process what it had in hand."""
GRACE_S = 7200.0
"""So long retention keeps what is needed no more."""
SOON_S = 5.0
"""Patience for what should have happened before something that has happened."""


@dataclass
class Stage:
    """A server, and a job of one test's own, which is yet to be created."""

    server: Server
    job: str = field(default_factory=lambda: f"job-{new_update_id()[-12:]}")

    # --- what a test does

    def create_job(self, **changes: Any) -> None:
        self.server.create_job(job_spec(self.job, stop=StopRule(max_versions=VERSIONS), **changes))

    def send(self, value: float = 1.0, **changes: Any) -> ClientUpdate:
        """Upload a model whose weights are all `value`, and publish its update."""
        payload = payload_of(toy_arrays(value))
        update = client_update(payload, **{"job": self.job, "site": SITE} | changes)
        self.server.send(update, payload)
        return update

    def send_bytes(self, body: bytes) -> None:
        """A message in place of an update."""
        broker = self.server.as_site(SITE)
        try:
            message = encode_update(client_update(job=self.job, site=SITE))
            broker.publish(topology.UPDATES_EXCHANGE, replace(message, body=body))
        finally:
            broker.close()

    def report(self, version: int, site: str) -> None:
        measured = {
            "job": self.job,
            "version": version,
            "who": site,
            "num_images": 9,
            "at": datetime.now(UTC),
        }
        broker = self.server.as_site(site)
        try:
            message = encode_report(Evaluation(**measured, metrics={"mAP@0.5": 0.5}))
            broker.publish(topology.UPDATES_EXCHANGE, message)
        finally:
            broker.close()

    def run(self, name: str, *command: str) -> None:
        """Another process, until it has done its work; if it is killed, somebody else starts it again."""
        self.server.commands[name] = obeying(self.server, name, [*command])
        self.server.start(name)

        def ended() -> bool:
            process = self.server.processes.get(name)
            return process is not None and process.poll() == 0

        until(f"{name} to end", ended)
        del self.server.processes[name]

    # --- what came of it

    def closed(self) -> bool:
        head = self.server.head(self.job)
        return head is not None and head.closed is not None

    def kept_refusals(self) -> dict[str, Refusal]:
        """Those below rejected/, by update."""
        return {refusal.update.update_id: refusal for refusal in list_refusals(self.server.store, self.job)}

    def letters(self) -> list[DeadLetter]:
        """Those that wait and name this job."""
        waiting = list_dead_letters(self.server.store)
        return [letter for letter in waiting if self.job.encode() in b64decode(letter.body_base64)]

    def objects(self) -> set[str]:
        return set(self.server.store.list(job_prefix(self.job)))

    def check(self, merged: set[str], refused: set[str], letters: int, weight: float) -> None:
        """Wait until the job is done; then these updates, and no others, have one end each.

        An update that comes last shows that whatever was before it on its way has arrived, and that the server
        works. `weight`: what each weight of the last version is.
        """
        until("the job to close", self.closed)
        until("the dead letters to be kept", lambda: len(self.letters()) >= letters)
        late = self.send().update_id
        until("the last update to be refused", lambda: late in self.kept_refusals())
        until("all refusals to be kept", lambda: refused <= self.kept_refusals().keys(), SOON_S)

        records = list(VersionLog(self.server.store, self.job).history())
        events = [record.event for record in records]
        accepted = [e.contribution.update.update_id for e in events if isinstance(e, Accepted)]
        contributions = [c for event in events if isinstance(event, Published) for c in event.merged]
        refused_by_log = [refusal for event in events for refusal in refusals(event)]
        ends = Counter(
            [(c.update.update_id, "merged") for c in contributions]
            + [(refusal.update.update_id, "refused") for refusal in refused_by_log]
        )
        assert ends == Counter(
            [(update_id, "merged") for update_id in merged]
            + [(update_id, "refused") for update_id in refused | {late}]
        )
        assert len(accepted) == len(set(accepted))
        assert [c.version for c in contributions] == list(range(1, len(merged) + 1))
        assert records[-1].head.pending == ()
        assert self.kept_refusals() == {refusal.update.update_id: refusal for refusal in refused_by_log}
        assert len(self.letters()) == letters
        model = load_model(self.server.store, records[-1].head.current.model).arrays()
        assert np.all(model["conv.weight"] == np.float32(weight))
        self.audit()

    def audit(self) -> None:
        assert [f for f in audit(self.server.store, self.job) if f.level == "error"] == []
        assert [step for step in replay(self.server.store, self.job) if not step.equal] == []


# --- the work -----------------------------------------------------------------------------------------------------


def serve(stage: Stage) -> None:
    """Whatever a server meets: good updates, bad ones, a repeated one, and messages that are no updates."""
    stage.create_job()
    send_everything(stage)()


def keep_reports(stage: Stage) -> None:
    """Sites report what they measured, one of them twice, and one of a version that never was."""
    stage.create_job(evaluation=EvaluationPolicy(sites_every=1))
    good = [stage.send() for _ in range(VERSIONS)]
    until("the job to close", stage.closed)
    for version, site in ((VERSIONS, SITE), (VERSIONS, "site-b"), (VERSIONS, SITE), (VERSIONS + 1, SITE)):
        stage.report(version, site)
    until("the reports", lambda: len(list_evaluations(stage.server.store, stage.job)) == 2)
    stage.check({u.update_id for u in good}, set(), letters=1, weight=1 - 0.5**VERSIONS)
    kept = [(e.version, e.who) for e in list_evaluations(stage.server.store, stage.job)]
    assert kept == [(VERSIONS, SITE), (VERSIONS, "site-b")]


def serve_backlog(stage: Stage) -> None:
    """The same after a pause, for a job that has room for one pending update: the task that accepts publishes."""
    stage.create_job(aggregation=job_spec().aggregation.model_copy(update={"max_pending": 1}))
    worker = process_of("worker", stage.server)
    stage.server.kill(worker)
    check = send_everything(stage)
    stage.server.start(worker)
    check()


def send_everything(stage: Stage) -> Callable[[], None]:
    """Returns the check."""
    not_finite = stage.send(float("nan"))  # found out when it is read, so by the first publish
    from_the_future = stage.send(base_version=10**6)
    stage.send_bytes(f"an update of {stage.job}, but not in JSON".encode())
    stage.send(job=f"{stage.job}-which-does-not-exist")
    another = stage.server.submit(job_spec(stage.job, classes=("another", "job", "of", "this", "name")))
    good = [stage.send() for _ in range(VERSIONS)]
    stage.server.send(good[0], None)

    def check() -> None:
        (error,) = stage.server.answer(another).errors
        assert "there is a job" in error
        merged = {update.update_id for update in good}
        refused = {not_finite.update_id, from_the_future.update_id}
        stage.check(merged, refused, letters=2, weight=1 - 0.5**VERSIONS)

    return check


def contribute(stage: Stage, trainings: int = VERSIONS) -> None:
    """A site works until the job closes. `trainings`: how many that takes."""
    stage.create_job()
    stage.run("agent", "tests.toy_site", stage.job)
    folder = stage.server.settings.site_state / stage.job
    assert [path for name in ("out", "sent") for path in (folder / name).iterdir()] == []
    uploaded = {Path(key).stem for key in stage.server.store.list(updates_prefix(stage.job))}
    assert len(uploaded) == VERSIONS  # what was finished keeps its id
    log = (stage.server.folder / "agent.log").read_text()
    assert log.count("training from version") == trainings
    stage.check(uploaded, set(), letters=0, weight=0.5 * VERSIONS)


def requeue(stage: Stage) -> None:
    """An operator sends an update again that came before its job."""
    early = stage.send()
    until("the dead letter", stage.letters)
    stage.create_job()
    (letter,) = stage.letters()
    stage.run("operator", "cli.main", "deadletter", "requeue", letter.id)
    good = [stage.send() for _ in range(VERSIONS - 1)]
    merged = {update.update_id for update in (early, *good)}
    stage.check(merged, set(), letters=0, weight=1 - 0.5**VERSIONS)


def collect(stage: Stage, ask: Callable[[Stage], None]) -> None:
    """Retention takes from a job that is long over what nobody needs, and nothing else."""
    serve(stage)
    kept = stage.objects()
    garbage = {refusal.update.payload_key for refusal in stage.kept_refusals().values()}
    orphan = client_update(job=stage.job, site=SITE).payload_key
    stage.server.store.put_if_absent(orphan, b"uploaded and never published")
    unnamed = save_model(stage.server.store, stage.job, from_arrays(toy_arrays(7.0)))
    garbage |= {orphan, unnamed.key}
    garbage |= {
        *stage.server.store.list(f"{updates_prefix(stage.job)}{SERVER}/")
    }  # of the job that was refused
    long_ago = time.time() - 2 * GRACE_S
    root = Path(stage.server.settings.store_url.removeprefix("file:"))
    for key in stage.objects():
        os.utime(root / key, (long_ago, long_ago))
    ask(stage)
    until("the garbage to be gone", lambda: not garbage & stage.objects())
    assert {
        key for key in kept - garbage ^ stage.objects() if not key.startswith(log_prefix(stage.job))
    } == set()
    assert [f for f in audit(stage.server.store, stage.job) if f.subject in garbage] == []
    stage.audit()


def by_task(stage: Stage) -> None:
    broker = connect(stage.server.settings)
    broker.publish(topology.TASKS_EXCHANGE, embedded_message(TEND_JOBS, {}))
    broker.close()


def by_command(stage: Stage) -> None:
    stage.run("operator", "cli.main", "gc", stage.job)


# --- who dies where -----------------------------------------------------------------------------------------------

Work = Callable[[Stage], None]


@dataclass(frozen=True)
class Scenario:
    """`victim` dies when it reaches the point for the `time`-th time during `work`.

    victim: ingress and worker, which are one process on the embedded queue; or a process of the embedded mode.
    """

    victim: str
    work: Work
    time: int = 1
    again: bool = False
    """Die once more, at the same point, after the restart."""

    @property
    def name(self) -> str:
        work = self.work.func if isinstance(self.work, partial) else self.work
        again = "-again" if self.again else ""
        return f"{self.victim}-{work.__name__}-{self.time}{again}"


DIES_SERVING = Scenario("worker", serve)
DIES_TWICE = replace(DIES_SERVING, again=True)
DIES_PUBLISHING = Scenario("worker", serve_backlog)
"""More than one publish, certainly: `serve` may come to its last version with the first."""
DIES_CONTRIBUTING = Scenario("agent", contribute)
DIES_BEFORE_IT_IS_KEPT = Scenario("agent", partial(contribute, trainings=VERSIONS + 1))
DIES_STORING = (
    *(Scenario("aggregator", contribute, time) for time in (1, 2, 5, 7, 8)),
    Scenario("agent", contribute),
)
"""The copy of a new job's model, job.json, the answer, the first merge's model, its record; a site's upload."""

SCENARIOS: dict[Point, tuple[Scenario, ...]] = {
    Point.TRAINED: (DIES_BEFORE_IT_IS_KEPT,),
    Point.OUTBOX_PAYLOAD: (DIES_BEFORE_IT_IS_KEPT,),
    Point.OUTBOX_PUT: (DIES_CONTRIBUTING,),
    Point.UPLOADED: (DIES_CONTRIBUTING,),
    Point.CONFIRMED: (DIES_CONTRIBUTING, replace(DIES_CONTRIBUTING, again=True)),
    Point.OUTBOX_MOVED: (DIES_CONTRIBUTING,),
    Point.TASK_SENT: (Scenario("ingress", serve), Scenario("ingress", keep_reports, VERSIONS + 1)),
    Point.LETTER_SENT: (Scenario("ingress", serve),),
    Point.LETTER_PASSED: (Scenario("ingress", serve),),
    Point.ACCEPTED: (DIES_SERVING, DIES_TWICE),
    Point.PUBLISH_ASKED: (DIES_SERVING,),
    Point.REFUSED: (DIES_SERVING,),
    Point.FOLDED: (DIES_SERVING,),
    Point.MODEL_STORED: (DIES_SERVING, DIES_TWICE),
    Point.PUBLISHED: (DIES_SERVING, DIES_PUBLISHING, replace(DIES_PUBLISHING, again=True)),
    Point.TOLD: (DIES_SERVING,),
    Point.REPORT_KEPT: (Scenario("worker", keep_reports), Scenario("worker", keep_reports, 2)),
    Point.MODELS_COPIED: (DIES_SERVING, DIES_TWICE),
    Point.JOB_WRITTEN: (DIES_SERVING,),
    Point.ANSWERED: (DIES_SERVING,),
    Point.LETTER_KEPT: (DIES_SERVING,),
    Point.COLLECTED: (Scenario("operator", partial(collect, ask=by_command)),),
    Point.DELETED: (Scenario("aggregator", partial(collect, ask=by_task)),),
    Point.REQUEUE_BEGAN: (Scenario("operator", requeue),),
    Point.REQUEUE_SENT: (Scenario("operator", requeue),),
    Point.FILE_WRITTEN: DIES_STORING,
    Point.FILE_NAMED: DIES_STORING,
}

CHILD_DIES_TOO = (Point.ACCEPTED, Point.MODEL_STORED, Point.PUBLISHED)
"""What a parent does when its child is gone is the same at every point."""

TEND_EVERY_S = 1
"""A refusal that a publish records before it dies is told by tend_jobs: soon enough for a test."""


def process_of(victim: str, server: Server) -> str:
    """The process that does the work of `victim`."""
    return "aggregator" if victim in ("ingress", "worker") and server.settings.embedded else victim


def order(server: Server, process: str) -> Order:
    return Order(server.folder / f"{process}.order")


def obeying(server: Server, process: str, command: list[str]) -> list[str]:
    return ["tests.crashing", str(order(server, process).path), *command]


def obedient(server: Server) -> Server:
    return replace(server, commands={name: obeying(server, name, c) for name, c in server.commands.items()})


def crash(server: Server, point: Point, scenario: Scenario, *, child: bool = False) -> None:
    """Play `scenario`. child: a parent replaces the victim, so nobody has to start it again."""
    process = process_of(scenario.victim, server)
    death = order(server, process)
    death.give(point, scenario.time, group=not child)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(scenario.work, Stage(server))
        for deaths_left in (1, 0) if scenario.again else (0,):
            until(f"{process} to reach Point.{point.name}", lambda: work.done() or not death.waits())
            if death.waits():
                death.withdraw()
                work.result()
                pytest.fail(f"{process} has done all its work and never reached Point.{point.name}")
            if child:
                break
            assert server.processes.pop(process).wait(30) == -signal.SIGKILL
            if deaths_left:
                death.give(point, group=True)
            server.start(process)
        work.result()
    assert server.alive()


# --- embedded -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """A server in one process, with what a site has in its environment."""
    made = embedded(tmp_path)
    values = {"lease_s": LEASE_S, "gc_grace_s": GRACE_S, "site": SITE, "site_state": tmp_path / "state"}
    values |= {"poll_s": 0.1, "backoff_limit_s": 0.5}
    made.environment |= {env_name(name): str(value) for name, value in values.items()}
    with running(obedient(made)) as server:
        yield server


def embedded_cases() -> list[Any]:
    return [
        pytest.param(point, scenario, id=f"{point.name}-{scenario.name if scenario else 'new'}")
        for point in Point
        for scenario in SCENARIOS.get(point, (None,))
    ]


@pytest.mark.parametrize(("point", "scenario"), embedded_cases())
def test_crash(small: Server, point: Point, scenario: Scenario | None) -> None:
    if scenario is None:
        pytest.fail(f"Point.{point.name} is new: say in SCENARIOS who dies there, and at which work")
    if point is Point.PUBLISHED:
        small.environment[env_name("gc_every_s")] = str(TEND_EVERY_S)  # of the one that goes on
    crash(small, point, scenario)


# --- real servers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(
    tmp_path_factory: pytest.TempPathFactory,
    rabbitmq_server: RabbitMQ,
    redis_server: RedisServer,
    s3_server: Rgw,
) -> Iterator[Server]:
    made = real(tmp_path_factory.mktemp("server"), rabbitmq_server, redis_server, s3_server)
    made.environment[env_name("gc_every_s")] = str(TEND_EVERY_S)
    made.environment[env_name("store_url")] = s3_server.url("crash-points")  # no jobs of other tests to tend
    with running(obedient(made)) as server:
        yield server


def real_cases() -> list[Any]:
    return [
        pytest.param(
            point,
            scenario,
            child,
            id=f"{point.name}-{scenario.name}{'-child' if child else ''}",
        )
        for point, scenarios in SCENARIOS.items()
        for scenario in scenarios
        if scenario.victim in ("ingress", "worker") and not scenario.again
        for child in ((False, True) if point in CHILD_DIES_TOO else (False,))
    ]


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.s3
@pytest.mark.parametrize(("point", "scenario", "child"), real_cases())
def test_crash_over_real_servers(large: Server, point: Point, scenario: Scenario, child: bool) -> None:
    crash(large, point, scenario, child=child)
