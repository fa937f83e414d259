"""What a look at the jobs costs, every few seconds and for as long as they are open: requests to the store."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from federation.errors import StoreUnavailable
from federation.ids import new_update_id
from federation.jobs import EvaluationPolicy, Participation, StopRule
from federation.requests import DeclineJob, JoinJob, Request
from federation.settings import Settings
from storage.files import Buffer
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.closing import close
from tasks.context import Context
from tasks.jobs import create
from tasks.oversee import Memory, oversee
from tasks.requests import handle
from tests.factories import job_spec, toy_arrays
from tests.unit.audit_cases import NoBroker


class CountingStore(MemoryStore):
    """Notes every request as "list jobs/toy/log/", "get …"."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.lose_next_reply = False

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        self.requests.append(f"list {prefix}")
        return super().list(prefix, start_after=start_after)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self.requests.append(f"get {key}")
        return super().get(key, max_bytes=max_bytes)

    def size(self, key: str) -> int:
        self.requests.append(f"size {key}")
        return super().size(key)

    def put(self, key: str, data: Buffer) -> None:
        self.requests.append(f"put {key}")
        super().put(key, data)
        if self.lose_next_reply and "/members/" in key:
            self.lose_next_reply = False
            raise StoreUnavailable("the connection broke")

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        self.requests.append(f"put {key}")
        return super().put_if_absent(key, data)


class Toy:
    """A job `toy` and the worker that looks after it."""

    def __init__(self, **changes: Any) -> None:
        self.store, self.memory = CountingStore(), Memory()
        self.context = Context(Settings(), self.store, NoBroker(), lambda name, arguments: None)
        ref = save_model(self.store, "toy", from_arrays(toy_arrays()))
        self.job = create(self.context, job_spec(**changes), ref, ref)

    @property
    def hold(self) -> str | None:
        return self.context.log("toy").head().head.hold

    def look(self) -> list[str]:
        """The requests that it took."""
        self.store.requests.clear()
        oversee(self.context, self.memory)
        return list(self.store.requests)

    def ask(self, site: str, what: JoinJob | DeclineJob) -> None:
        request = Request(request_id=new_update_id(), who=site, what=what, at=datetime.now(UTC))
        assert handle(self.context, request).ok

    def join(self, *sites: str) -> None:
        for site in sites:
            self.ask(site, JoinJob(job="toy", num_images=10))


IDLE = ["list announced/", "list jobs/toy/log/"]


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, []),
        ({"stop": StopRule(deadline=datetime.now(UTC) + timedelta(days=1))}, []),
        ({"stop": StopRule(target=0.7), "evaluation": EvaluationPolicy(sites_every=1, max_drop=0.1)}, []),
        ({"participation": Participation(mode="invited")}, ["list jobs/toy/members/"]),
        ({"participation": Participation(min_sites=5)}, ["list jobs/toy/members/"]),
    ],
)
def test_a_look_at_a_job_that_is_as_it_was_takes_few_requests(
    changes: dict[str, Any], more: list[str]
) -> None:
    toy = Toy(**changes)
    toy.join("site-a", "site-b", "site-c", "site-d")
    toy.look()
    assert toy.look() == IDLE + more


def test_a_look_at_a_closed_job_takes_none() -> None:
    toy = Toy()
    close(toy.context, toy.job, "enough")
    toy.look()
    assert toy.look() == ["list announced/"]


def test_a_job_that_closes_in_a_look_is_not_looked_at_again() -> None:
    toy = Toy(stop=StopRule(deadline=datetime.now(UTC) - timedelta(seconds=1)))
    toy.look()
    assert toy.look() == ["list announced/"]


def test_a_site_that_changes_its_mind_counts_as_it_last_said() -> None:
    toy = Toy(participation=Participation(min_sites=2))
    toy.join("site-a")
    toy.look()
    toy.ask("site-a", DeclineJob(job="toy", reason="no time"))
    toy.join("site-b")
    toy.look()
    assert toy.hold is not None
    toy.join("site-a")
    assert toy.hold is None


def test_so_does_one_whose_answer_was_stored_without_a_reply() -> None:
    toy = Toy(participation=Participation(min_sites=2))
    toy.join("site-a")
    toy.look()
    toy.store.lose_next_reply = True
    with pytest.raises(StoreUnavailable):
        toy.ask("site-a", DeclineJob(job="toy", reason="no time"))
    toy.join("site-b")
    assert toy.hold is not None


def test_answers_are_read_again_after_a_pause_in_which_another_worker_may_have_taken_some() -> None:
    toy = Toy(participation=Participation(min_sites=2))
    toy.join("site-a")
    toy.look()
    another = Context(Settings(), toy.store, NoBroker(), lambda name, arguments: None)
    request = Request(
        request_id=new_update_id(),
        who="site-a",
        what=DeclineJob(job="toy", reason="no time"),
        at=datetime.now(UTC),
    )
    assert handle(another, request).ok
    toy.memory.last -= 3600
    toy.look()
    toy.join("site-b")
    assert toy.hold is not None
