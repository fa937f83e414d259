"""The agent and its jobs, beside a server that works whenever the site looks for what it was told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from broker import topology
from broker.sqlite import SqliteBroker
from federation.errors import BadDataset, BadJob, BrokerUnavailable, Rejected
from federation.governance import Member
from federation.jobs import JobSpec, Participation, StopRule
from federation.requests import DeclineJob, JoinJob, Request
from federation.settings import Settings
from federation.types import SERVER, SiteStatus
from federation.wire import Delivery, Message
from producers.agent import SiteAgent
from producers.membership import REPEAT_AFTER_S, Membership
from producers.outbox import Outbox
from producers.policy import Declined
from storage.control import load_member
from storage.jobs import list_refusals
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks import requests
from tasks.accept import accept
from tasks.closing import close
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.site_messages import task_for
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.toy_site import ToyTrainer

MANY_TURNS = 2000


class Server:
    """A store, a queue, and what handles each message at once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, MemoryStore()
        self.broker = SqliteBroker(str(folder / "queue.db"), lease_s=60, delivery_limit=20)
        self.broker.declare(("site-a",))
        self.context = Context(Settings(), self.store, self.broker, self.task)
        self.requests: list[Request] = []
        self.deaf = False

    def create(self, job: str, **changes: Any) -> JobSpec:
        spec = job_spec(job, **({"stop": StopRule(max_versions=3)} | changes))
        ref = save_model(self.store, job, from_arrays(toy_arrays()))
        create(self.context, spec, ref, ref)
        return spec

    def task(self, name: str, arguments: Mapping[str, str]) -> None:
        if name == "fedqueue.publish_version":
            publish_pending(self.context, self.context.job(arguments["job"]))
        elif name == "fedqueue.accept_update":
            accept(self.context, type(client_update()).from_json(arguments["update"]))
        elif name == "fedqueue.handle_request":
            request = Request.from_json(arguments["request"])
            self.requests.append(request)
            if not self.deaf:
                requests.handle(self.context, request)

    def work(self) -> None:
        for delivery in self.broker.drain(topology.UPDATES):
            self.task(*task_for(delivery))

    def member(self, job: str) -> Member | None:
        return load_member(self.store, job, "site-a")

    def close_job(self, job: str) -> None:
        close(self.context, self.context.job(job), "enough")

    def is_closed(self, *jobs: str) -> bool:
        return all(self.context.log(job).head().head.closed is not None for job in jobs)


class Hearing(SqliteBroker):
    """The site's broker: when it listens, the server works; `done` ends the agent."""

    server: Server
    done: Callable[[], bool]
    stop: threading.Event
    turns = 0

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        self.server.work()
        self.turns += 1
        if self.done():
            self.stop.set()
        assert self.turns < MANY_TURNS, "the agent did not come to its end"
        return super().drain(queue, limit)


@dataclass
class Ran:
    """What came of a run."""

    status: SiteStatus
    trainers: dict[str, ToyTrainer] = field(default_factory=dict)

    def bases(self, job: str) -> list[int]:
        return self.trainers[job].bases if job in self.trainers else []


def run(
    server: Server,
    done: Callable[[SiteStatus], bool],
    *jobs: str,
    trainers: dict[str, ToyTrainer] | None = None,
    classes: Sequence[str] = ("thing",),
    **settings: Any,
) -> Ran:
    """An agent until `done`, which is asked at each turn; with named jobs, until it ends by itself."""
    stop, own = threading.Event(), trainers if trainers is not None else {}
    broker = Hearing(str(server.folder / "queue.db"), lease_s=60, delivery_limit=20)
    brokers: Iterator[SqliteBroker] = iter([broker])
    values = {
        "site": "site-a",
        "site_state": server.folder / "site",
        "poll_s": 0.005,
        "backoff_limit_s": 0.01,
    }
    agent = SiteAgent(
        Settings(**(values | settings)),
        jobs,
        server.store,
        lambda: next(brokers, server.broker),
        lambda spec: own.setdefault(spec.id, ToyTrainer()),
        stop,
        classes=classes,
    )
    seen: list[SiteStatus] = []

    def is_done() -> bool:
        seen.append(agent._heartbeat.status)
        return done(seen[-1])

    broker.server, broker.done, broker.stop = server, is_done, stop
    agent.run()
    server.work()
    return Ran(seen[-1], own)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def waits(why: str) -> Callable[[SiteStatus], bool]:
    return lambda status: why in status.detail


