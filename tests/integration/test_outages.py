"""Processes and servers die while work is under way: nothing is lost, nothing counts twice, nobody restarts by hand.

All tests but the embedded one share a RabbitMQ node, an S3 server on disk and a Redis of this file's own, because
they kill them; each leaves everything running.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pika
import pytest

import broker.rabbitmq
from broker import topology
from federation.errors import Transient
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, StopRule
from federation.keys import DEADLETTERS_PREFIX
from federation.settings import env_name
from federation.types import Contribution, Published
from federation.wire import Message
from producers.outbox import Outbox
from storage.liveness import open_liveness
from storage.log import VersionLog
from storage.models import load_model
from storage.tensors import decode
from tests.factories import Arrays, client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import Server, embedded, real, running, until
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw
from tests.toy_site import ToyTrainer, agent

REAL = (pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.s3)
ALPHA = 0.6
# A publish for every few accepts, so that a kill meets both; all updates have base 0, so each weighs differently.
POLICY = AggregationPolicy(strategy="fedasync", alpha=ALPHA, max_pending=4, max_staleness=1000)
BACKLOG = 30
KILLS = 3


def real_only(test: Callable[..., None]) -> Callable[..., None]:
    for mark in REAL:
        test = mark(test)
    return test


@dataclass
class Deployment:
    """A server over real servers that may be killed."""

    server: Server
    rabbitmq: RabbitMQ
    redis: RedisServer
    s3: Rgw


@contextmanager
def outage(stop: Callable[[], None], start: Callable[[], object]) -> Iterator[None]:
    """Always ends, so that a test that fails in it leaves the servers to the next one."""
    stop()
    try:
        yield
    finally:
        start()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        s3 = stack.enter_context(Rgw(store="bluestore"))
        rabbitmq = RabbitMQ(tmp_path_factory.mktemp("outage-rabbitmq"))
        rabbitmq.start()
        stack.callback(rabbitmq.stop)
        server = real(tmp_path_factory.mktemp("outage-server"), rabbitmq, redis, s3)
        yield Deployment(stack.enter_context(running(server)), rabbitmq, redis, s3)


# --- what the log says ---------------------------------------------------------------------------------------


@dataclass
class Backlog:
    """A job and the updates that were sent to it, each with its own random model."""

    server: Server
    job: str = field(default_factory=lambda: f"job-{new_update_id()[-12:]}")
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.create_job(job_spec(self.job, aggregation=POLICY), random_arrays(0))

    def send(self, count: int) -> None:
        for _ in range(count):
            payload = payload_of(random_arrays(len(self.ids) + 1))
            update = client_update(payload, job=self.job)
            self.server.send(update, payload)
            self.ids.append(update.update_id)

    def accepted(self) -> int:
        """How many updates are in the log."""
        head = self.server.head(self.job)
        assert head is not None
        return head.version + len(head.pending)

    def merged(self) -> list[Contribution]:
        """In log order."""
        return merged(self.server, self.job)

    def wait_and_check(self) -> None:
        """Every update merged exactly once, and the model is what the formula gives in the log's order."""
        until(
            "all updates to be merged",
            lambda: (head := self.server.head(self.job)) is not None and head.version >= len(self.ids),
        )
        contributions = self.merged()
        assert sorted(c.update.update_id for c in contributions) == sorted(self.ids)
        assert [c.version for c in contributions] == list(range(1, len(self.ids) + 1))
        head = self.server.head(self.job)
        assert head is not None
        assert (head.version, head.pending) == (len(self.ids), ())
        assert not list(self.server.store.list(DEADLETTERS_PREFIX))
        expected = random_arrays(0)
        for staleness, contribution in enumerate(contributions):
            assert contribution.staleness == staleness
            assert contribution.weight == ALPHA * (1 + staleness) ** -0.5
            data = self.server.store.get(contribution.update.payload_key, max_bytes=1 << 20)
            expected = fedasync(expected, dict(decode(data).arrays()), contribution.weight)
        arrays = load_model(self.server.store, head.current.model).arrays()
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            assert arrays[name].tobytes() == array.tobytes(), name


def merged(server: Server, job: str) -> list[Contribution]:
    events = [record.event for record in VersionLog(server.store, job).history()]
    return [c for event in events if isinstance(event, Published) for c in event.merged]


def random_arrays(seed: int) -> Arrays:
    """Some 150 KB, so that a merge takes long enough to be hit."""
    rng = np.random.default_rng(seed)
    arrays = toy_arrays() | {"conv.weight": np.zeros((64, 64, 3, 3), np.float32)}
    for name, array in arrays.items():
        arrays[name] = rng.standard_normal(array.shape).astype(np.float32)
    arrays["norm.running_var"] = np.square(arrays["norm.running_var"])
    arrays["norm.num_batches_tracked"] = np.array(seed, np.int64)
    return arrays


