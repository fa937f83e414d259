"""Processes and servers die while work is under way: nothing is lost, nothing counts twice, nobody restarts by hand.

All tests but the embedded one share a RabbitMQ node, an S3 server on disk and a Redis of this file's own, because
they kill them; each leaves everything running.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pika
import pytest

import broker.rabbitmq
from broker import topology
from federation.errors import Transient
from federation.ids import new_update_id
from federation.jobs import StopRule
from federation.settings import env_name
from federation.wire import Message
from producers.outbox import Outbox
from storage.liveness import open_liveness
from tests.factories import client_update, job_spec, payload_of
from tests.integration.backlog import Backlog, merged, random_arrays
from tests.integration.servers import Server, embedded, end, real, running, site_process, until
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw
from tests.toy_site import ToyTrainer, agent

REAL = (pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.s3)
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


def deliver_after_an_outage(
    server: Server, folder: Path, stop: Callable[[], None], start: Callable[[], object]
) -> None:
    """What was finished in the outage by an agent that was then killed is merged once, under its id."""
    job = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(job, stop=StopRule(max_versions=1)))
    site = site_process(server, folder, job, seconds=3.0)
    outbox = Outbox(server.site_settings("site-a").site_state / job)
    try:
        site.start("agent")
        until("training", lambda: "training from version 0" in site.logs())
        assert not list(outbox.waiting())
        with outage(stop, start):
            until("the agent to try in vain", lambda: " waiting " in site.logs().partition(": finished")[2])
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
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    settings = server.site_settings("site-a").model_copy(update={"poll_s": 0.1})
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


@contextmanager
def nobody_restarted(server: Server) -> Iterator[None]:
    """What happens inside must not end any process of the server."""
    processes = {name: process.pid for name, process in server.processes.items()}
    yield
    assert server.alive()
    assert {name: process.pid for name, process in server.processes.items()} == processes


def send_as_soon_as_possible(backlog: Backlog) -> None:
    def sent() -> bool:
        try:
            backlog.send(1)
        except Transient:  # the queues elect their leaders after the node has started
            return False
        return True

    until("the broker to take an update", sent)


@real_only
@pytest.mark.parametrize(
    "away_s",
    [
        pytest.param(0.0, id="for a moment"),
        pytest.param(
            65.0, id="for a minute", marks=pytest.mark.chaos
        ),  # a minute and a half: not for each run
    ],
)
def test_rabbitmq_away_while_everybody_is_idle(deployment: Deployment, away_s: float) -> None:
    server = deployment.server
    backlog = Backlog(server)
    backlog.send(1)
    until("the first merge", lambda: len(backlog.merged()) == 1)
    with nobody_restarted(server):
        with outage(deployment.rabbitmq.stop, deployment.rabbitmq.start):
            time.sleep(away_s)  # the outage itself: long enough for every backoff to reach its limit
        send_as_soon_as_possible(backlog)
        backlog.wait_and_check()


@real_only
def test_server_processes_that_start_before_the_servers(deployment: Deployment) -> None:
    server, rabbitmq = deployment.server, deployment.rabbitmq
    backlog = Backlog(server)
    for name in server.commands:
        server.kill(name)
    ingress = server.folder / "ingress.log"
    start = len(ingress.read_text())
    with outage(rabbitmq.stop, rabbitmq.start):
        for name in server.commands:
            server.start(name)
        until("the ingress to wait", lambda: "waiting " in ingress.read_text()[start:])
    send_as_soon_as_possible(backlog)
    backlog.wait_and_check()
    assert server.alive()


@real_only
@pytest.mark.parametrize("stop", ["stop", "kill"])
def test_rabbitmq_lost_in_the_middle_of_a_task(deployment: Deployment, stop: str) -> None:
    """The task waits for the store, so that it is certainly running when the broker goes."""
    server, rabbitmq, s3 = deployment.server, deployment.rabbitmq, deployment.s3
    backlog = Backlog(server)
    log = server.folder / "worker.log"
    start = len(log.read_text())
    payload = payload_of(random_arrays(1))
    update = client_update(payload, job=backlog.job)
    server.store.put_if_absent(update.payload_key, payload)
    with nobody_restarted(server):
        with outage(lambda: s3.stop(kill=True), s3.start):
            server.send(update, None)
            until("the task to wait for the store", lambda: ": waiting " in log.read_text()[start:])
            with outage(getattr(rabbitmq, stop), rabbitmq.start):
                until("the worker to notice", lambda: "onnection to broker lost" in log.read_text()[start:])
        backlog.ids.append(update.update_id)
        send_as_soon_as_possible(backlog)
        backlog.wait_and_check()


@real_only
def test_redis_away_and_back(deployment: Deployment, tmp_path: Path) -> None:
    server, redis = deployment.server, deployment.redis
    backlog = Backlog(server)
    liveness = open_liveness(server.settings)

    def alive() -> list[str]:
        return [seen.status.site for seen in liveness.sites() if seen.status.job == backlog.job]

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
