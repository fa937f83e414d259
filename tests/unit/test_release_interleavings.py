"""A site that changes its mind while workers write the bundle, in every order of their steps, also when one dies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from itertools import count
from typing import Any

import pytest

from federation import keys
from federation.governance import Card, Consents
from federation.ids import new_update_id
from federation.requests import AnswerRelease, Consent, ProposeRelease, Request
from federation.signatures import SigningKey
from federation.types import SERVER
from storage.control import load_answer
from storage.memory import MemoryStore
from storage.models import save_model
from storage.releases import CARD, CONSENTS, SUMS, is_released, load_release, parse_sums, sha256
from storage.tensors import from_arrays
from tasks import bundle
from tasks.accept import accept
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.requests import handle
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.interleaving import SteppedStore, explore
from tests.unit.test_interleavings import Worker

SITES = ("site-a", "site-b")


def _copy(store: MemoryStore) -> MemoryStore:
    copied = MemoryStore()
    for key in store.list(""):
        copied.put(key, store.get(key, max_bytes=1 << 20))
    return copied


def _answer(store: MemoryStore, site: str, answer: Any, key: SigningKey) -> Request:
    release = load_release(store, "toy", 2)
    assert release is not None
    proposal = release.proposal
    consent = Consent(
        kind="release-consent",
        job="toy",
        version=2,
        model_sha256=proposal.model_sha256,
        file_sha256=proposal.file_sha256,
        purpose="",
        answer=answer,
        at=datetime.now(UTC),
    )
    text = consent.to_json().decode()
    what = AnswerRelease(
        job="toy", version=2, signed=text, public_key=key.public_key, signature=key.sign(text)
    )
    return Request(request_id=new_update_id(), who=site, what=what, at=datetime.now(UTC))


@cache
def _start() -> tuple[MemoryStore, Request]:
    """Both sites have approved; and the request by which site-b thinks better of it."""
    store = MemoryStore()
    worker = Worker(store, [])
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    job = create(worker, job_spec(), ref, ref)
    for base, site in enumerate(SITES):
        payload = payload_of(toy_arrays(1.0))
        update = client_update(payload, site=site, base_version=base)
        store.put(update.payload_key, payload)
        accept(worker, update)
        publish_pending(worker, job)
    ask = ProposeRelease(job="toy", version=2)
    asked = Request(request_id=new_update_id(), who=SERVER, what=ask, at=datetime.now(UTC))
    assert handle(worker, asked).ok
    signing = {site: SigningKey.new() for site in SITES}
    for site, key in signing.items():
        assert handle(worker, _answer(store, site, "approve", key)).ok
    return store, _answer(store, "site-b", "refuse", signing["site-b"])


class World:
    """`actors`: two workers, or a worker and the handler of the refusal."""

    def __init__(self, *names: str) -> None:
        before, self.refusal = _start()
        self.store = _copy(before)
        self.names = names

    @property
    def actors(self) -> Mapping[str, Callable[[], None]]:
        def writer() -> None:
            bundle.write(Worker(SteppedStore(self.store), []), "toy", 2)

        def refuser() -> None:
            handle(Worker(SteppedStore(self.store), []), self.refusal)

        return {name: refuser if name == "site" else writer for name in self.names}

    def check(self) -> str:
        release = load_release(self.store, "toy", 2)
        assert release is not None
        released = is_released(self.store, "toy", 2)
        assert released == (release.decision is not None), (
            "decided and not written, or written and not decided"
        )
        if "site" in self.names:
            answer = load_answer(self.store, "site-b", self.refusal.request_id)
            assert answer is not None
            assert answer.ok != released, "a refusal that was taken, and a bundle"
        if not released:
            return "refused"
        assert release.approves == dict.fromkeys(SITES, True)
        for name, digest in parse_sums(self._file(SUMS)).items():
            assert sha256(self._file(name)) == digest, f"{name} is not what {SUMS} says"
        card = Card.from_json(self._file(CARD))
        assert card.approved == len(Consents.from_json(self._file(CONSENTS)).approvals) == 2
        return "released"

    def _file(self, name: str) -> bytes:
        return self.store.get(keys.bundle_key("toy", 2, name), max_bytes=1 << 20)


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each export gives other bytes, as on another machine."""
    number = count()
    monkeypatch.setattr(bundle, "_export", lambda *_: (f"onnx {next(number)}".encode(), ""))


def test_a_refusal_is_in_time_or_told_that_it_is_not() -> None:
    _start()
    explored = explore(lambda: World("worker", "site"))
    assert set(explored.outcomes) == {"refused", "released"}


def test_two_workers_write_one_bundle() -> None:
    _start()
    explored = explore(lambda: World("one", "two"), preemptions=2)
    assert set(explored.outcomes) == {"released"}


def test_a_worker_or_the_handler_dies_and_its_work_comes_again() -> None:
    _start()
    explored = explore(lambda: World("worker", "site"), preemptions=1, crashes=1)
    assert set(explored.outcomes) == {"refused", "released"}
