"""Names, matching, permissions, definitions and plain headers: everything that needs no broker."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import topology
from broker.accounts import definitions, password_hash, site_permissions
from broker.backoff import backoff_s, pause
from broker.delivery import MAX_DEPTH, attempts_of, plain
from federation.errors import BadSettings


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("updates.*", "updates.site-a", True),
        ("updates.*", "updates", False),
        ("updates.*", "updates.a.b", False),
        ("updates.*", "updates.", True),  # the empty word is a word
        ("all.#", "all", True),
        ("all.#", "all.new-version", True),
        ("all.#", "all.a.b", True),
        ("all.#", "allx.a", False),
        ("#", "", True),
        ("#", "a.b.c", True),
        ("*", "", True),
        ("a.#.c", "a.c", True),
        ("a.#.c", "a.b.b.c", True),
        ("a.#.c", "a.b.d", False),
        ("#.#", "a", True),
        ("*.#.*", "a", False),
        ("*.#.*", "a.b", True),
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
    ],
)
def test_topic_matching(pattern: str, key: str, expected: bool) -> None:
    assert topology.matches(pattern, key) is expected


WORDS = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=5)
KEYS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5)


@given(WORDS, KEYS)
def test_matching_agrees_with_a_regular_expression(pattern: list[str], key: list[str]) -> None:
    """Each word is written with a dot before it, so that `#` can vanish together with its dot."""
    expression = "".join(
        r"(\.[^.]*)*" if word == "#" else r"\.[^.]*" if word == "*" else rf"\.{word}" for word in pattern
    )
    expected = re.fullmatch(expression, "." + ".".join(key)) is not None
    assert topology.matches(".".join(pattern), ".".join(key)) is expected


def test_what_is_accepted_never_vanishes_and_hints_never_block() -> None:
    by_name = {spec.name: spec for spec in topology.QUEUES}
    for name in (topology.UPDATES, topology.MERGE, topology.EVALUATE):
        arguments = by_name[name].arguments
        assert arguments["x-queue-type"] == "quorum"
        assert arguments["x-overflow"] == "reject-publish"
        assert arguments["x-dead-letter-exchange"] == topology.DEAD_EXCHANGE
        assert arguments["x-dead-letter-strategy"] == "at-least-once"
        assert arguments["x-delivery-limit"] == 20
    for spec in (by_name[topology.HEARTBEATS], topology.site_queue("site-a")):
        assert spec.arguments["x-overflow"] == "drop-head"
        assert spec.arguments["x-queue-type"] == "classic"
        assert "x-dead-letter-exchange" not in spec.arguments
    assert by_name[topology.HEARTBEATS].arguments["x-message-ttl"] == 30_000
    assert topology.site_queue("site-a").arguments["x-expires"] == 14 * 24 * 3600 * 1000
    assert "x-dead-letter-exchange" not in by_name[topology.DEAD].arguments
    assert topology.queue_arguments(topology.MERGE, 7)["x-delivery-limit"] == 7
    assert [spec.name for spec in topology.TASK_QUEUES] == [topology.MERGE, topology.EVALUATE]


@pytest.mark.parametrize("site", ["", "Site", "a.b", "a/b", "-a", "a_b", "all", "server", "a\n", "*", "#"])
def test_names_that_no_site_may_have(site: str) -> None:
    for use in (topology.control_queue, topology.site_queue, site_permissions):
        with pytest.raises(BadSettings):
            use(site)
    with pytest.raises(BadSettings):
        definitions({site: "password"})


def test_the_patterns_of_a_site_fit_its_own_names_only() -> None:
    p = site_permissions("site-a")
    assert p.topic_exchange == topology.UPDATES_EXCHANGE
    assert re.search(p.write, "fed.updates")
    assert re.search(p.read, "fed.ctl.site-a")
    assert re.search(p.topic_write, "updates.site-a")
    assert re.search(p.topic_write, "heartbeats.site-a")
    assert re.search(p.topic_write, "reports.site-a")
    for pattern, other in [
        (p.write, "fedxupdates"),
        (p.write, "fed.updates2"),
        (p.write, "amq.default"),
        (p.read, "fed.ctl.site-ab"),
        (p.read, "fed.ctl.xsite-a"),
        (p.read, "fedxctl.site-a"),
        (p.read, "fed.updates"),
        (p.topic_write, "updatesxsite-a"),
        (p.topic_write, "updates.site-a.x"),
        (p.topic_write, "updates.site-ab"),
        (p.topic_write, "reports.site-b"),
        (p.topic_write, "x.updates.site-a"),
        (p.configure, "fed.ctl.site-a"),
        (p.topic_read, "all.x"),
    ]:
        assert not re.search(pattern, other), (pattern, other)


def test_password_hash_is_as_rabbitmq_documents_it() -> None:
    # the worked example of https://www.rabbitmq.com/docs/passwords#computing-password-hash
    assert (
        password_hash("test12", bytes.fromhex("908DC60A"))
        == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    )
    raw = base64.b64decode(password_hash("pä ss"))
    assert raw[4:] == hashlib.sha256(raw[:4] + "pä ss".encode()).digest()
    assert password_hash("same") != password_hash("same")


def test_definitions_are_json_without_passwords() -> None:
    document = definitions({"site-a": "secret-1"}, {"server": "secret-2"}, vhost="fed", delivery_limit=7)
    text = json.dumps(document)
    assert "secret" not in text
    assert {user["name"] for user in document["users"]} == {"site-a", "server"}
    assert {q["name"]: q["arguments"] for q in document["queues"]} == {
        **{spec.name: spec.arguments for spec in topology.queues(7)},
        "fed.ctl.site-a": topology.site_queue("site-a").arguments,
    }
    assert {part["vhost"] for kind in ("queues", "bindings", "permissions") for part in document[kind]} == {
        "fed"
    }


def test_definitions_refuse_confusing_accounts() -> None:
    with pytest.raises(BadSettings, match="of its own"):
        definitions({"one": "a"}, {"one": "b"})
    with pytest.raises(BadSettings, match="password"):
        definitions({"one": ""})


def test_headers_become_plain() -> None:
    hostile = {
        b"\xff": 1,
        "when": datetime(2026, 1, 2, tzinfo=UTC),
        "sum": Decimal("1.50"),
        "deep": [b"ok", {"x": None}],
    }
    assert plain(hostile) == {
        "\\xff": 1,
        "when": "2026-01-02 00:00:00+00:00",
        "sum": "1.50",
        "deep": ["ok", {"x": None}],
    }
    nest: object = "end"
    for _ in range(500):
        nest = [nest]
    flat = plain(nest)
    for _ in range(MAX_DEPTH):
        (flat,) = flat
    assert flat == "…"


@pytest.mark.parametrize(
    ("redelivered", "count", "attempts"),
    [
        (False, None, 1),
        (False, 99, 1),
        (True, None, 2),
        (True, 1, 2),
        (True, 4, 5),
        (True, "x", 2),
        (True, True, 2),
    ],
)
def test_attempts(redelivered: bool, count: object, attempts: int) -> None:
    assert attempts_of(redelivered, count) == attempts


def test_backoff_doubles_up_to_its_limit_with_jitter() -> None:
    for attempt, most in [(1, 0.2), (2, 0.4), (3, 0.8), (10, 5.0), (10_000, 5.0)]:
        waits = {backoff_s(attempt, 0.2, 5.0) for _ in range(50)}
        assert len(waits) > 1
        assert most / 2 <= min(waits) <= max(waits) <= most


def test_pause_ends_when_it_is_stopped() -> None:
    slept: list[float] = []
    asked = iter([False, False, True])
    pause(1000.0, lambda: next(asked), slept.append)
    assert len(slept) == 2
    assert max(slept) <= 1.0  # the port promises to ask once a second
