"""The wire: what is sent can be read back, and what is not an honest message is refused with its reason."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import wire
from federation.errors import BadMessage
from federation.types import ClientUpdate, Evaluation, SiteStatus
from federation.wire import (
    MAX_BODY_BYTES,
    MAX_REPORT_BYTES,
    Delivery,
    JobClosed,
    Message,
    NewVersion,
    Outcome,
    decode_control,
    decode_heartbeat,
    decode_report,
    decode_update,
    encode_control,
    encode_heartbeat,
    encode_report,
    encode_update,
)
from tests.unit.federation_cases import client_updates, names, site_statuses, texts, update_ids, versions

ID = "0190b5a0-0000-7000-8000-000000000000"
UPDATE = ClientUpdate(
    update_id=ID,
    job="street",
    site="north",
    base_version=3,
    num_examples=120,
    payload_kind="weights",
    payload_key=f"jobs/street/updates/north/{ID}.safetensors",
    payload_sha256="ab" * 32,
    payload_bytes=860_000,
    metrics={"loss": 1.5},
    created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)
STATUS = SiteStatus(site="north", state="training", at=datetime(2026, 1, 2, tzinfo=UTC))
REPORT = Evaluation(
    job="street",
    version=8,
    who="north",
    num_images=40,
    metrics={"mAP@0.5": 0.5},
    per_class={"mAP@0.5": {"chair": 0.4, "cart": 0.6}},
    at=datetime(2026, 1, 2, tzinfo=UTC),
)
CONTROLS: list[NewVersion | Outcome | JobClosed] = [
    NewVersion(job="street", version=4),
    Outcome(job="street", update_id=ID, result="merged", version=4, staleness=1, weight=0.42),
    Outcome(job="street", update_id=ID, result="rejected", version=4, reason="not-finite", message="NaN"),
    JobClosed(job="street", reason="max_versions"),
]


def delivered(message: Message, **changes: Any) -> Delivery:
    """The message as an honest broker delivers it, with `changes`."""
    values: dict[str, Any] = {
        "queue": "fed.updates",
        "routing_key": message.routing_key,
        "body": message.body,
        "type": message.type,
        "content_type": message.content_type,
        "message_id": message.message_id,
        "user_id": message.user_id,
        "headers": dict(message.headers),
    }
    return Delivery(**(values | changes))


def refused(delivery: Delivery) -> BadMessage:
    with pytest.raises(BadMessage) as info:
        decode_update(delivery)
    return info.value


# --- round trips ---------------------------------------------------------------------------------------


@given(client_updates())
def test_updates_round_trip(update: ClientUpdate) -> None:
    message = encode_update(update)
    assert decode_update(delivered(message)) == update
    assert len(message.body) <= MAX_BODY_BYTES


def test_an_update_is_persistent_named_and_signed() -> None:
    message = encode_update(UPDATE)
    assert message.routing_key == "updates.north"
    assert message.user_id == "north"
    assert message.message_id == ID
    assert message.persistent
    assert message.ttl_s is None
    assert message.content_type == "application/json"
    assert message.type == "fedqueue.update.v1"
    assert not message.headers


def test_the_body_is_plain_json_of_the_protocol() -> None:
    """docs/protocol.md in one example: what a site in another language has to write."""
    assert json.loads(encode_update(UPDATE).body) == {
        "schema_version": 1,
        "update_id": ID,
        "job": "street",
        "site": "north",
        "base_version": 3,
        "num_examples": 120,
        "payload_kind": "weights",
        "payload_key": f"jobs/street/updates/north/{ID}.safetensors",
        "payload_sha256": "ab" * 32,
        "payload_bytes": 860_000,
        "metrics": {"loss": 1.5},
        "transfer": None,
        "created_at": "2026-01-02T03:04:05Z",
    }


@given(site_statuses)
def test_heartbeats_round_trip(status: SiteStatus) -> None:
    message = encode_heartbeat(status, ttl_s=15)
    assert decode_heartbeat(delivered(message)) == status
    assert message.routing_key == f"heartbeats.{status.site}"
    assert not message.persistent
    assert message.ttl_s == 15


@given(
    st.builds(NewVersion, job=names, version=versions)
    | st.builds(JobClosed, job=names, reason=texts)
    | st.builds(
        Outcome,
        job=names,
        update_id=update_ids,
        result=st.sampled_from(["merged", "rejected"]),
        version=versions,
        staleness=st.none() | st.integers(0, 10**6),
        weight=st.none() | st.floats(0, 1e6),
        reason=texts,
        message=texts,
    ),
    st.just("all") | names,
)
def test_control_messages_round_trip(control: NewVersion | Outcome | JobClosed, to: str) -> None:
    message = encode_control(control, to)
    assert decode_control(delivered(message, user_id=None)) == control
    assert message.routing_key == f"{to}.{control.kind}"
    assert not message.persistent


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        encode_update(UPDATE).body = b""  # type: ignore[misc]


# --- the envelope --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"routing_key": "updates.harbour"}, "wrong-user"),
        ({"routing_key": "heartbeats.north"}, "wrong-routing-key"),
        ({"routing_key": "updates"}, "wrong-routing-key"),
        ({"routing_key": "updates."}, "wrong-routing-key"),
        ({"routing_key": ""}, "wrong-routing-key"),
        ({"routing_key": "updates.north.x"}, "wrong-routing-key"),
        ({"routing_key": "updates.NORTH", "user_id": "NORTH"}, "wrong-routing-key"),
        ({"routing_key": "updates.../x", "user_id": "../x"}, "wrong-routing-key"),
        ({"routing_key": "updates.north\n", "user_id": "north\n"}, "wrong-routing-key"),
        ({"user_id": None}, "wrong-user"),
        ({"user_id": ""}, "wrong-user"),
        ({"user_id": "harbour"}, "wrong-user"),
        ({"user_id": "North"}, "wrong-user"),
        ({"content_type": None}, "wrong-content-type"),
        ({"content_type": "application/x-python-serialize"}, "wrong-content-type"),
        ({"content_type": "application/json; charset=utf-8"}, "wrong-content-type"),
        ({"type": None}, "wrong-type"),
        ({"type": "fedqueue.heartbeat.v1"}, "wrong-type"),
        ({"type": "fedqueue.update.v2"}, "wrong-type"),
        ({"headers": {"task": "fedqueue.publish_version"}}, "unexpected-header"),
        ({"headers": {"id": "1"}}, "unexpected-header"),
        ({"headers": {"CC": ["updates.harbour"]}}, "unexpected-header"),
        ({"headers": {"BCC": ["updates.harbour"]}}, "unexpected-header"),
        ({"headers": {"": "x"}}, "unexpected-header"),
        ({"headers": {"x-delivery-count": 1, "argsrepr": "()"}}, "unexpected-header"),
        ({"body": b" " * (MAX_BODY_BYTES + 1)}, "too-large"),
    ],
)
def test_a_dishonest_envelope_is_refused(changes: dict[str, Any], reason: str) -> None:
    error = refused(delivered(encode_update(UPDATE), **changes))
    assert error.reason == reason
    assert str(error)


def test_headers_of_the_broker_itself_pass() -> None:
    headers = {"x-delivery-count": 3, "x-death": [{"count": 1}], "x-first-death-reason": "rejected"}
    assert decode_update(delivered(encode_update(UPDATE), headers=headers)) == UPDATE


def test_a_body_of_exactly_the_limit_passes() -> None:
    body = encode_update(UPDATE).body
    padded = body + b" " * (MAX_BODY_BYTES - len(body))
    assert decode_update(delivered(encode_update(UPDATE), body=padded)) == UPDATE


def test_all_foreign_headers_are_named() -> None:
    error = refused(delivered(encode_update(UPDATE), headers={"task": "x", "id": "y"}))
    assert "id, task" in str(error)


def test_another_site_cannot_speak_in_the_body() -> None:
    """Envelope and user say harbour, honestly; the body says north."""
    error = refused(delivered(encode_update(UPDATE), routing_key="updates.harbour", user_id="harbour"))
    assert error.reason == "wrong-site"


# --- the body ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"42",
        b'"text"',
        b"{",
        b"{}",
        b"\xff\xfe{}",
        b'{"update_id": "\xed\xa0\x80"}',  # half of a surrogate pair
        b"\x80\x04\x95",  # how a pickle begins
        b'{"a": NaN}',
        b"[" * 4000,
        encode_update(UPDATE).body[:-1],
        encode_update(UPDATE).body + b"{}",
        encode_update(UPDATE).body.replace(b"north", b"nor\x00th"),
    ],
)
def test_what_is_not_such_json_is_malformed(body: bytes) -> None:
    error = refused(delivered(encode_update(UPDATE), body=body))
    assert error.reason == "malformed-message"
    assert str(error).startswith("ClientUpdate: ")


def changed(**changes: Any) -> Delivery:
    """UPDATE's message with other values in its body; `...` removes a field."""
    body = json.loads(encode_update(UPDATE).body) | changes
    text = json.dumps({name: value for name, value in body.items() if value is not ...})
    return delivered(encode_update(UPDATE), body=text.encode())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"priority": "high", "job": ...}, "priority"),
        ({"update_id": ...}, "update_id"),
        ({"update_id": "7"}, "update_id"),
        ({"update_id": "0190b5a0-0000-4000-8000-000000000000"}, "update_id"),
        ({"job": "../other"}, "job"),
        ({"site": "North"}, "site"),
        ({"base_version": -1}, "base_version"),
        ({"base_version": "3"}, "base_version"),
        ({"base_version": 3.0}, "base_version"),
        ({"base_version": True}, "base_version"),
        ({"base_version": None}, "base_version"),
        ({"base_version": 10**9 + 1}, "base_version"),
        ({"base_version": 10**30}, "base_version"),
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": 10**12 + 1}, "num_examples"),
        ({"payload_kind": "gradient"}, "payload_kind"),
        ({"payload_sha256": "AB" * 32}, "payload_sha256"),
        ({"payload_sha256": "ab"}, "payload_sha256"),
        ({"payload_bytes": 0}, "payload_bytes"),
        ({"payload_bytes": 2**41}, "payload_bytes"),
        ({"metrics": {"loss": "low"}}, "metrics"),
        ({"metrics": {"loss": None}}, "metrics"),
        ({"metrics": {"a\nb": 1.0}}, "metrics"),
        ({"metrics": {"": 1.0}}, "metrics"),
        ({"metrics": {"x" * 65: 1.0}}, "metrics"),
        ({"metrics": {f"m{n}": 1.0 for n in range(33)}}, "metrics"),
        ({"metrics": [["loss", 1.0]]}, "metrics"),
        ({"created_at": "2026-01-02T03:04:05"}, "created_at"),  # no time zone
        ({"created_at": "yesterday"}, "created_at"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], named: str) -> None:
    error = refused(changed(**changes))
    assert error.reason == "malformed-message"
    assert f"{named}" in str(error)


