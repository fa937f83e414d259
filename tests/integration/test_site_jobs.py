"""One site and several jobs: it learns of them, answers, shares its time among them, and obeys what their logs say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from broker.port import Broker, Handler
from federation.errors import BadDataset
from federation.governance import Invitation, Member
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, JobSpec, Participation, StopRule
from federation.requests import SteerJob, SteerModel
from federation.types import SiteStatus
from federation.wire import Delivery, Message
from producers.agent import SiteAgent
from producers.fairness import FairShare
from producers.trainer import Progress, Trainer
from storage.access import site_policy
from storage.blob import BlobStore
from storage.control import load_key, load_member, save_invitation
from storage.open import open_store
from storage.s3 import S3Store
from tests.factories import Arrays, job_spec
from tests.integration.servers import Server, until
from tests.servers.rgw import Account, Rgw
from tests.toy_site import ToyTrained, ToyTrainer

SITE = "site-a"
OFTEN = AggregationPolicy(max_staleness=1000)


@dataclass(frozen=True)
class Deaf:
    """A broker of whose control messages every one is lost."""

    inner: Broker

    def publish(self, exchange: str, message: Message) -> None:
        self.inner.publish(exchange, message)

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        self.inner.consume(queues, handler, stop)

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        self.inner.drain(queue, limit)
        return []

    def close(self) -> None:
        self.inner.close()


@dataclass
class Running:
    """A site at work. `trainers` by job; whoever is not there is a plain toy."""

    agent: SiteAgent
    trainers: dict[str, ToyTrainer]

    @property
    def status(self) -> SiteStatus:
        return self.agent._heartbeat.status

    def trained(self, job: str) -> int:
        return len(self.trainers[job].bases) if job in self.trainers else 0

    def waits(self, why: str) -> None:
        until(f"the site to wait {why}", lambda: why in self.status.detail)


@contextmanager
def site(
    server: Server,
    *jobs: str,
    name: str = SITE,
    trainers: dict[str, ToyTrainer] | None = None,
    deaf: bool = False,
    store: BlobStore | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """An agent in a thread, stopped at the end. `jobs`: the named ones; without, all that fit its policy."""
    own = trainers if trainers is not None else {}

    def trainer_for(spec: JobSpec) -> Trainer:
        return own.setdefault(spec.id, ToyTrainer(0.02))

    def connect() -> Broker:
        return Deaf(server.as_site(name)) if deaf else server.as_site(name)

    values = {"poll_s": 0.1, "backoff_limit_s": 0.5} | settings
    stop = threading.Event()
    agent = SiteAgent(
        server.site_settings(name).model_copy(update=values),
        jobs,
        store or server.store,
        connect,
        trainer_for,
        stop,
    )
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield Running(agent, own)
    finally:
        stop.set()
        thread.join()


def unique() -> str:
    """A class that no other job has, so that a site which has no other joins the jobs of one test alone."""
    return f"class {new_update_id()[-12:]}"


def new_job(server: Server, thing: str, **changes: Any) -> str:
    name = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(name, **({"classes": (thing,), "stop": StopRule(max_versions=3)} | changes)))
    return name


def is_closed(server: Server, job: str) -> bool:
    head = server.head(job)
    return head is not None and head.closed is not None


def answer(server: Server, job: str, name: str = SITE) -> Member:
    """Of the site, as the server has it."""
    found: list[Member | None] = []

    def known() -> bool:
        found.append(load_member(server.store, job, name))
        return found[-1] is not None

    until(f"{name} to answer {job}", known)
    assert found[-1] is not None
    return found[-1]


@dataclass
class Recording(FairShare):
    charges: list[tuple[str, float]] = field(default_factory=list)

    def charge(self, job: str, seconds: float) -> None:
        self.charges.append((job, seconds))
        super().charge(job, seconds)


def test_two_jobs_get_equal_time_of_one_site(server: Server) -> None:
    """As long as both could train at any time, their times differ by no more than the longest training of each."""
    thing = unique()
    jobs = [
        new_job(server, thing, aggregation=OFTEN, max_inflight=100, stop=StopRule(max_versions=12))
        for _ in range(2)
    ]
    trainers = {jobs[0]: ToyTrainer(0.02), jobs[1]: ToyTrainer(0.08)}
    with site(server, trainers=trainers, site_classes=(thing,)) as running:
        running.agent._fair = record = Recording()
        until("both jobs to close", lambda: all(is_closed(server, job) for job in jobs))
    assert [answer(server, job).answer for job in jobs] == ["joined", "joined"]
    charges = list(record.charges)
    both = min(max(i for i, (job, _) in enumerate(charges) if job == each) for each in jobs)
    longest = sum(max(seconds for job, seconds in charges if job == each) for each in jobs)
    for end in range(both + 1):
        first, second = (sum(s for job, s in charges[: end + 1] if job == each) for each in jobs)
        assert abs(first - second) <= longest + 1e-6
    assert both > 3


class Unfit(ToyTrainer):
    def prepare(self, spec: JobSpec) -> None:
        raise BadDataset("frames/mrs-miller.jpg: cannot be read as an image")


def test_a_job_that_does_not_fit_is_declined_and_the_others_go_on(server: Server) -> None:
    thing = unique()
    foreign, large, unfit, good = (
        new_job(server, "another thing"),
        new_job(server, thing, participants=("site-b",)),
        new_job(server, thing),
        new_job(server, thing),
    )
    with site(server, trainers={unfit: Unfit()}, site_classes=(thing,)):
        until("the good one to close", lambda: is_closed(server, good))
        declined = answer(server, foreign), answer(server, unfit)
    assert [member.answer for member in declined] == ["declined", "declined"]
    assert declined[0].reason == "policy: this site has none of the job's classes (another thing)"
    assert declined[1].reason == "bad-dataset: the site's log says why"
    joined = answer(server, good)
    assert (joined.answer, joined.num_images) == ("joined", 10)
    assert load_member(server.store, large, SITE) is None, "it names its participants, and we are none"


def test_a_named_job_is_joined_and_the_agent_ends_with_it(server: Server) -> None:
    thing = unique()
    named, other = new_job(server, thing), new_job(server, thing)
    with site(server, named) as running:
        until("the named one to close", lambda: is_closed(server, named))
        assert answer(server, named).answer == "joined"
        until("the agent to end", lambda: running.status.state == "stopped")
    assert load_member(server.store, other, SITE) is None
    assert (server.site_settings(SITE).site_state / "release.key").exists()
    assert load_key(server.store, SITE) is not None, "the join tells the site's key"


def test_a_job_is_announced_while_the_site_runs(server: Server) -> None:
    thing = unique()
    with site(server, site_classes=(thing,)):
        first = new_job(server, thing)
        until("the first to close", lambda: is_closed(server, first))
        second = new_job(server, thing)
        until("the second to close", lambda: is_closed(server, second))


def test_a_site_that_hears_nothing_catches_up_from_the_store(server: Server) -> None:
    """It was away when one job was announced, and loses every control message from then on."""
    thing = unique()
    before = new_job(server, thing)
    server.as_site(SITE).drain(f"fed.ctl.{SITE}")
    with site(server, deaf=True, site_classes=(thing,)):
        until("the old one to close", lambda: is_closed(server, before))
        after = new_job(server, thing)
        until("the new one to close", lambda: is_closed(server, after))
    assert answer(server, before).answer == answer(server, after).answer == "joined"


def test_a_paused_job_is_not_trained_until_it_is_resumed(server: Server) -> None:
    thing = unique()
    job = new_job(server, thing, stop=StopRule(max_versions=1000))
    with site(server, site_classes=(thing,)) as running:
        until("some work", lambda: running.trained(job) > 1)
        assert server.answer(server.ask(SteerJob(job=job, action="pause", reason="stocktaking"))).ok
        running.waits("paused by server: stocktaking")
        done = running.trained(job)
        until("what was sent to be merged", lambda: server.head(job).version == done)  # type: ignore[union-attr]
        assert running.trained(job) == done
        assert server.answer(server.ask(SteerJob(job=job, action="resume"))).ok
        until("more work", lambda: running.trained(job) > done)
        assert server.answer(server.ask(SteerJob(job=job, action="stop"))).ok
        running.waits("for a job")


def invite(server: Server, job: str, seconds: float = 600) -> None:
    now = datetime.now(UTC)
    head = server.head(job)
    assert head is not None
    expires = now + timedelta(seconds=seconds)
    save_invitation(
        server.store,
        Invitation(job=job, site=SITE, version=head.version, invited_at=now, expires_at=expires),
    )


def test_an_invitation_makes_one_update(server: Server) -> None:
    # no site is so idle, so the server invites nobody by itself
    participation = Participation(mode="invited", max_load=1e-9)
    thing = unique()
    job = new_job(server, thing, participation=participation, stop=StopRule(max_versions=100))

    def version() -> int:
        head = server.head(job)
        assert head is not None
        return head.version

    with site(server, site_classes=(thing,)) as running:
        running.waits("for an invitation")
        invite(server, job, seconds=-1)
        answer(server, job)
        assert running.trained(job) == 0
        invite(server, job)
        until("the update to be merged", lambda: version() == 1)
        running.waits("for an invitation")
        assert running.trained(job) == 1
    with site(server, site_classes=(thing,)) as again:  # the invitation is still good
        again.waits("for an invitation")
        assert again.trained(job) == 0
        invite(server, job)
        until("the second update to be merged", lambda: version() == 2)
        again.waits("for an invitation")
        assert again.trained(job) == 1


def test_nobody_trains_before_enough_sites_have_joined(server: Server) -> None:
    thing = unique()
    job = new_job(server, thing, participation=Participation(min_sites=2), stop=StopRule(max_versions=6))
    with site(server, site_classes=(thing,)) as first:
        assert answer(server, job).answer == "joined"
        first.waits("waiting for sites: 2 must join first")
        assert first.trained(job) == 0
        with site(server, name="site-b", site_classes=(thing,)) as second:
            until("the job to close", lambda: is_closed(server, job))
            assert first.trained(job) + second.trained(job) >= 6


@pytest.fixture
def own_store(server: Server, request: pytest.FixtureRequest) -> BlobStore:
    """What the site's own account at the object store may see of it; a folder has no accounts."""
    if server.settings.embedded:
        return server.store
    s3: Rgw = request.getfixturevalue("s3_server")
    user = s3.user(Account("site", "site-key", "site-secret"))
    bucket = server.store
    assert isinstance(bucket, S3Store)
    policy = site_policy(server.settings.store_url, {SITE: user.arn}, s3.admin.arn)
    bucket.set_policy(json.dumps(policy))
    secrets = {"store_access_key": user.access_key, "store_secret_key": SecretStr(user.secret_key)}
    return open_store(server.settings.model_copy(update=secrets))


