"""A dead letter keeps what matters, is never too large for the broker to carry, and can be sent on its way again."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kombu.utils.json import dumps
from typer.testing import CliRunner, Result

from broker import topology
from broker.sqlite import SqliteBroker
from cli.main import app
from federation.errors import AccessDenied, BadMessage, BrokerUnavailable, NotFound, StoreUnavailable
from federation.settings import env_name
from federation.types import ClientUpdate, DeadLetter
from federation.wire import Delivery, Message, encode_update
from storage.folder import FolderStore
from storage.jobs import (
    begin_requeue,
    finish_requeue,
    list_dead_letters,
    load_dead_letter,
    save_dead_letter,
)
from storage.memory import MemoryStore
from tasks.celery import ACCEPT, HANDLE_REQUEST, KEEP_DEAD_LETTER, PUBLISH, ROUTING_KEYS, embedded_message
from tasks.deadletters import MAX_KEPT_BYTES, dead_letter, keep, keep_update, requeue, task_of
from tests.factories import client_update

CONF = Path(__file__).parents[2] / "docker" / "rabbitmq.conf"
LARGEST = int(re.findall(r"^max_message_size = (\d+)$", CONF.read_text(), re.MULTILINE)[0])
ENVELOPE = 2048  # what Celery puts around a task's arguments


# --- what a letter keeps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "\\", '"', "\0", "é", "\U0001f600"])
def test_whatever_a_site_sends_the_broker_carries_its_letter(text: str) -> None:
    delivery = Delivery(
        queue="fed.updates",
        routing_key="updates.site-a",
        user_id="site-a",
        type=text * (255 // len(text.encode())),
        content_type=text * (255 // len(text.encode())),
        headers={text * 20_000: text * 20_000},
        body=b"\xff" * LARGEST,
    )
    letter = dead_letter(delivery, "malformed-message", text * 5000).to_json().decode()
    as_task = dumps([[], {"letter": letter}, {"callbacks": None, "errbacks": None}])
    assert len(as_task.encode()) + ENVELOPE < LARGEST
    assert DeadLetter.from_json(letter).routing_key == "updates.site-a"


def test_properties_that_are_not_utf_8_have_a_letter_too() -> None:
    text = (b"\xff" * 255).decode("utf-8", "backslashreplace")  # as broker/delivery.py hands it on
    delivery = Delivery(
        queue="fed.updates", routing_key=text, body=b"", type=text, content_type=text, user_id=text
    )
    letter = dead_letter(delivery, "wrong-routing-key", "m")
    assert DeadLetter.from_json(letter.to_json()) == letter
    assert letter.content_type is not None
    assert text.startswith(letter.content_type[:-3])


def test_a_large_body_leaves_its_beginning_its_length_and_its_digest() -> None:
    body = bytes(range(256)) * 128
    letter = dead_letter(Delivery(queue="fed.updates", routing_key="updates.site-a", body=body), "r", "why")
    assert base64.b64decode(letter.body_base64) == body[:MAX_KEPT_BYTES]
    assert letter.message == (
        f"why (kept {MAX_KEPT_BYTES} of {len(body)} bytes, sha256 {hashlib.sha256(body).hexdigest()})"
    )


def test_the_same_message_twice_is_one_letter() -> None:
    delivery = Delivery(queue="fed.updates", routing_key="updates.site-a", body=b"x")
    again = Delivery(queue="fed.updates", routing_key="updates.site-a", body=b"x", attempts=2)
    other = Delivery(queue="fed.updates", routing_key="updates.site-b", body=b"x")
    assert dead_letter(delivery, "r", "m").id == dead_letter(again, "r", "m").id
    assert dead_letter(delivery, "r", "m").id != dead_letter(other, "r", "m").id


def test_a_letter_of_an_older_release_still_loads() -> None:
    old = json.loads(site_letter(encode_update(client_update())).to_json())
    for new in ("type", "requeue_began_at", "requeued_at"):
        del old[new]
    assert DeadLetter.from_json(json.dumps(old)).type is None


def test_what_is_no_letter_is_kept_in_one() -> None:
    store = MemoryStore()
    keep(store, '{"schema_version": 2}')
    (letter,) = list_dead_letters(store)
    assert letter.reason == "malformed-message"
    assert base64.b64decode(letter.body_base64) == b'{"schema_version": 2}'


class DeniedStore(MemoryStore):
    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        raise AccessDenied("the key has expired")


def test_a_letter_waits_for_a_store_that_refuses_it() -> None:
    """A failed task becomes a letter at once; this one would circle between queue and worker for ever."""
    with pytest.raises(StoreUnavailable, match="the key has expired"):
        keep(DeniedStore(), site_letter(encode_update(client_update())).to_json().decode())


# --- its log ---------------------------------------------------------------------------------------------------


def letter_of(
    message: Message, queue: str, reason: str = "rejected", user_id: str | None = None
) -> DeadLetter:
    delivery = Delivery(
        queue=queue,
        routing_key=message.routing_key,
        body=message.body,
        type=message.type,
        content_type=message.content_type,
        user_id=user_id,
        headers=message.headers,
    )
    return dead_letter(delivery, reason, "why")


def site_letter(message: Message, reason: str = "malformed-message") -> DeadLetter:
    return letter_of(message, topology.UPDATES, reason, message.user_id)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def letter(store: MemoryStore) -> DeadLetter:
    """A valid update that was dead-lettered for something else, in `store`."""
    made = site_letter(encode_update(client_update()), "delivery-limit")
    save_dead_letter(store, made)
    return made


def fails_again(store: MemoryStore, letter: DeadLetter, reason: str = "again") -> DeadLetter:
    again = letter.model_copy(update={"reason": reason})
    save_dead_letter(store, again)
    return again


def waiting(store: MemoryStore) -> list[DeadLetter]:
    return list(list_dead_letters(store))


def test_a_requeued_letter_waits_no_more_but_is_still_there(store: MemoryStore, letter: DeadLetter) -> None:
    number, began = begin_requeue(store, letter.id)
    assert [m.id for m in waiting(store)] == [letter.id]
    finish_requeue(store, number, began)
    assert waiting(store) == []
    found = load_dead_letter(store, letter.id)
    assert found.body_base64 == letter.body_base64
    assert found.requeued_at is not None
    with pytest.raises(NotFound):
        load_dead_letter(store, "0" * 36)


def test_the_first_of_the_same_letters_stays_while_it_waits(store: MemoryStore, letter: DeadLetter) -> None:
    fails_again(store, letter)
    assert waiting(store) == [letter]


def test_what_fails_again_waits_again(store: MemoryStore, letter: DeadLetter) -> None:
    for reason in ("second", "third"):
        finish_requeue(store, *begin_requeue(store, letter.id))
        assert waiting(store) == []
        again = fails_again(store, letter, reason)
        assert waiting(store) == [again]


def test_what_fails_again_before_the_requeue_is_recorded_waits_again(
    store: MemoryStore, letter: DeadLetter
) -> None:
    number, began = begin_requeue(store, letter.id)
    again = fails_again(store, letter)
    finish_requeue(store, number, began)
    assert waiting(store) == [again]


def test_a_second_operator_hides_nothing(store: MemoryStore, letter: DeadLetter) -> None:
    first, second = begin_requeue(store, letter.id), begin_requeue(store, letter.id)
    finish_requeue(store, *first)
    again = fails_again(store, letter)  # what the second one sent
    finish_requeue(store, *second)
    assert waiting(store) == [again]


def test_a_record_that_nobody_can_read_hides_no_failure(store: MemoryStore, letter: DeadLetter) -> None:
    store.put(f"deadletters/{letter.id}.json", b"not a letter")
    again = fails_again(store, letter)
    assert waiting(store) == [again]


# --- what is sent ------------------------------------------------------------------------------------------------


def sent_by(store: MemoryStore, letter: DeadLetter) -> tuple[str, Mapping[str, str]]:
    sent: list[tuple[str, Mapping[str, str]]] = []
    name = requeue(store, lambda task, arguments: sent.append((task, arguments)), letter)
    ((task, arguments),) = sent
    assert task == name
    return task, arguments


def test_an_update_is_sent_as_the_ingress_sends_it(store: MemoryStore) -> None:
    update = client_update()
    letter = site_letter(replace(encode_update(update), headers={"task": HANDLE_REQUEST, "CC": ["merge.x"]}))
    save_dead_letter(store, letter)
    task, arguments = sent_by(store, letter)
    assert task == ACCEPT
    assert arguments.keys() == {"update"}
    assert ClientUpdate.from_json(arguments["update"]) == update
    assert waiting(store) == []


def test_an_update_that_belonged_to_no_job_is_sent_again(store: MemoryStore) -> None:
    update = client_update()
    keep_update(store, update, "unknown-job", "there is no job 'toy'")
    (letter,) = waiting(store)
    task, arguments = sent_by(store, letter)
    assert (task, ClientUpdate.from_json(arguments["update"])) == (ACCEPT, update)


def celery_letter(task: str, body: object, key: str = "") -> DeadLetter:
    """As the ingress writes it for a message that RabbitMQ dead-lettered."""
    message = Message(
        routing_key=key or ROUTING_KEYS[task],
        body=body if isinstance(body, bytes) else json.dumps(body).encode(),
        type="",
        headers={"task": task, "id": "x"},
    )
    return letter_of(message, topology.DEAD)


EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
ARGUMENTS = {"job": "toy"}


@pytest.mark.parametrize(
    "letter",
    [
        celery_letter(PUBLISH, [[], ARGUMENTS, EMBED]),
        letter_of(embedded_message(PUBLISH, ARGUMENTS), topology.MERGE),
    ],
    ids=["rabbitmq", "embedded"],
)
def test_a_task_is_sent_as_the_same_task(store: MemoryStore, letter: DeadLetter) -> None:
    save_dead_letter(store, letter)
    assert sent_by(store, letter) == (PUBLISH, ARGUMENTS)
    assert waiting(store) == []


GOOD = encode_update(client_update())

STAY: dict[str, tuple[DeadLetter, str]] = {
    "malformed body": (site_letter(replace(GOOD, body=b"nonsense")), "malformed-message"),
    "another type": (site_letter(replace(GOOD, type="other")), "wrong-type"),
    "another account": (site_letter(replace(GOOD, user_id="site-b")), "wrong-user"),
    "body of another site": (
        site_letter(replace(GOOD, body=client_update(site="site-b").to_json())),
        "wrong-site",
    ),
    "kept in part": (site_letter(replace(GOOD, body=GOOD.body + b" " * MAX_KEPT_BYTES)), "cut"),
    "no key of ours": (site_letter(replace(GOOD, routing_key="heartbeats.site-a")), "wrong-routing-key"),
    "a site that names a task": (
        site_letter(
            Message(routing_key=ROUTING_KEYS[HANDLE_REQUEST], type="", body=json.dumps([[], {}, {}]).encode())
        ),
        "wrong-routing-key",
    ),
    "task with a pickle": (celery_letter(PUBLISH, b"\x80\x04]\x94."), "malformed-message"),
    "task with positional arguments": (celery_letter(PUBLISH, [["toy"], {}, EMBED]), "malformed-message"),
    "task with a list": (celery_letter(PUBLISH, [[], {"job": ["toy"]}, EMBED]), "malformed-message"),
    "task of protocol 1": (celery_letter(PUBLISH, {"task": PUBLISH, "kwargs": {}}), "malformed-message"),
    "task of another name": (
        celery_letter(PUBLISH, {"task": HANDLE_REQUEST, "arguments": {}}),
        "malformed-message",
    ),
    "task that there is none of": (celery_letter("x", [[], {}, EMBED], "merge.map"), "wrong-routing-key"),
}


@pytest.mark.parametrize("case", STAY)
def test_what_is_no_message_of_ours_stays_and_nothing_is_sent(store: MemoryStore, case: str) -> None:
    letter, reason = STAY[case]
    save_dead_letter(store, letter)
    with pytest.raises(BadMessage) as caught:
        sent_by(store, letter)
    assert caught.value.reason == reason
    assert waiting(store) == [letter]
    assert len(list(store.list(""))) == 1


def test_a_letter_about_a_letter_is_requeued_as_the_letter_in_it(store: MemoryStore) -> None:
    inner = site_letter(replace(GOOD, body=b"nonsense")).to_json().decode()
    task, arguments = task_of(
        letter_of(embedded_message(KEEP_DEAD_LETTER, {"letter": inner}), topology.MERGE)
    )
    assert (task, arguments) == (KEEP_DEAD_LETTER, {"letter": inner})


class DyingStore(MemoryStore):
    """Its process dies at put number `last`, before or after it."""

    last, after = 0, False

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        self.last -= 1
        if self.last == 0 and not self.after:
            raise SystemExit
        done = super().put_if_absent(key, data)
        if self.last == 0:
            raise SystemExit
        return done


@pytest.mark.parametrize(
    ("step", "after", "sent"), [(1, False, 0), (1, True, 0), (2, False, 1), (2, True, 1)]
)
def test_wherever_a_requeue_dies_the_message_is_sent_or_waits(step: int, after: bool, sent: int) -> None:
    store = DyingStore()
    letter = site_letter(GOOD)
    save_dead_letter(store, letter)
    store.last, store.after = step, after
    tasks: list[str] = []
    with pytest.raises(SystemExit):
        requeue(store, lambda task, arguments: tasks.append(task), letter)
    assert len(tasks) == sent
    done = (step, after) == (2, True)
    assert len(waiting(store)) == (0 if done else 1)
    if not done:
        assert sent_by(store, letter)[0] == ACCEPT
        assert waiting(store) == []


def test_a_letter_that_the_broker_did_not_confirm_waits(store: MemoryStore, letter: DeadLetter) -> None:
    def down(task: str, arguments: Mapping[str, str]) -> None:
        raise BrokerUnavailable("no broker")

    with pytest.raises(BrokerUnavailable):
        requeue(store, down, letter)
    assert [m.id for m in waiting(store)] == [letter.id]
    assert sent_by(store, letter)[0] == ACCEPT
    assert waiting(store) == []


# --- the commands --------------------------------------------------------------------------------------------------


@dataclass
class Desk:
    """An operator's, in the embedded mode."""

    store: FolderStore
    broker: SqliteBroker

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["deadletter", *arguments])

    def sent(self) -> list[str]:
        return [json.loads(d.body)["task"] for d in self.broker.drain(topology.MERGE)]

    def keep(self, *letters: DeadLetter) -> None:
        for letter in letters:
            save_dead_letter(self.store, letter)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv(env_name("store_url"), f"file:{tmp_path / 'store'}")
    monkeypatch.setenv(env_name("broker_url"), f"sqlite:{tmp_path / 'queue.db'}")
    monkeypatch.setenv(env_name("live_url"), f"file:{tmp_path / 'live'}")
    broker = SqliteBroker(tmp_path / "queue.db")
    yield Desk(FolderStore(tmp_path / "store"), broker)
    broker.close()