def fedasync(model: Arrays, payload: Arrays, a: float) -> Arrays:
    """x ← (1-α)x + αy as a step from the nearer end in float32; statistics as those of a mixture, in float64."""
    mixed = {}
    mean, var = (model[f"norm.running_{name}"].astype(np.float64) for name in ("mean", "var"))
    other_mean, other_var = (payload[f"norm.running_{name}"].astype(np.float64) for name in ("mean", "var"))
    for name, x in model.items():
        y = payload[name]
        if name == "norm.num_batches_tracked":
            mixed[name] = np.maximum(x, y)
        elif name == "norm.running_mean":
            mixed[name] = ((1 - a) * mean + a * other_mean).astype(np.float32)
        elif name == "norm.running_var":
            apart = a * (1 - a) * np.square(other_mean - mean)
            mixed[name] = ((1 - a) * var + a * other_var + apart).astype(np.float32)
        else:
            mixed[name] = x + (y - x) * np.float32(a) if a < 0.5 else y - (y - x) * np.float32(1 - a)
    return mixed


def kill_at_work(server: Server, name: str, backlog: Backlog, left: Callable[[], int]) -> None:
    """kill -9 process `name` KILLS times in the middle of a backlog; `left`: what it has still to do.

    A kill that came too late, because the backlog was done, is repeated with a new one.
    """
    server.kill(name)
    backlog.send(BACKLOG)
    hits = 0
    while hits < KILLS:
        if hit(server, name, left):
            hits += 1
        else:
            backlog.send(BACKLOG // 3)
    server.start(name)


def hit(server: Server, name: str, left: Callable[[], int]) -> bool:
    """Start the process, kill it when it has done something; True if it had not done all."""
    until("the backlog to be waiting", left)
    before = left()
    server.start(name)
    until(f"{name} to work", lambda: left() < before)
    server.kill(name)
    return bool(left())


@real_only
def test_worker_killed_at_work(deployment: Deployment) -> None:
    backlog = Backlog(deployment.server)
    kill_at_work(deployment.server, "worker", backlog, lambda: len(backlog.ids) - backlog.accepted())
    backlog.wait_and_check()


@real_only
def test_ingress_killed_at_work(deployment: Deployment) -> None:
    backlog = Backlog(deployment.server)
    kill_at_work(deployment.server, "ingress", backlog, lambda: deployment.rabbitmq.depth(topology.UPDATES))
    backlog.wait_and_check()


def test_embedded_aggregator_killed_at_work(tmp_path: Path) -> None:
    made = embedded(tmp_path)
    # what the killed process had in hand comes back when its lease ends
    made.environment[env_name("lease_s")] = "2"
    with running(made) as server:
        backlog = Backlog(server)
        kill_at_work(server, "aggregator", backlog, lambda: len(backlog.ids) - backlog.accepted())
        backlog.wait_and_check()


# --- the store is away in the middle of a backlog --------------------------------------------------------------


@real_only
def test_worker_waits_for_the_store_in_the_middle_of_a_backlog(deployment: Deployment) -> None:
    server = deployment.server
    backlog = Backlog(server)
    log = server.folder / "worker.log"
    server.kill("worker")
    backlog.send(BACKLOG)
    start = len(log.read_text())
    server.start("worker")
    until("the worker to work", backlog.accepted)
    with outage(lambda: deployment.s3.stop(kill=True), deployment.s3.start):
        # each wait follows four attempts of the store's own: three of them are some five seconds
        until("the worker to wait", lambda: log.read_text()[start:].count(": waiting ") >= 3)
    assert backlog.accepted() < BACKLOG
    backlog.wait_and_check()
    assert "giving the message back" not in log.read_text()[start:]
    assert server.alive()


# --- a site's finished update waits out an outage -----------------------------------------------------------------


def site_process(server: Server, folder: Path, job: str, seconds: float, **settings: str) -> Server:
    """The agent of site-a as a process of its own, `agent`, with its own account."""
    values = {"site": "site-a", "site_state": str(folder / "state"), "poll_s": "0.1"}
    values |= {"backoff_limit_s": "0.5", "broker_url": server.site_urls["site-a"]} | settings
    environment = server.environment | {env_name(name): value for name, value in values.items()}
    commands = {"agent": ["tests.toy_site", job, str(seconds)]}
    return replace(server, environment=environment, folder=folder, commands=commands, processes={})


def end(site: Server) -> None:
    if site.processes and site.alive():
        site.kill("agent")


def deliver_after_an_outage(
    server: Server, folder: Path, stop: Callable[[], None], start: Callable[[], object]
) -> None:
    """What was finished in the outage by an agent that was then killed is merged once, under its id."""
    job = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(job, stop=StopRule(max_versions=1)))
    site = site_process(server, folder, job, seconds=3.0)
    outbox = Outbox(folder / "state" / job)
    try:
        site.start("agent")
        until("training", lambda: "training from version 0" in site.logs())
        assert not list(outbox.waiting())
        with outage(stop, start):
            until("the agent to try in vain", lambda: " waiting " in site.logs())
            (update,) = outbox.waiting()
            site.kill("agent", signal.SIGKILL)
        assert list(outbox.waiting()) == [update]
        site.start("agent")
        until("the agent to end", lambda: site.processes["agent"].poll() is not None)
        assert site.processes["agent"].returncode == 0, site.logs()
        assert [c.update for c in merged(server, job)] == [update]
        assert not list(outbox.waiting())
        assert not outbox.sent()
        assert site.logs().count("training from version") == 1
        assert server.alive()
    finally:
        print(site.logs())
        end(site)