@pytest.mark.parametrize(
    "key",
    [
        "jobs/street/updates/harbour/{id}.safetensors",  # another site's
        "jobs/other/updates/north/{id}.safetensors",
        "jobs/street/models/{id}.safetensors",
        "jobs/street/updates/north/../../job.json",
        "/jobs/street/updates/north/{id}.safetensors",
        "jobs/street/updates/north//{id}.safetensors",
        "jobs/street/updates/north/{id}.safetensors\n",
        "jobs/street/updates/north/{id}.pkl",
        "",
    ],
)
def test_a_payload_key_that_leaves_its_prefix_is_refused(key: str) -> None:
    error = refused(changed(payload_key=key.format(id=ID)))
    assert error.reason == "malformed-message"
    assert f"payload_key must be jobs/street/updates/north/{ID}.safetensors" in str(error)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(token: str) -> None:
    body = encode_update(UPDATE).body.replace(b'"loss":1.5', f'"loss":{token}'.encode())
    assert token.encode() in body
    assert refused(delivered(encode_update(UPDATE), body=body)).reason == "malformed-message"


def test_an_error_does_not_repeat_what_was_sent() -> None:
    """Dead letters keep the message itself; the reason is read by people and in logs."""
    assert "<script>" not in str(refused(changed(job="<script>")))


