"""Inviting sites: what is asked of store, log and liveness, and what a worker that starts anew makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from broker.sqlite import SqliteBroker
from cli.main import app
from federation.errors import StoreUnavailable, Transient
from federation.governance import Invitation, Member
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, Job, JobSpec, Participation
from federation.requests import DeclineJob, Request, SteerJob
from federation.settings import Settings
from federation.types import Machine, SiteStatus
from federation.wire import Invited, decode_control
from storage.control import list_invitations, load_invitation, save_member
from storage.files import Buffer
from storage.liveness import Seen
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import save_model
from storage.open import open_store
from storage.tensors import from_arrays
from tasks import invite
from tasks.accept import accept
from tasks.closing import close
from tasks.context import Context
from tasks.invite import places
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.requests import handle
from tasks.steer import steer_job
from tests.factories import client_update, job_spec, payload_of, toy_arrays

SITES = ("site-a", "site-b", "site-c", "site-d")
LEASE_S = 100.0


class CountingStore(MemoryStore):
    """Counts what is read of the log; and can take an invitation without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.log_reads = 0
        self.lose_next_reply = False

    def put(self, key: str, data: Buffer) -> None:
        super().put(key, data)
        if self.lose_next_reply and "/invitations/" in key:
            self.lose_next_reply = False
            raise StoreUnavailable("the connection broke")

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self.log_reads += "/log/" in key
        return super().get(key, max_bytes=max_bytes)


class Sites:
    """A liveness that says what a test wants."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.away = False

    def beat(self, status: SiteStatus) -> None:
        self.seen[status.site] = Seen(status, datetime.now(UTC), 0.0)

    def sites(self) -> list[Seen]:
        if self.away:
            raise Transient("Redis did not answer")
        return list(self.seen.values())


class Clock:
    """Of all server processes: it stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def after(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Worker(Context):
    """One server process, whose log and invitations go by `clock`."""

    def __init__(self, store: MemoryStore, folder: Path, liveness: Sites, clock: Clock) -> None:
        broker = SqliteBroker(str(folder / "queue.db"), lease_s=60, delivery_limit=20)
        broker.declare(SITES)
        super().__init__(Settings(), store, broker, lambda name, arguments: None)
        self.__dict__["liveness"] = liveness
        self.clock = clock

    def log(self, job_id: str) -> VersionLog:
        if job_id not in self._logs:
            self._logs[job_id] = VersionLog(self.store, job_id, clock=lambda: self.clock.now)
        return self._logs[job_id]

    def invite(self) -> None:
        """One step of oversee_jobs."""
        invite.invite(self, self.job("toy"), self.log("toy").head(), self.clock.now)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def liveness() -> Sites:
    return Sites()


@pytest.fixture
def worker(tmp_path: Path, liveness: Sites, clock: Clock) -> Iterator[Worker]:
    made = Worker(CountingStore(), tmp_path, liveness, clock)
    yield made
    made.broker.close()


def another(worker: Worker, folder: Path) -> Worker:
    """What starts when `worker` has died: it knows nothing but the store."""
    liveness = worker.liveness
    assert isinstance(liveness, Sites)
    assert isinstance(worker.store, MemoryStore)
    return Worker(worker.store, folder, liveness, worker.clock)


def new_job(worker: Worker, **participation: Any) -> Job:
    wanted = {"mode": "invited", "concurrency": 2, "lease_s": LEASE_S} | participation
    spec: JobSpec = job_spec(participation=Participation.model_validate(wanted))
    ref = save_model(worker.store, spec.id, from_arrays(toy_arrays()))
    return create(worker, spec, ref, ref)


def join(worker: Worker, *sites: str, num_images: int = 100) -> None:
    for site in sites:
        member = Member(job="toy", site=site, answer="joined", num_images=num_images, at=datetime.now(UTC))
        save_member(worker.store, member)
        beat(worker, site)


def beat(worker: Worker, site: str, **status: Any) -> None:
    values: dict[str, Any] = {"state": "waiting", "job": "toy", "at": datetime.now(UTC)} | status
    worker.liveness.beat(SiteStatus(site=site, **values))


def send(worker: Worker, site: str, **changes: Any) -> None:
    """The site's update arrives and is recorded."""
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload, site=site, **changes)
    worker.store.put_if_absent(update.payload_key, payload)
    accept(worker, update)


