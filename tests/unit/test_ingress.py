"""The gate: what passes, what does not, and that nothing is acknowledged before it is safe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from broker import topology
from broker.sqlite import SqliteBroker
from federation.errors import BrokerUnavailable, StoreUnavailable
from federation.types import ClientUpdate, DeadLetter, SiteStatus
from federation.wire import Delivery, Message, encode_heartbeat, encode_update
from storage.liveness import FolderLiveness, Seen
from tasks.celery import ACCEPT, KEEP_DEAD_LETTER
from tasks.deadletters import MAX_KEPT_BYTES, dead_letter
from tasks.ingress import Ingress
from tests.factories import client_update


@dataclass
class Gate:
    """An ingress whose tasks are kept in `sent`; `down` makes sending fail."""

    broker: SqliteBroker
    live: Path
    sent: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    down: bool = False

    def send(self, name: str, arguments: Mapping[str, str]) -> None:
        if self.down:
            raise BrokerUnavailable("no broker")
        self.sent.append((name, arguments))

    @property
    def ingress(self) -> Ingress:
        return Ingress(self.broker, FolderLiveness(self.live), self.send)

    def letters(self) -> list[DeadLetter]:
        return [DeadLetter.from_json(a["letter"]) for name, a in self.sent if name == KEEP_DEAD_LETTER]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    broker = SqliteBroker(str(tmp_path / "queue.db"), lease_s=60, delivery_limit=20)
    broker.declare(("site-a",))
    yield Gate(broker, tmp_path / "live")
    broker.close()


def delivery(message: Message, queue: str = topology.UPDATES) -> Delivery:
    return Delivery(
        queue=queue,
        routing_key=message.routing_key,
        body=message.body,
        type=message.type,
        content_type=message.content_type,
        user_id=message.user_id,
        headers=message.headers,
    )


def test_a_good_update_becomes_a_task_of_ours(gate: Gate) -> None:
    update = client_update()
    gate.ingress.handle(delivery(encode_update(update)))
    ((name, arguments),) = gate.sent
    assert name == ACCEPT
    assert ClientUpdate.from_json(arguments["update"]) == update


def test_an_update_is_not_acknowledged_before_its_task_is_sent(gate: Gate) -> None:
    gate.down = True
    with pytest.raises(BrokerUnavailable):  # consume() then gives the delivery back
        gate.ingress.handle(delivery(encode_update(client_update())))


def test_a_bad_update_is_dead_lettered_whole_and_not_sent_on(gate: Gate) -> None:
    message = replace(encode_update(client_update()), content_type="text/plain")
    gate.ingress.handle(delivery(message))
    assert gate.sent == []
    waiting = gate.broker.drain(topology.DEAD)
    assert [DeadLetter.from_json(d.body).reason for d in waiting] == ["wrong-content-type"]


def test_a_dead_letter_travels_to_the_store_task(gate: Gate) -> None:
    message = replace(encode_update(client_update()), body=b"nonsense")
    gate.ingress.handle(delivery(message))
    (waiting,) = gate.broker.drain(topology.DEAD)
    gate.ingress.handle(waiting)
    (letter,) = gate.letters()
    assert letter.reason == "malformed-message"
    assert letter.routing_key == "updates.site-a"


def test_what_the_broker_dead_lettered_is_wrapped_with_its_reason(gate: Gate) -> None:
    body = json.dumps([[], {"update": "{}"}, {}]).encode()
    headers = {topology.DEATH_REASON: "delivery_limit", topology.DEATH_QUEUE: "fed.merge", "task": ACCEPT}
    gate.ingress.handle(
        Delivery(queue=topology.DEAD, routing_key="merge.accept_update", body=body, headers=headers)
    )
    (letter,) = gate.letters()
    assert letter.reason == "delivery-limit"
    assert "fed.merge" in letter.message
    assert ACCEPT in letter.message


def test_a_failed_dead_letter_task_is_not_wrapped_again(gate: Gate) -> None:
    inner = dead_letter(delivery(encode_update(client_update())), "wrong-user", "why")
    body = json.dumps([[], {"letter": inner.to_json().decode()}, {}]).encode()
    headers = {topology.DEATH_REASON: "rejected", "task": KEEP_DEAD_LETTER}
    gate.ingress.handle(
        Delivery(queue=topology.DEAD, routing_key="merge.keep_dead_letter", body=body, headers=headers)
    )
    assert gate.letters() == [inner]


def test_the_same_bad_message_twice_is_one_letter(gate: Gate) -> None:
    bad = delivery(replace(encode_update(client_update()), body=b"nonsense"))
    assert dead_letter(bad, "r", "m").id == dead_letter(bad, "r", "m").id
    other = dead_letter(replace(bad, routing_key="updates.site-b"), "r", "m")
    assert other.id != dead_letter(bad, "r", "m").id


def test_a_huge_body_is_kept_in_part_and_named_by_its_digest() -> None:
    huge = Delivery(queue="fed.updates", routing_key="updates.site-a", body=b"x" * (MAX_KEPT_BYTES + 1))
    letter = dead_letter(huge, "too-large", "too large")
    assert len(letter.body_base64) < MAX_KEPT_BYTES * 1.4
    assert f"of {MAX_KEPT_BYTES + 1} bytes, sha256" in letter.message


def test_heartbeats_reach_liveness_and_bad_ones_harm_nobody(gate: Gate) -> None:
    status = SiteStatus(site="site-a", state="training", step=3, steps=9, at=datetime.now(UTC))
    beat = delivery(encode_heartbeat(status, 60), topology.HEARTBEATS)
    gate.ingress.handle(replace(beat, body=b"{}"))
    gate.ingress.handle(replace(beat, user_id="site-b"))
    assert FolderLiveness(gate.live).sites() == []
    gate.ingress.handle(beat)
    assert [seen.status for seen in FolderLiveness(gate.live).sites()] == [status]


class DeadLiveness:
    """A Redis that is down."""

    def beat(self, status: SiteStatus) -> None:
        raise StoreUnavailable("redis is down")

    def sites(self) -> list[Seen]:
        raise StoreUnavailable("redis is down")


def test_without_liveness_heartbeats_are_dropped_and_updates_go_on(gate: Gate) -> None:
    ingress = Ingress(gate.broker, DeadLiveness(), gate.send)
    status = SiteStatus(site="site-a", state="idle", at=datetime.now(UTC))
    ingress.handle(delivery(encode_heartbeat(status, 60), topology.HEARTBEATS))
    ingress.handle(delivery(encode_update(client_update())))
    assert [name for name, _ in gate.sent] == [ACCEPT]