@given(st.binary(max_size=300))
def test_no_body_raises_anything_else(body: bytes) -> None:
    for message, decode in (
        (encode_update(UPDATE), decode_update),
        (encode_heartbeat(STATUS, 1), decode_heartbeat),
        (encode_control(CONTROLS[0]), decode_control),
    ):
        with pytest.raises(BadMessage):
            decode(delivered(message, body=body))


@given(st.text(max_size=40), st.none() | st.text(max_size=20), st.none() | st.text(max_size=20))
def test_no_envelope_raises_anything_else(routing_key: str, user_id: str | None, kind: str | None) -> None:
    delivery = delivered(encode_update(UPDATE), routing_key=routing_key, user_id=user_id, type=kind)
    with pytest.raises(BadMessage):
        decode_update(delivery)


def test_an_update_with_too_many_metrics_is_not_sent() -> None:
    metrics = {f"{'m' * 60}{n:04d}": 0.1234567890123456 * 1e-300 for n in range(32)}
    long_names = UPDATE.model_copy(update={"job": "j" * 63, "site": "s" * 63})
    assert len(encode_update(UPDATE.model_copy(update={"metrics": metrics})).body) <= MAX_BODY_BYTES
    padded = long_names.model_copy(update={"metrics": metrics | {f"{n}" * 64: 1.0 for n in range(10)}})
    with pytest.raises(BadMessage, match="send fewer metrics"):
        encode_update(padded)