def invited(worker: Worker, clock: Clock) -> set[str]:
    """Sites with an invitation that has not expired."""
    return {i.site for i in list_invitations(worker.store, "toy") if i.expires_at > clock.now}


def told(worker: Worker, site: str) -> list[object]:
    """What waits in the site's control queue."""
    assert isinstance(worker.broker, SqliteBroker)
    return [decode_control(delivery) for delivery in worker.broker.drain(f"fed.ctl.{site}")]


def test_updates_that_wait_to_be_merged_keep_others_from_being_invited_if_the_job_says_so(
    worker: Worker, clock: Clock
) -> None:
    policy = AggregationPolicy(strategy="fedbuff", buffer_size=2)
    limited = Participation(mode="invited", concurrency=3, max_in_flight=3, lease_s=LEASE_S)
    spec = job_spec(participation=limited, aggregation=policy, max_inflight=1)
    ref = save_model(worker.store, spec.id, from_arrays(toy_arrays()))
    job = create(worker, spec, ref, ref)
    join(worker, *(f"s{n}" for n in range(6)))
    worker.invite()
    first = sorted(invited(worker, clock))
    assert len(first) == 3
    clock.after(5)
    send(worker, first[0], payload_kind="difference")
    worker.invite()
    assert len(invited(worker, clock)) == 3, "two train, and one waits to be merged"
    send(worker, first[1], payload_kind="difference")
    publish_pending(worker, job)
    worker.invite()
    assert len(invited(worker, clock)) == 5, "two more, from the version that they made"


def test_as_many_sites_as_wanted_are_invited_and_told(worker: Worker, clock: Clock) -> None:
    new_job(worker)
    join(worker, *SITES)
    worker.invite()
    assert invited(worker, clock) == {"site-a", "site-b"}
    assert load_invitation(worker.store, "toy", "site-a") == Invitation(
        job="toy",
        site="site-a",
        version=0,
        invited_at=clock.now,
        expires_at=clock.now + timedelta(seconds=LEASE_S),
    )
    assert Invited(job="toy") in told(worker, "site-a")
    assert Invited(job="toy") not in told(worker, "site-c")
    clock.after(5)
    worker.invite()
    assert invited(worker, clock) == {"site-a", "site-b"}, "nobody is invited twice, nobody beyond the limit"


@pytest.mark.parametrize("changes", [{}, {"base_version": 9}], ids=["accepted", "refused"])
def test_a_site_that_has_sent_its_update_frees_its_place_at_once(
    worker: Worker, clock: Clock, changes: dict[str, Any]
) -> None:
    new_job(worker)
    join(worker, *SITES)
    worker.invite()
    clock.after(5)
    send(worker, "site-b", **changes)
    clock.after(5)
    worker.invite()
    assert invited(worker, clock) == {"site-a", "site-b", "site-c"}


def test_a_site_that_dies_is_replaced_when_its_lease_ends_and_not_before(
    worker: Worker, clock: Clock
) -> None:
    new_job(worker, concurrency=1)
    join(worker, "site-a", "site-b")
    worker.invite()
    assert isinstance(worker.liveness, Sites)
    del worker.liveness.seen["site-a"]
    clock.after(LEASE_S - 1)
    worker.invite()
    assert load_invitation(worker.store, "toy", "site-b") is None
    clock.after(1)
    worker.invite()
    assert invited(worker, clock) == {"site-b"}


def test_a_site_that_declines_gives_its_place_to_another(worker: Worker, clock: Clock) -> None:
    new_job(worker, concurrency=1)
    join(worker, "site-a", "site-b")
    worker.invite()
    assert invited(worker, clock) == {"site-a"}
    asked = DeclineJob(job="toy", reason="no time")
    request = Request(request_id=new_update_id(), who="site-a", what=asked, at=datetime.now(UTC))
    assert handle(worker, request).ok
    clock.after(1)
    worker.invite()
    assert invited(worker, clock) == {"site-a", "site-b"}