def test_a_job_that_is_broken_does_not_stall_the_others(server: Server) -> None:
    broken, good = server.create("broken"), server.create("good")
    server.store.delete(server.context.log(broken.id).head().head.current.model.key)
    ref = server.context.job(good.id).initial
    assert server.store.size(ref.key)
    ran = run(server, lambda status: server.is_closed("good") and "broken" in status.problem)
    assert ran.bases("good") == [0, 1, 2]
    assert ran.status.problem == "broken: CorruptLog; the site's log says more"


@pytest.mark.parametrize("why", ["closed", "declined"])
def test_what_was_finished_is_delivered_though_the_site_takes_no_part_any_more(
    server: Server, why: str
) -> None:
    server.create("toy")
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload)
    Outbox(server.folder / "site" / "toy").put(update, payload)
    if why == "closed":
        server.close_job("toy")
    outbox = Outbox(server.folder / "site" / "toy")

    def delivered(status: SiteStatus) -> bool:
        return not outbox.sent() and not list(outbox.waiting()) and waits("for a job")(status)

    ran = run(server, delivered, classes=("another",) if why == "declined" else ("thing",))
    assert ran.bases("toy") == []
    if why == "closed":
        assert [r.reason for r in list_refusals(server.store, "toy")] == ["job-closed"]
        assert server.requests == []
    else:
        assert server.context.log("toy").head().head.version == 1
        member = server.member("toy")
        assert member is not None
        assert member.answer == "declined"


def test_a_closed_job_costs_nothing(server: Server) -> None:
    server.create("toy")
    server.close_job("toy")
    ran = run(server, waits("for a job"))
    assert (ran.trainers, server.requests) == ({}, [])
    assert not (server.folder / "site" / "toy").exists()


def test_a_declined_job_is_looked_at_again_when_the_site_starts_again(server: Server) -> None:
    server.create("toy")
    run(server, lambda status: server.member("toy") is not None, classes=("another",))
    first = server.member("toy")
    assert first is not None
    assert first.answer == "declined"
    run(server, lambda status: server.is_closed("toy"))
    second = server.member("toy")
    assert second is not None
    assert (second.answer, second.num_images) == ("joined", 10)


def test_a_site_that_starts_again_does_not_join_again(server: Server) -> None:
    server.create("toy", participation=Participation(min_sites=2))
    for _ in range(2):
        run(server, lambda status: server.member("toy") is not None and waits("2 must join")(status))
    assert len(server.requests) == 1


def test_a_site_that_the_server_refuses_does_not_train(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: Context, request: Request) -> str:
        raise Rejected("site site-a has another key")

    monkeypatch.setattr("tasks.members.join", refuse)
    server.create("toy", max_inflight=1)
    trainer = ToyTrainer()
    ran = run(server, waits("refused this site: site site-a has another key"), trainers={"toy": trainer})
    assert len(server.requests) == 1
    assert len(ran.bases("toy")) <= 1, "the answer may come while the first training runs"


def hours_that_are_not_now() -> str:
    begin = datetime.now() + timedelta(hours=2)
    return f"{begin:%H:%M}-{begin + timedelta(hours=1):%H:%M}"


