"""Every bad input ends with a readable reason in the store, the server stays up, and good updates still merge.

The server is real processes, embedded and over RabbitMQ, Redis and S3; the test talks to it as a site does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from federation.errors import FedqueueError
from federation.ids import new_update_id
from federation.keys import rejected_key
from federation.types import ClientUpdate, DeadLetter, Head, Refusal
from federation.wire import Message, encode_update
from storage.jobs import list_dead_letters
from tests.factories import Arrays, client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import Server, until


@pytest.fixture
def job(server: Server, request: pytest.FixtureRequest) -> str:
    """A job of its own for each test."""
    name = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(name))
    return name


def head(server: Server, job: str) -> Head:
    found = server.head(job)
    assert found is not None
    return found


def assert_next_good_update_merges(server: Server, job: str) -> None:
    before = head(server, job)
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload, job=job, base_version=before.version)
    server.send(update, payload)
    until("the next good update to merge", lambda: head(server, job).version == before.version + 1)
    assert server.alive(), server.logs()


def refusal(server: Server, update: ClientUpdate) -> Refusal:
    key = rejected_key(update.job, update.site, update.update_id)

    def there() -> bool:
        return key in set(server.store.list(key))

    until(f"a refusal of {update.update_id}", there)
    return Refusal.from_json(server.store.get(key, max_bytes=1 << 20))


# --- refused by the log ------------------------------------------------------------------------------------


def _without(arrays: Arrays, name: str) -> Arrays:
    return {key: value for key, value in arrays.items() if key != name}


def _nan(arrays: Arrays, value: float) -> Arrays:
    broken = arrays["conv.weight"].copy()
    broken.flat[7] = value
    return {**arrays, "conv.weight": broken}


BAD_TENSORS: dict[str, tuple[Arrays, str]] = {
    "tensor missing": (_without(toy_arrays(1.0), "norm.bias"), "layout"),
    "tensor extra": ({**toy_arrays(1.0), "extra": np.zeros(1, np.float32)}, "layout"),
    "wrong shape": ({**toy_arrays(1.0), "norm.bias": np.zeros(5, np.float32)}, "layout"),
    "wrong dtype": ({**toy_arrays(1.0), "norm.bias": np.zeros(4, np.int64)}, "layout"),
    "not a number": (_nan(toy_arrays(1.0), float("nan")), "not-finite"),
    "infinity": (_nan(toy_arrays(1.0), float("inf")), "not-finite"),
    "too large to merge": (_nan(toy_arrays(1.0), 3e38), "out-of-range"),
    "negative variance": (
        {**toy_arrays(1.0), "norm.running_var": np.full(4, -0.5, np.float32)},
        "negative-variance",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(server: Server, job: str, case: str) -> None:
    arrays, reason = BAD_TENSORS[case]
    payload = payload_of(arrays)
    update = client_update(payload, job=job)
    server.send(update, payload)
    assert refusal(server, update).reason == reason
    assert head(server, job).version == 0
    assert_next_good_update_merges(server, job)


GOOD = payload_of(toy_arrays(1.0))


@dataclass(frozen=True)
class BadPayloadCase:
    declared: bytes  # what the update describes
    uploaded: bytes | None  # what is in the store
    reason: str


BAD_PAYLOADS = {
    "payload missing": BadPayloadCase(GOOD, None, "missing-payload"),
    "truncated in the store": BadPayloadCase(GOOD, GOOD[:-9], "wrong-size"),
    "larger than declared": BadPayloadCase(GOOD, GOOD + b"more", "wrong-size"),
    "wrong digest": BadPayloadCase(GOOD, GOOD[:-1] + b"\x07", "wrong-digest"),
    "truncated by the site": BadPayloadCase(GOOD[:-9], GOOD[:-9], "truncated"),
    "header that lies": BadPayloadCase(
        struct.pack("<Q", 1 << 60) + GOOD[8:], struct.pack("<Q", 1 << 60) + GOOD[8:], "malformed-header"
    ),
    "no tensor file": BadPayloadCase(b"\x80\x04pickle" * 20, b"\x80\x04pickle" * 20, "malformed-header"),
}


@pytest.mark.parametrize("case", BAD_PAYLOADS)
def test_bad_payloads_are_refused(server: Server, job: str, case: str) -> None:
    bad = BAD_PAYLOADS[case]
    update = client_update(bad.declared, job=job)
    server.send(update, bad.uploaded)
    assert refusal(server, update).reason == bad.reason
    assert_next_good_update_merges(server, job)


BAD_NUMBERS: dict[str, tuple[dict[str, object], str]] = {
    "base version from the future": ({"base_version": 7}, "future-base"),
    "other kind of payload": ({"payload_kind": "difference"}, "wrong-payload-kind"),
    "larger than the limit": ({"payload_bytes": 1 << 39}, "too-large"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_bad_numbers_are_refused(server: Server, job: str, case: str) -> None:
    changes, reason = BAD_NUMBERS[case]
    update = client_update(GOOD, job=job, **changes)
    server.send(update, GOOD)
    assert refusal(server, update).reason == reason
    assert_next_good_update_merges(server, job)


def test_a_site_that_is_no_participant_is_refused(server: Server) -> None:
    name = f"job-{new_update_id()[-12:]}"
    server.create_job(job_spec(name, participants=("site-a",)))
    update = client_update(GOOD, job=name, site="site-b")
    server.send(update, GOOD)
    assert refusal(server, update).reason == "not-a-participant"
    assert_next_good_update_merges(server, name)


def test_a_base_older_than_max_staleness_is_refused_and_a_redelivered_merge_is_not(
    server: Server, job: str
) -> None:
    first = client_update(GOOD, job=job)
    server.send(first, GOOD)
    until("the first merge", lambda: head(server, job).version == 1)
    for _ in range(4):  # max_staleness is 3
        assert_next_good_update_merges(server, job)
    old = client_update(GOOD, job=job, base_version=0)
    server.send(first, None)  # delivered again after its id was forgotten
    server.send(old, GOOD)
    assert refusal(server, old).reason == "too-stale"
    assert list(server.store.list(rejected_key(job, first.site, first.update_id))) == []
    assert_next_good_update_merges(server, job)


def test_the_same_update_twice_counts_once(server: Server, job: str) -> None:
    update = client_update(GOOD, job=job)
    for _ in range(3):
        server.send(update, GOOD)
    until("the merge", lambda: head(server, job).version == 1)
    assert_next_good_update_merges(server, job)
    assert head(server, job).version == 2


# --- dead-lettered -----------------------------------------------------------------------------------------


def _body(update: ClientUpdate, **changes: object) -> bytes:
    return json.dumps({**json.loads(update.to_json()), **changes}).encode()


Spoil = Callable[[Message, ClientUpdate], Message]

BAD_MESSAGES: dict[str, tuple[Spoil, str]] = {
    "malformed JSON": (lambda m, u: replace(m, body=b'{"update_id": '), "malformed-message"),
    "not UTF-8": (lambda m, u: replace(m, body=b"\xff\xfe\x00"), "malformed-message"),
    "deeply nested": (lambda m, u: replace(m, body=b"[" * 4000), "malformed-message"),
    "NaN in a number": (
        lambda m, u: replace(m, body=_body(u, metrics={"loss": float("nan")})),
        "malformed-message",
    ),
    "unknown field": (lambda m, u: replace(m, body=_body(u, run="rm -rf")), "malformed-message"),
    "key that escapes": (
        lambda m, u: replace(m, body=_body(u, payload_key=f"jobs/{u.job}/updates/../models/x")),
        "malformed-message",
    ),
    "key of another site": (
        lambda m, u: replace(m, body=_body(u, payload_key=u.payload_key.replace("site-a", "site-b"))),
        "malformed-message",
    ),
    "site of another": (
        lambda m, u: replace(m, body=client_update(GOOD, job=u.job, site="site-b").to_json()),
        "wrong-site",
    ),
    "too large": (lambda m, u: replace(m, body=m.body + b" " * 5000), "too-large"),
    "wrong content type": (
        lambda m, u: replace(m, content_type="application/x-python-serialize"),
        "wrong-content-type",
    ),
    "wrong type": (lambda m, u: replace(m, type="celery"), "wrong-type"),
    "another task's name": (
        lambda m, u: replace(m, headers={"task": "fedqueue.handle_request", "id": "x"}),
        "unexpected-header",
    ),
    "unknown job": (lambda m, u: encode_update(client_update(GOOD, job="nowhere")), "unknown-job"),
}


def letters(server: Server) -> dict[str, DeadLetter]:
    return {letter.id: letter for letter in list_dead_letters(server.store)}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_are_dead_lettered(server: Server, job: str, case: str) -> None:
    spoil, reason = BAD_MESSAGES[case]
    update = client_update(GOOD, job=job)
    before = letters(server)
    broker = server.as_site("site-a")
    broker.publish("fed.updates", spoil(encode_update(update), update))
    broker.close()
    until("a dead letter", lambda: letters(server).keys() - before.keys())
    (new,) = letters(server).keys() - before.keys()
    assert letters(server)[new].reason == reason
    assert_next_good_update_merges(server, job)


def test_a_forged_user_id_never_counts(server: Server, job: str) -> None:
    update = client_update(GOOD, job=job)
    server.store.put_if_absent(update.payload_key, GOOD)
    broker = server.as_site("site-a")
    before = letters(server)
    try:
        broker.publish("fed.updates", replace(encode_update(update), user_id="site-b"))
    except FedqueueError:
        pass  # RabbitMQ itself refuses it
    else:
        until("a dead letter", lambda: letters(server).keys() - before.keys())
    finally:
        broker.close()
    assert_next_good_update_merges(server, job)
    assert head(server, job).version == 1