def at(letter: DeadLetter, minute: int) -> DeadLetter:
    return letter.model_copy(update={"at": datetime(2026, 1, 2, 3, minute, tzinfo=UTC)})


BAD = site_letter(replace(GOOD, body=b"nonsense"))
UPDATE = site_letter(GOOD, "unknown-job")
TASK = celery_letter(PUBLISH, [[], ARGUMENTS, EMBED])


def test_the_list_has_one_line_per_letter_newest_last(desk: Desk) -> None:
    desk.keep(at(BAD, 5), at(TASK, 7), at(UPDATE, 6))
    lines = desk.run("list").output.splitlines()
    assert [line.split()[0] for line in lines] == ["id", BAD.id, UPDATE.id, TASK.id]
    assert lines[1].split()[1:] == ["2026-01-02", "03:05:00", topology.UPDATES, BAD.reason, "site-a", "why"]
    assert lines[3].split()[1:] == ["2026-01-02", "03:07:00", topology.DEAD, TASK.reason, "server", "why"]


def test_show_has_everything_and_nothing_that_a_terminal_obeys(desk: Desk) -> None:
    evil = dead_letter(
        Delivery(queue="fed.updates", routing_key="updates.site-a", body="\x1b[2Jé [red]\n".encode()),
        "malformed-message",
        "[bold]\n\x1b[31m \u202e",
    )
    desk.keep(evil)
    output = desk.run("show", evil.id).output
    assert "\x1b" not in output
    assert "\\x1b[2Jé [red]" in output
    assert "\\x1b[31m \\u202e" in output
    for value in (evil.id, "malformed-message", "fed.updates", "updates.site-a"):
        assert value in output
    listed = desk.run("list").output
    assert "[bold]\\n\\x1b[31m" in listed
    assert "\x1b" not in listed


