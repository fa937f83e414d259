"""Jobs that invite their sites, against a real server: with our agent, and with sites that speak the protocol alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from federation.governance import Invitation
from federation.ids import new_update_id
from federation.jobs import Participation, StopRule
from federation.requests import JoinJob
from federation.settings import Settings
from federation.types import Accepted, Machine, SiteStatus
from federation.wire import encode_heartbeat
from storage.control import list_invitations
from storage.liveness import open_liveness
from storage.log import VersionLog
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import SITES, Server, until
from tests.toy_site import ToyTrainer, agent

IDLE = Machine(load=0.2, cores=2)
OVERLOADED = Machine(load=8.0, cores=2)


class Puppets:
    """Sites that send heartbeats once a second, each as long as it is in `alive`, and whatever else a test says."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.alive: dict[str, Machine] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        brokers = {site: self._server.as_site(site) for site in SITES}
        while not self._stop.wait(1.0):
            for site, machine in list(self.alive.items()):
                status = SiteStatus(site=site, state="waiting", machine=machine, at=datetime.now(UTC))
                brokers[site].publish("fed.updates", encode_heartbeat(status, 15))
        for broker in brokers.values():
            broker.close()

    def __enter__(self) -> Puppets:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def puppets(server: Server) -> Iterator[Puppets]:
    with Puppets(server) as made:
        yield made


def new_job(server: Server, stop: StopRule | None = None, **participation: Any) -> str:
    job = f"job-{new_update_id()[-12:]}"
    wanted = Participation.model_validate({"mode": "invited"} | participation)
    server.create_job(job_spec(job, participation=wanted, stop=stop or StopRule(max_versions=1000)))
    return job


def join(server: Server, job: str, *sites: str) -> None:
    for site in sites:
        answer = server.answer(server.ask(JoinJob(job=job, num_images=10), site))
        assert answer.ok, answer.errors


def update_of(server: Server, job: str, site: str) -> None:
    """What an invited site does: one update from the newest version."""
    head = server.head(job)
    assert head is not None
    payload = payload_of(toy_arrays(1.0))
    server.send(client_update(payload, job=job, site=site, base_version=head.version), payload)


def accepted(server: Server, job: str) -> Counter[str]:
    """Updates in the log by site."""
    events = [record.event for record in VersionLog(server.store, job).history()]
    return Counter(e.contribution.update.site for e in events if isinstance(e, Accepted))


def invitations(server: Server, job: str) -> dict[str, Invitation]:
    return {invitation.site: invitation for invitation in list_invitations(server.store, job)}


def site_settings(server: Server, site: str) -> Settings:
    quick = {"poll_s": 0.1, "heartbeat_s": 0.5}
    return server.site_settings(site).model_copy(update=quick)


def test_the_agents_take_turns_and_train_once_for_each_invitation(server: Server) -> None:
    # the agents tell this machine's load, whatever else it does
    job = new_job(server, StopRule(max_versions=4), concurrency=1, max_load=1000.0)
    stop = threading.Event()
    trainers = {site: ToyTrainer(0.2) for site in SITES}
    threads = [
        threading.Thread(target=agent(site_settings(server, site), job, trainer, stop).run)
        for site, trainer in trainers.items()
    ]
    for thread in threads:
        thread.start()
    try:
        until("the job to close", lambda: (head := server.head(job)) is not None and head.closed)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(accepted(server, job)) == set(SITES), "each had its turn"
    assert sum(len(trainer.bases) for trainer in trainers.values()) == 4, "none trained unasked"
    records = [r for r in VersionLog(server.store, job).history() if isinstance(r.event, Accepted)]
    bases = [r.event.contribution.update.base_version for r in records if isinstance(r.event, Accepted)]
    assert bases == sorted(bases), "with one place each one waits for the one before it"


def test_so_many_sites_are_busy_and_the_next_is_invited_when_one_has_finished(
    server: Server, puppets: Puppets
) -> None:
    job = new_job(server, concurrency=2)
    join(server, job, *SITES)
    puppets.alive = dict.fromkeys(SITES, IDLE)
    done: dict[str, set[datetime]] = {site: set() for site in SITES}

    def at_work() -> list[str]:
        return [site for site, i in invitations(server, job).items() if i.invited_at not in done[site]]

    def has_accepted(updates: int) -> bool:
        return accepted(server, job).total() == updates

    for turn in range(1, 7):
        until("two invitations", lambda: len(at_work()) == 2)
        # who was invited first sends first
        site = min(at_work(), key=lambda site: (invitations(server, job)[site].invited_at, site))
        done[site].add(invitations(server, job)[site].invited_at)
        update_of(server, job, site)
        until("its record", partial(has_accepted, turn))
    until("two invitations", lambda: len(at_work()) == 2)
    assert accepted(server, job) == dict.fromkeys(SITES, 2)


def test_a_site_that_dies_is_replaced_after_its_lease_even_by_a_worker_that_was_killed_too(
    server: Server, puppets: Puppets
) -> None:
    lease_s = 8.0
    job = new_job(server, concurrency=1, lease_s=lease_s)
    join(server, job, "site-a", "site-b")
    puppets.alive = {"site-a": IDLE, "site-b": IDLE}
    until("an invitation", lambda: invitations(server, job))
    ((dead, first),) = invitations(server, job).items()
    assert first.expires_at - first.invited_at == timedelta(seconds=lease_s)
    (other,) = {"site-a", "site-b"} - {dead}
    del puppets.alive[dead]
    for name in list(server.processes):
        server.kill(name)
    for name in server.commands:
        server.start(name)
    until("a replacement", lambda: other in invitations(server, job))
    assert invitations(server, job)[other].invited_at >= first.expires_at
    update_of(server, job, other)
    until("its record", lambda: accepted(server, job) == {other: 1})


def test_an_overloaded_site_is_passed_over_until_it_has_time(server: Server, puppets: Puppets) -> None:
    def told() -> dict[str, Machine | None]:
        return {seen.status.site: seen.status.machine for seen in open_liveness(server.settings).sites()}

    puppets.alive = {"site-a": OVERLOADED, "site-b": IDLE}
    until("its heartbeat", lambda: told().get("site-a") == OVERLOADED)
    job = new_job(server, concurrency=2, max_load=1.5)
    join(server, job, "site-a", "site-b")
    until("the other one's invitation", lambda: invitations(server, job))
    update_of(server, job, "site-b")
    first = invitations(server, job)
    until("its next invitation", lambda: invitations(server, job) != first)
    assert set(invitations(server, job)) == {"site-b"}
    puppets.alive["site-a"] = IDLE
    until("an invitation", lambda: set(invitations(server, job)) == {"site-a", "site-b"})