@pytest.mark.parametrize(
    ("settings", "detail"),
    [({"site_hours": hours_that_are_not_now()}, "for its hours"), ({"site_max_load": 1e-9}, "for a load of")],
)
def test_a_site_that_may_not_train_now_joins_and_waits(
    server: Server, settings: dict[str, Any], detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producers.agent.load_per_core", lambda: 0.7)
    server.create("toy")
    ran = run(server, lambda status: waits(detail)(status) and server.member("toy") is not None, **settings)
    assert ran.bases("toy") == []
    assert ran.status.state == "waiting"


def test_an_interval_lies_between_two_trainings(server: Server) -> None:
    server.create("toy", participation=Participation(min_interval_s=3600))
    for trained in ([0], []):
        ran = run(server, waits("s until its next training"))
        assert ran.bases("toy") == trained


class Unfit(ToyTrainer):
    def prepare(self, spec: JobSpec) -> None:
        raise BadDataset("frames/mrs-miller.jpg: cannot be read as an image")


def test_of_several_named_jobs_one_may_be_declined(server: Server) -> None:
    server.create("unfit")
    server.create("good")
    ran = run(server, lambda status: False, "unfit", "good", trainers={"unfit": Unfit()})
    assert ran.bases("good") == [0, 1, 2]
    member = server.member("unfit")
    assert member is not None
    assert (member.answer, member.reason) == ("declined", "bad-dataset: the site's log says why")


def test_an_agent_that_takes_part_in_none_of_its_named_jobs_says_why(server: Server) -> None:
    server.create("one")
    server.create("two", participants=("site-b",))
    with pytest.raises(BadDataset, match="mrs-miller"):
        run(server, lambda status: False, "one", trainers={"one": Unfit()})
    with pytest.raises(BadJob, match="names its participants"):
        run(server, lambda status: False, "two")
    with pytest.raises(Declined, match="none of the job's classes"):
        run(server, lambda status: False, "one", "two", classes=("another",))
    assert server.member("two") is None


def test_jobs_of_others_are_silently_not_ours(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.create("theirs", participants=("site-b",))
    run(server, waits("for a job"))
    assert "theirs" not in caplog.text
    assert server.requests == []


# --- one answer ----------------------------------------------------------------------------------------


def membership(server: Server, what: JoinJob | DeclineJob, clock: Callable[[], float]) -> Membership:
    return Membership("site-a", what, server.store, server.broker, clock)


JOIN = JoinJob(job="toy", num_images=10)


def test_a_lost_request_is_repeated_under_its_id(server: Server) -> None:
    server.create("toy")
    now = [0.0]
    asked = membership(server, JOIN, lambda: now[0])
    asked.tend()
    lost = server.broker.drain(topology.UPDATES)
    assert len(lost) == 1
    asked.tend()
    assert server.broker.drain(topology.UPDATES) == [], "its answer may be on the way"
    now[0] = REPEAT_AFTER_S
    asked.tend()
    server.work()
    assert [request.request_id for request in server.requests] == [asked.request_id]
    assert not asked.settled
    asked.tend()
    assert (asked.settled, asked.refused) == (True, "")
    assert lost[0].message_id == asked.request_id


def test_the_wait_between_repetitions_grows(server: Server) -> None:
    server.create("toy")
    server.deaf = True
    now, times = [0.0], []
    asked = membership(server, JOIN, lambda: now[0])
    while now[0] < 3600:
        asked.tend()
        if server.broker.drain(topology.UPDATES):
            times.append(now[0])
        now[0] += 10
    assert times[:5] == [0, 30, 90, 210, 450]
    assert max(b - a for a, b in pairwise(times)) == 600


def test_another_number_of_images_is_told(server: Server) -> None:
    server.create("toy")
    for num_images in (10, 10, 11):
        asked = membership(server, JoinJob(job="toy", num_images=num_images), lambda: 0.0)
        asked.tend()
        server.work()
        asked.tend()
        assert asked.settled
    member = server.member("toy")
    assert member is not None
    assert (member.num_images, len(server.requests)) == (11, 2)


def test_an_answer_by_a_clock_that_was_put_back_counts_all_the_same(server: Server) -> None:
    server.create("toy")
    ahead = datetime.now().astimezone() + timedelta(days=1)
    request = Request(request_id=client_update().update_id, who="site-a", what=JOIN, at=ahead)
    requests.handle(server.context, request)
    asked = membership(server, DeclineJob(job="toy", reason="policy: no"), lambda: 0.0)
    asked.tend()
    server.work()
    member = server.member("toy")
    assert member is not None
    assert member.answer == "declined"


class Closed(SqliteBroker):
    error: Exception

    def publish(self, exchange: str, message: Message) -> None:
        raise self.error


def test_a_broker_that_is_away_is_asked_later(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.create("toy")
    broker = Closed(str(server.folder / "queue.db"), lease_s=60, delivery_limit=20)
    broker.error = BrokerUnavailable("away")
    now = [0.0]
    asked = Membership("site-a", JOIN, server.store, broker, lambda: now[0])
    asked.tend()
    asked.tend()
    assert caplog.text.count("waits: away") == 1
    asked.broker, now[0] = server.broker, REPEAT_AFTER_S
    asked.tend()
    server.work()
    assert server.requests[0].who != SERVER
    member = server.member("toy")
    assert member is not None