def test_show_of_a_body_that_is_no_text(desk: Desk) -> None:
    body = b"\xff\x00" * 200
    binary = site_letter(replace(GOOD, body=body))
    desk.keep(binary)
    output = desk.run("show", binary.id).output
    assert "400 bytes, not text" in output
    assert base64.b64encode(body).decode() in output


@pytest.mark.parametrize("unknown", ["0" * 36, "../jobs/x", "[/red]"])
@pytest.mark.parametrize("command", ["show", "requeue"])
def test_an_unknown_id_says_where_ids_are_found(desk: Desk, command: str, unknown: str) -> None:
    desk.keep(UPDATE)
    result = desk.run(command, unknown)
    assert result.exit_code == 1
    assert unknown in result.output
    assert "fedqueue deadletter list" in result.output


def test_requeue_by_id_sends_and_takes_it_off_the_list(desk: Desk) -> None:
    desk.keep(UPDATE, TASK)
    result = desk.run("requeue", UPDATE.id)
    assert (result.exit_code, desk.sent()) == (0, [ACCEPT])
    assert [m.id for m in list_dead_letters(desk.store)] == [TASK.id]
    assert "requeued_at" in desk.run("show", UPDATE.id).output
    assert desk.run("requeue", UPDATE.id).exit_code == 0  # the broker lost it: once more
    assert desk.sent() == [ACCEPT]