def test_a_worker_that_starts_anew_goes_on_where_the_last_one_was(
    worker: Worker, clock: Clock, tmp_path: Path
) -> None:
    new_job(worker)
    join(worker, *SITES)
    worker.invite()
    clock.after(10)
    send(worker, "site-a")
    clock.after(10)
    fresh = another(worker, tmp_path)
    fresh.invite()
    assert invited(worker, clock) == {"site-a", "site-b", "site-c"}
    clock.after(10)
    again = another(worker, tmp_path)
    again.invite()
    assert load_invitation(worker.store, "toy", "site-d") is None, "b and c are at work"
    for made in (fresh, again):
        made.broker.close()


def test_a_worker_learns_what_another_invited_in_its_place(
    worker: Worker, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_job(worker, concurrency=1)
    join(worker, *SITES)
    worker.invite()
    its_memory = invite._here.memory
    clock.after(LEASE_S)
    other = another(worker, tmp_path)
    other.invite()
    assert invited(worker, clock) == {"site-b"}
    clock.after(5)
    monkeypatch.setattr(invite._here, "memory", its_memory)
    monkeypatch.setattr(invite, "PAUSE", 0.0)
    worker.invite()
    assert invited(worker, clock) == {"site-b"}
    other.broker.close()


def test_an_invitation_whose_reply_was_lost_is_not_given_twice(worker: Worker, clock: Clock) -> None:
    store = worker.store
    assert isinstance(store, CountingStore)
    new_job(worker, concurrency=1)
    join(worker, *SITES)
    store.lose_next_reply = True
    with pytest.raises(StoreUnavailable):
        worker.invite()
    invited_at = clock.now
    clock.after(5)
    worker.invite()
    assert [(i.site, i.invited_at) for i in list_invitations(store, "toy")] == [("site-a", invited_at)]


def test_only_new_records_are_read(worker: Worker, clock: Clock, tmp_path: Path) -> None:
    store = worker.store
    assert isinstance(store, CountingStore)
    new_job(worker, concurrency=1)
    join(worker, *SITES)
    for _ in range(40):
        worker.invite()
        clock.after(10)
        for site in SITES:
            send(worker, site)
        clock.after(10)
    worker.invite()
    newest = worker.log("toy").head()
    store.log_reads = 0
    for _ in range(10):
        invite.invite(worker, worker.job("toy"), newest, clock.now)
    assert store.log_reads == 0
    fresh = another(worker, tmp_path)
    fresh.log("toy").head()
    store.log_reads = 0
    fresh.invite()
    fresh.broker.close()
    in_two_leases = 10 * len(SITES) + 1
    assert 0 < store.log_reads <= in_two_leases + 10, (
        "the newest of the log, and a search for where that begins"
    )


def test_nobody_is_invited_to_a_job_that_is_held_or_closed(worker: Worker, clock: Clock) -> None:
    job = new_job(worker, concurrency=1)
    join(worker, *SITES)

    def steer(action: Literal["pause", "resume"]) -> None:
        what = SteerJob(job="toy", action=action)
        steer_job(worker, Request(request_id=new_update_id(), who="server", what=what, at=clock.now))

    steer("pause")
    worker.invite()
    assert invited(worker, clock) == set()
    steer("resume")
    worker.invite()
    assert invited(worker, clock) == {"site-a"}
    clock.after(LEASE_S)
    close(worker, job, "enough")
    worker.invite()
    assert invited(worker, clock) == set()


def test_a_free_running_job_invites_nobody(worker: Worker, clock: Clock) -> None:
    new_job(worker, mode="free-running")
    join(worker, *SITES)
    worker.invite()
    assert invited(worker, clock) == set()


def test_without_liveness_nobody_is_invited_and_nothing_fails(worker: Worker, clock: Clock) -> None:
    new_job(worker)
    join(worker, *SITES)
    liveness = worker.liveness
    assert isinstance(liveness, Sites)
    known, liveness.seen = liveness.seen, {}
    worker.invite()
    liveness.away = True
    worker.invite()
    assert invited(worker, clock) == set()
    liveness.seen, liveness.away = known, False
    worker.invite()
    assert invited(worker, clock) == {"site-a", "site-b"}


def test_who_is_passed_over_and_why(worker: Worker, clock: Clock) -> None:
    job = new_job(worker, concurrency=1, min_interval_s=60.0)
    join(worker, *SITES)
    save_member(worker.store, Member(job="toy", site="site-d", answer="declined", at=datetime.now(UTC)))
    beat(worker, "site-a", machine=Machine(load=8.0, cores=4))
    beat(worker, "site-b", state="training")
    worker.invite()
    assert invited(worker, clock) == {"site-c"}
    clock.after(40)
    send(worker, "site-c")
    clock.after(10)

    def why() -> dict[str, str]:
        seen = {s.status.site: s for s in worker.liveness.sites()}
        return {p.candidate.site: p.why for p in places(worker.store, job, seen, Settings(), clock.now)}

    assert why() == {
        "site-a": "load 2.00 per core, at most 1.5",
        "site-b": "is training still",
        "site-c": "1 of its updates wait to be merged",
    }
    beat(worker, "site-a", machine=Machine(load=4.0, cores=4))
    beat(worker, "site-b", state="training", job="another")
    assert why()["site-a"] == "is next"
    assert why()["site-b"] == "number 1 of those that wait for a slot"


def test_what_is_expected_of_a_site_survives_the_worker(worker: Worker, clock: Clock, tmp_path: Path) -> None:
    new_job(worker, concurrency=1, lease_s=LEASE_S)
    join(worker, "site-a")
    workers = [worker]
    expected = []
    for took in (20.0, 40.0, 160.0, None, 20.0):
        current = workers[-1]
        current.invite()
        invitation = load_invitation(worker.store, "toy", "site-a")
        assert invitation is not None
        assert invitation.invited_at == clock.now
        expected.append(invitation.expected_s)
        if took is not None:
            clock.after(took)
            send(worker, "site-a", base_version=0)
            publish_pending(worker, worker.job("toy"))
        clock.after(2 * LEASE_S - (took or 0.0) - 1)
        workers.append(another(worker, tmp_path))
    assert expected == [None, 20.0, 30.0, 95.0, 147.5]
    for made in workers[1:]:
        made.broker.close()


def test_the_command_shows_who_is_invited_and_what_the_others_wait_for(tmp_path: Path) -> None:
    store_url, live_url = f"file:{tmp_path / 'store'}", f"file:{tmp_path / 'live'}"
    store = open_store(Settings(store_url=store_url))
    broker = SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20)
    broker.declare(SITES)
    context = Context(
        Settings(store_url=store_url, live_url=SecretStr(live_url)),
        store,
        broker,
        lambda name, arguments: None,
    )
    for job, mode in (("toy", "invited"), ("free", "free-running")):
        spec = job_spec(job, participation=Participation.model_validate({"mode": mode, "concurrency": 1}))
        ref = save_model(store, spec.id, from_arrays(toy_arrays()))
        create(context, spec, ref, ref)
    for site in ("site-a", "site-b", "site-c"):
        now = datetime.now(UTC)
        save_member(store, Member(job="toy", site=site, answer="joined", num_images=7, at=now))
        if site != "site-c":
            context.liveness.beat(SiteStatus(site=site, state="waiting", at=now))
    invite.invite(context, context.job("toy"), context.log("toy").head())
    broker.close()

    def shown(*arguments: str) -> tuple[int, str]:
        command = ["job", "invitations", *arguments, "--store-url", store_url, "--live-url", live_url]
        result = CliRunner().invoke(app, command)
        return result.exit_code, result.output

    code, output = shown("toy")
    assert code == 0
    lines = {line.split()[0]: line.rstrip() for line in output.splitlines()}
    assert lines["site-a"].endswith("is invited")
    assert lines["site-b"].endswith("number 1 of those that wait for a slot")
    assert lines["site-c"].endswith("is not connected")
    assert shown("free") == (
        1,
        "job free is free-running: every site that has joined trains whenever it can\n",
    )
    assert shown("none")[0] == 1