def test_the_account_of_a_site_is_enough(server: Server, own_store: BlobStore) -> None:
    """It is told 403, not 404, of what is not there: its membership, an invitation, an answer."""
    thing = unique()
    free, foreign = new_job(server, thing), new_job(server, "another thing")
    invited = new_job(server, thing, participation=Participation(mode="invited", max_load=1e-9))
    with site(server, store=own_store, site_classes=(thing,)) as running:
        until("the free-running one to close", lambda: is_closed(server, free))
        running.waits("for an invitation")
        assert [answer(server, job).answer for job in (free, foreign, invited)] == [
            "joined",
            "declined",
            "joined",
        ]
        invite(server, invited)
        until("one update", lambda: running.trained(invited) == 1)


@dataclass
class Patient(ToyTrainer):
    """Goes on until it is let go, or interrupted. `at_work`: the version that it trains from meanwhile."""

    go: threading.Event = field(default_factory=threading.Event)
    at_work: int = -1
    given_up: list[int] = field(default_factory=list)

    def train(
        self, spec: JobSpec, weights: Arrays, *, base_version: int, on_progress: Any, **more: Any
    ) -> ToyTrained:
        try:
            while not self.go.wait(0.05):
                self.at_work = base_version
                on_progress(Progress(0, 0, 0.0))
        except Exception:
            self.given_up.append(base_version)
            raise
        finally:
            self.at_work = -1
        return super().train(spec, weights, base_version=base_version, on_progress=on_progress, **more)


def test_training_from_a_version_that_is_rolled_back_is_dropped(server: Server) -> None:
    thing = unique()
    job = new_job(server, thing, stop=StopRule(max_versions=1000))
    trainer = Patient()
    trainer.go.set()
    with site(server, trainers={job: trainer}, site_classes=(thing,)):
        until("some versions", lambda: len(trainer.bases) > 2)
        trainer.go.clear()
        until("a training that lasts", lambda: trainer.at_work > 0)
        base = trainer.at_work
        assert server.answer(server.ask(SteerModel(job=job, action="rollback", version=0))).ok
        until("it to be given up", lambda: trainer.given_up == [base])
        rolled_back = server.head(job)
        assert rolled_back is not None
        until("another one", lambda: trainer.at_work == rolled_back.version)
        assert server.answer(server.ask(SteerJob(job=job, action="stop"))).ok
        until("that to be given up, too", lambda: trainer.given_up == [base, rolled_back.version])