# --- heartbeats and control ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"routing_key": "updates.north"}, "wrong-routing-key"),
        ({"user_id": None}, "wrong-user"),
        ({"type": wire.UPDATE_TYPE}, "wrong-type"),
        ({"headers": {"task": "x"}}, "unexpected-header"),
        ({"body": b"{}"}, "malformed-message"),
        ({"routing_key": "heartbeats.harbour", "user_id": "harbour"}, "wrong-site"),
        ({"body": b" " * 4097}, "too-large"),
    ],
)
def test_a_dishonest_heartbeat_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadMessage) as info:
        decode_heartbeat(delivered(encode_heartbeat(STATUS, 15), **changes))
    assert info.value.reason == reason


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": wire.UPDATE_TYPE}, "wrong-type"),
        ({"content_type": "text/plain"}, "wrong-content-type"),
        ({"headers": {"task": "x"}}, "unexpected-header"),
        ({"body": b'{"kind": "shutdown"}'}, "malformed-message"),
        ({"body": b'{"job": "street", "version": 1}'}, "malformed-message"),
        ({"body": b" " * 4097}, "too-large"),
    ],
)
def test_a_wrong_control_message_is_refused(
    control: NewVersion | Outcome | JobClosed, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadMessage) as info:
        decode_control(delivered(encode_control(control), **changes))
    assert info.value.reason == reason


def test_kinds_of_messages_do_not_pass_for_each_other() -> None:
    update, heartbeat = encode_update(UPDATE), encode_heartbeat(STATUS, 1)
    assert len({update.type, heartbeat.type, encode_control(CONTROLS[0]).type}) == 3
    with pytest.raises(BadMessage):
        decode_heartbeat(delivered(update))
    with pytest.raises(BadMessage):
        decode_update(delivered(heartbeat))


# --- reports -------------------------------------------------------------------------------------------


def test_a_report_is_persistent_signed_and_read_back() -> None:
    message = encode_report(REPORT)
    assert (message.routing_key, message.user_id, message.persistent) == ("reports.north", "north", True)
    assert message.type == "fedqueue.report.v1"
    assert json.loads(message.body) == {
        "schema_version": 1,
        "job": "street",
        "version": 8,
        "who": "north",
        "num_images": 40,
        "metrics": {"mAP@0.5": 0.5},
        "per_class": {"mAP@0.5": {"chair": 0.4, "cart": 0.6}},
        "at": "2026-01-02T00:00:00Z",
    }
    assert decode_report(delivered(message)) == REPORT


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"routing_key": "reports.south"}, "wrong-user"),
        ({"user_id": "south"}, "wrong-user"),
        ({"user_id": None}, "wrong-user"),
        ({"routing_key": "reports.south", "user_id": "south"}, "wrong-site"),
        ({"routing_key": "updates.north"}, "wrong-routing-key"),
        ({"routing_key": "reports.north.x"}, "wrong-routing-key"),
        ({"type": "fedqueue.update.v1"}, "wrong-type"),
        ({"content_type": "text/plain"}, "wrong-content-type"),
        ({"headers": {"task": "x"}}, "unexpected-header"),
        ({"body": b" " * (MAX_REPORT_BYTES + 1)}, "too-large"),
        ({"body": b"{}"}, "malformed-message"),
        ({"body": encode_report(REPORT).body.replace(b"0.5", b"1.5")}, "malformed-message"),
        ({"body": encode_report(REPORT).body.replace(b"0.5", b"NaN")}, "malformed-message"),
        ({"body": encode_report(REPORT).body.replace(b'"at"', b'"x":1,"at"')}, "malformed-message"),
    ],
)
def test_a_dishonest_report_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadMessage) as info:
        decode_report(delivered(encode_report(REPORT), **changes))
    assert info.value.reason == reason


def test_nobody_reports_in_the_name_of_the_server() -> None:
    message = encode_report(REPORT.model_copy(update={"who": "server"}))
    with pytest.raises(BadMessage) as info:
        decode_report(delivered(message))
    assert info.value.reason == "wrong-site"


def test_a_report_may_be_larger_than_an_update_and_has_a_limit() -> None:
    table = {f"class-{i:03d}": 0.123456 for i in range(200)}
    per_class = {"mAP@0.5": table, "mAP@[.5:.95]": table, "VOC2010 mAP@0.5": table}
    large = REPORT.model_copy(update={"per_class": per_class})
    assert MAX_BODY_BYTES < len(encode_report(large).body) <= MAX_REPORT_BYTES
    too_many = {
        name: {f"{c}-{i}": v for c, v in t.items() for i in range(2)} for name, t in per_class.items()
    }
    with pytest.raises(BadMessage, match="leave out per_class"):
        encode_report(REPORT.model_copy(update={"per_class": too_many}))