@real_only
def test_update_finished_while_rabbitmq_is_down(deployment: Deployment, tmp_path: Path) -> None:
    rabbitmq = deployment.rabbitmq
    deliver_after_an_outage(deployment.server, tmp_path, rabbitmq.kill, rabbitmq.start)


@real_only
def test_update_finished_while_the_store_is_down(deployment: Deployment, tmp_path: Path) -> None:
    s3 = deployment.s3
    deliver_after_an_outage(deployment.server, tmp_path, lambda: s3.stop(kill=True), s3.start)


@real_only
def test_long_training_outlives_the_brokers_patience(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two trainings of several heartbeat intervals: a connection that was kept meanwhile is dead, ours is new."""
    monkeypatch.setattr(broker.rabbitmq, "PUBLISH_HEARTBEAT_S", 1)
    attempts: list[str] = []
    publish_once = broker.rabbitmq.RabbitBroker._publish_once

    def counted(self: broker.rabbitmq.RabbitBroker, exchange: str, message: Message) -> None:
        attempts.append(message.routing_key)
        publish_once(self, exchange, message)

    monkeypatch.setattr(broker.rabbitmq.RabbitBroker, "_publish_once", counted)
    caplog.set_level(logging.INFO)
    server = deployment.server
    job = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(job, stop=StopRule(max_versions=2)))
    settings = server.site_settings("site-a").model_copy(update={"site_state": tmp_path, "poll_s": 0.1})
    parameters = pika.URLParameters(server.site_urls["site-a"])
    parameters.heartbeat = 1
    kept = pika.BlockingConnection(parameters)
    thread = threading.Thread(target=agent(settings, job, ToyTrainer(4.0), threading.Event()).run)
    thread.start()
    until("the agent to end", lambda: not thread.is_alive())
    assert kept.is_open  # so it says
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        kept.channel()
    assert len(merged(server, job)) == 2
    assert attempts.count("updates.site-a") == 2
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


# --- servers come back by themselves ----------------------------------------------------------------------------


@real_only
def test_rabbitmq_restarted_while_everybody_is_idle(deployment: Deployment) -> None:
    server = deployment.server
    backlog = Backlog(server)
    backlog.send(1)
    until("the first merge", lambda: len(backlog.merged()) == 1)
    processes = {name: process.pid for name, process in server.processes.items()}
    with outage(deployment.rabbitmq.stop, deployment.rabbitmq.start):
        pass

    def sent() -> bool:
        try:
            backlog.send(1)
        except Transient:  # the queues elect their leaders after the node has started
            return False
        return True

    until("the broker to take an update", sent)
    backlog.wait_and_check()
    assert server.alive()
    assert {name: process.pid for name, process in server.processes.items()} == processes


@real_only
def test_redis_away_and_back(deployment: Deployment, tmp_path: Path) -> None:
    server, redis = deployment.server, deployment.redis
    backlog = Backlog(server)
    liveness = open_liveness(server.settings)

    def alive() -> list[str]:
        return [status.site for status in liveness.sites() if status.job == backlog.job]

    site = site_process(server, tmp_path, backlog.job, seconds=600.0, heartbeat_s="0.2")
    site.start("agent")
    try:
        until("heartbeats", lambda: alive() == ["site-a"])
        with outage(redis.stop, redis.start):
            ingress = server.folder / "ingress.log"
            until("the ingress to notice", lambda: "liveness is down" in ingress.read_text())
            backlog.send(3)
            backlog.wait_and_check()
        until("heartbeats again", lambda: alive() == ["site-a"])
        backlog.send(1)
        backlog.wait_and_check()
    finally:
        end(site)
    assert server.alive()