def test_requeue_all_sends_what_it_can_and_says_why_the_rest_stays(desk: Desk) -> None:
    desk.keep(at(BAD, 5), at(TASK, 7), at(UPDATE, 6))
    result = desk.run("requeue", "--all")
    assert result.exit_code == 1
    assert desk.sent() == [ACCEPT, PUBLISH]
    assert f"{BAD.id}  stays, malformed-message" in result.output
    assert "2 sent again, 1 stay" in result.output
    assert [m.id for m in list_dead_letters(desk.store)] == [BAD.id]


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (("--reason", "unknown-job"), [ACCEPT]),
        (("--queue", topology.DEAD), [PUBLISH]),
        (("--reason", "unknown-job", "--queue", topology.DEAD), []),
    ],
)
def test_requeue_all_of_a_kind(desk: Desk, options: tuple[str, ...], sent: list[str]) -> None:
    desk.keep(UPDATE, TASK)
    assert desk.run("requeue", "--all", *options).exit_code == 0
    assert desk.sent() == sent


@pytest.mark.parametrize("arguments", [(), ("--all", UPDATE.id), (UPDATE.id, "--reason", "x")])
def test_requeue_wants_to_know_what(desk: Desk, arguments: tuple[str, ...]) -> None:
    desk.keep(UPDATE)
    assert desk.run("requeue", *arguments).exit_code == 1
    assert desk.sent() == []
