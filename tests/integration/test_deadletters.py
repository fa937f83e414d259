"""A message that nobody can handle is tried so often and no more, is kept with its reason, and is requeued."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pika
import pytest
from celery import Celery
from typer.testing import CliRunner

from broker import topology
from broker.accounts import definitions
from broker.open import connect
from cli.main import app
from federation.ids import new_update_id
from federation.jobs import AggregationPolicy
from federation.settings import env_name
from federation.types import ClientUpdate, DeadLetter, Published
from federation.wire import encode_update
from storage.jobs import list_dead_letters
from storage.log import VersionLog
from tasks.celery import ACCEPT, ROUTING_KEYS, sender
from tasks.deadletters import requeue
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import PATIENCE_S, ROOT, SITES, Server, embedded, real, running, until

LIMIT = 1
POLICY = AggregationPolicy(strategy="fedasync", max_staleness=1000)
UPDATE_ID = re.compile(rb'update_id\\*": ?\\*"([0-9a-f-]{36})')
"""In an update's own message, or in a task that carries it as JSON within JSON."""
PAYLOAD = payload_of(toy_arrays(1.0))


@pytest.fixture(scope="module", params=["embedded", pytest.param("real", marks=pytest.mark.rabbitmq)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a delivery limit of LIMIT, and a bucket of its own: other tests leave letters in theirs."""
    folder = tmp_path_factory.mktemp("server")
    if request.param == "embedded":
        made = embedded(folder)
        made.environment[env_name("lease_s")] = "1"  # when a killed worker's message comes back
    else:
        rabbitmq, s3 = request.getfixturevalue("rabbitmq_server"), request.getfixturevalue("s3_server")
        made = real(folder, rabbitmq, request.getfixturevalue("redis_server"), s3)
        rabbitmq.reset(LIMIT)
        accounts = {site: f"{site}-secret" for site in SITES}
        rabbitmq.import_definitions(definitions(accounts, delivery_limit=LIMIT))
        made.environment |= {
            env_name("broker_url"): rabbitmq.url,
            env_name("store_url"): s3.url("fedqueue-letters"),
        }
        made.site_urls = {site: rabbitmq.url_of(site, secret) for site, secret in accounts.items()}
    made.environment[env_name("delivery_limit")] = str(LIMIT)
    with running(made) as started:
        yield started


def requeue_command(server: Server, *arguments: str) -> str:
    """What `fedqueue deadletter requeue` prints, as a process of its own: it sends tasks by Celery's settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FEDQUEUE_")}
    result = subprocess.run(
        [sys.executable, "-m", "cli.main", "deadletter", "requeue", *arguments],
        cwd=ROOT,
        env={**inherited, **server.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result
    return result.stdout


def requeue_here(server: Server, letter: DeadLetter) -> None:
    """The same without the command."""

    def send_task(name: str, arguments: Mapping[str, str]) -> None:
        with Celery(broker=server.settings.broker_url.get_secret_value()) as sender:
            sender.send_task(
                name, kwargs=dict(arguments), exchange=topology.TASKS_EXCHANGE, routing_key=ROUTING_KEYS[name]
            )

    broker = connect(server.settings)
    requeue(server.store, sender(server.settings, broker) if server.settings.embedded else send_task, letter)
    broker.close()


def command(server: Server, *arguments: str) -> str:
    """What `fedqueue deadletter list` or `show` prints."""
    result = CliRunner().invoke(app, ["deadletter", *arguments], env=server.environment)
    assert result.exit_code == 0, result
    return result.output


def listed(server: Server) -> list[str]:
    """The ids of the list, in its order."""
    return [line.split()[0] for line in command(server, "list").splitlines()[1:]]


def letters(server: Server) -> dict[str, DeadLetter]:
    """The waiting letters, by the id of the update in their bodies."""
    found = {}
    for letter in list_dead_letters(server.store):
        update_id = UPDATE_ID.search(b64decode(letter.body_base64))
        assert update_id is not None
        found[update_id[1].decode()] = letter
    return found


def wait_for_letter(server: Server, update: ClientUpdate) -> DeadLetter:
    until("a dead letter", lambda: update.update_id in letters(server))
    return letters(server)[update.update_id]


def merged(server: Server, job: str) -> list[str]:
    events = [record.event for record in VersionLog(server.store, job).history()]
    return [c.update.update_id for event in events if isinstance(event, Published) for c in event.merged]


def new_job() -> str:
    return f"job-{new_update_id()[-12:]}"


def send(server: Server, job: str, *poison: str) -> ClientUpdate:
    update = client_update(PAYLOAD, job=job, metrics={f"poison/{how}": 1.0 for how in poison})
    server.send(update, PAYLOAD)
    return update


def assert_the_next_one_merges(server: Server, job: str) -> None:
    update = send(server, job)
    until("the next update to merge", lambda: update.update_id in merged(server, job))


def test_an_update_that_came_before_its_job_is_merged_when_it_is_requeued(server: Server) -> None:
    job = new_job()
    update = send(server, job)
    first = wait_for_letter(server, update)
    assert (first.reason, first.user_id, first.queue) == ("unknown-job", "site-a", topology.UPDATES)
    assert listed(server) == [first.id]
    shown = command(server, "show", first.id)
    assert "unknown-job" in shown
    assert update.to_json().decode() in shown

    requeue_here(server, first)  # its cause is not gone

    def failed_again() -> bool:
        letter = letters(server).get(update.update_id)
        return letter is not None and letter.at != first.at

    until("the same letter again", failed_again)
    assert listed(server) == [first.id]

    server.create_job(job_spec(job, aggregation=POLICY))
    assert f"{first.id}  sent again as {ACCEPT}" in requeue_command(server, first.id)
    until("the merge", lambda: merged(server, job) == [update.update_id])
    assert listed(server) == []

    requeue_here(server, first)  # once too often
    assert_the_next_one_merges(server, job)
    assert merged(server, job).count(update.update_id) == 1
    assert listed(server) == []
    assert server.alive()


@pytest.mark.parametrize("text", [b"\xff" * 255, b"\x1b[2J", "ü".encode() * 127])
def test_properties_of_any_bytes_end_as_a_letter_and_the_server_goes_on(server: Server, text: bytes) -> None:
    update = client_update(PAYLOAD)
    message = encode_update(update)
    if server.settings.embedded:
        broker = server.as_site("site-a")
        broker.publish("fed.updates", replace(message, type=text.decode("utf-8", "backslashreplace")))
        broker.close()
    else:
        properties = pika.BasicProperties(type=text, content_type=text, user_id="site-a")
        with pika.BlockingConnection(pika.URLParameters(server.site_urls["site-a"])) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish(
                "fed.updates", message.routing_key, message.body, properties, mandatory=True
            )
    letter = wait_for_letter(server, update)
    assert letter.reason in ("wrong-type", "wrong-content-type")
    assert server.alive()
    server.store.delete(f"deadletters/{letter.id}.json")


# How accept_update ends -> how often at most it is tried, and the letter's reason, over RabbitMQ and embedded.
REAL_ENDS = {
    "fail": (1, "rejected"),
    "dawdle": (1, "rejected"),  # the soft time limit raises in it
    "hang": (LIMIT + 1, "delivery-limit"),  # the hard time limit kills it
    "die": (LIMIT + 1, "delivery-limit"),
    "exhaust": (LIMIT + 1, "delivery-limit"),  # MemoryError ends the whole worker
}
EMBEDDED_ENDS = {
    "fail": (1, "task-failed"),
    "exhaust": (1, "task-failed"),
    "die": (LIMIT + 1, "delivery-limit"),
}


def test_poison_is_tried_so_often_and_is_merged_after_the_cure(server: Server) -> None:
    job = new_job()
    server.create_job(job_spec(job, aggregation=POLICY))
    ends = EMBEDDED_ENDS if server.settings.embedded else REAL_ENDS
    name, broken = (
        ("aggregator", ["tests.integration.poison", "worker", "--queue", "merge"])
        if server.settings.embedded
        else ("worker", ["celery", "-A", "tests.integration.poison", "worker", "--loglevel", "INFO"])
    )
    sound, server.commands[name] = server.commands[name], broken
    server.kill(name)
    updates = {how: send(server, job, how) for how in ends}
    good = send(server, job)
    server.start(name)

    def all_dead() -> bool:
        if server.processes[name].poll() is not None:
            server.start(name)  # as its supervisor does
        return letters(server).keys() >= {update.update_id for update in updates.values()}

    until("the letters", all_dead, patience_s=3 * PATIENCE_S)  # the worker starts several times
    until("the good update to merge", lambda: merged(server, job) == [good.update_id])

    tries = re.findall(r"poisoned by (\S+)", (server.folder / f"{name}.log").read_text())
    for how, (most, reason) in ends.items():
        letter = letters(server)[updates[how].update_id]
        assert letter.reason == reason
        # fewer, if it came back because a worker that held it beside another one was killed by that one
        assert 1 <= tries.count(updates[how].update_id) <= most
        assert reason in command(server, "show", letter.id)
    assert len(listed(server)) == len(ends)

    server.commands[name] = sound
    server.kill(name)
    server.start(name)
    assert f"{len(ends)} sent again, 0 stay" in requeue_command(server, "--all")
    expected = sorted(u.update_id for u in (*updates.values(), good))
    until("all to merge", lambda: sorted(merged(server, job)) == expected)
    assert listed(server) == []
    assert server.alive()
