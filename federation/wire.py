"""The messages between sites and server: the only place that knows them. Written down in docs/protocol.md.

    update      site -> server   exchange fed.updates, key updates.<site>,    persistent, mandatory, confirmed
    report      site -> server   exchange fed.updates, key reports.<site>,    persistent, mandatory, confirmed
    request     site -> server   exchange fed.updates, key requests.<site>,   persistent, mandatory, confirmed
    heartbeat   site -> server   exchange fed.updates, key heartbeats.<site>, transient, short-lived
    control     server -> site   exchange fed.control, key all.<what> or <site>.<what>; only a hint

Bodies are UTF-8 JSON of at most MAX_BODY_BYTES, a report's and a request's of MAX_REPORT_BYTES. Nothing in a
body says who sent it that the broker has not checked: `user_id` must equal the site in the routing key, and the
site in the body must equal both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from federation.base import Value, describe
from federation.errors import BadMessage
from federation.ids import Name, UpdateId, is_name
from federation.jobs import MAX_VERSION
from federation.requests import Request
from federation.types import SERVER, ClientUpdate, Evaluation, SiteStatus

MAX_BODY_BYTES = 4096
MAX_REPORT_BYTES = 16 * 1024
"""Three measures of some two hundred classes; and what a dead letter keeps whole."""
JSON_TYPE = "application/json"
UPDATE_TYPE = "fedqueue.update.v1"
REPORT_TYPE = "fedqueue.report.v1"
REQUEST_TYPE = "fedqueue.request.v1"
HEARTBEAT_TYPE = "fedqueue.heartbeat.v1"
CONTROL_TYPE = "fedqueue.control.v1"


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is published: a body and the AMQP properties that mean something here."""

    routing_key: str
    body: bytes
    type: str
    content_type: str = JSON_TYPE
    message_id: str | None = None
    user_id: str | None = None
    persistent: bool = True
    ttl_s: float | None = None
    headers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What is received. Nothing in it is trusted but `queue` and `routing_key`, which the broker sets."""

    queue: str
    routing_key: str
    body: bytes
    type: str | None = None
    content_type: str | None = None
    message_id: str | None = None
    user_id: str | None = None
    headers: Mapping[str, object] = field(default_factory=dict)
    attempts: int = 1
    """How often it was delivered, this time included."""


class NewVersion(Value):
    kind: Literal["new-version"] = "new-version"
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)


class Outcome(Value):
    """What became of one update. The same is in the log, which counts."""

    kind: Literal["outcome"] = "outcome"
    job: Name
    update_id: UpdateId
    result: Literal["merged", "rejected"]
    version: int = Field(ge=0, le=MAX_VERSION)
    staleness: int | None = None
    weight: float | None = None
    reason: str = ""
    message: str = ""


class JobClosed(Value):
    kind: Literal["job-closed"] = "job-closed"
    job: Name
    reason: str


class JobAnnounced(Value):
    """There is a new job: look at `announced/`."""

    kind: Literal["job-announced"] = "job-announced"
    job: Name


class JobChanged(Value):
    """The job is held, resumed, rolled back, in quarantine or out of it: look at its log."""

    kind: Literal["job-changed"] = "job-changed"
    job: Name


class Invited(Value):
    """This site is asked to train: look at `jobs/<job>/invitations/<site>.json`."""

    kind: Literal["invited"] = "invited"
    job: Name


class ReleaseProposed(Value):
    """This site's work is in a version that is to be given away: look at `jobs/<job>/releases/`."""

    kind: Literal["release-proposed"] = "release-proposed"
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)


class Answered(Value):
    """A request of this site is answered: read `answers/<site>/<request_id>.json`."""

    kind: Literal["answered"] = "answered"
    request_id: UpdateId


Control = NewVersion | Outcome | JobClosed | JobAnnounced | JobChanged | Invited | ReleaseProposed | Answered
_CONTROL: TypeAdapter[Control] = TypeAdapter(Annotated[Control, Field(discriminator="kind")])


def encode_update(update: ClientUpdate) -> Message:
    """Raises BadMessage if the metrics make it larger than a message may be."""
    body = update.to_json()
    if len(body) > MAX_BODY_BYTES:
        raise BadMessage(
            f"the update message is {len(body)} bytes, at most {MAX_BODY_BYTES}: send fewer metrics"
        )
    return Message(
        routing_key=f"updates.{update.site}",
        body=body,
        type=UPDATE_TYPE,
        message_id=update.update_id,
        user_id=update.site,
    )


def decode_update(delivery: Delivery) -> ClientUpdate:
    """Check a delivery from the sites' queue. Raises BadMessage with the reason for the dead letter."""
    site = _authenticated_site(delivery, "updates", UPDATE_TYPE)
    update = ClientUpdate.from_json(delivery.body, BadMessage)
    if update.site != site:
        raise BadMessage(f"the body says site {update.site!r}, the routing key {site!r}", "wrong-site")
    return update


def encode_report(evaluation: Evaluation) -> Message:
    """What a site measured of a version. Raises BadMessage if that is larger than a message may be."""
    body = evaluation.to_json()
    if len(body) > MAX_REPORT_BYTES:
        raise BadMessage(
            f"the report is {len(body)} bytes, at most {MAX_REPORT_BYTES}: leave out per_class", "too-large"
        )
    return Message(
        routing_key=f"reports.{evaluation.who}", body=body, type=REPORT_TYPE, user_id=evaluation.who
    )


def decode_report(delivery: Delivery) -> Evaluation:
    """Raises BadMessage with the reason for the dead letter."""
    site = _authenticated_site(delivery, "reports", REPORT_TYPE, MAX_REPORT_BYTES)
    evaluation = Evaluation.from_json(delivery.body, BadMessage)
    if evaluation.who != site or site == SERVER:
        raise BadMessage(
            f"the body says that {evaluation.who!r} measured, the routing key {site!r}", "wrong-site"
        )
    return evaluation


def encode_request(request: Request) -> Message:
    """Of a site. Raises BadMessage if it is larger than a message may be."""
    body = request.to_json()
    if len(body) > MAX_REPORT_BYTES:
        raise BadMessage(
            f"the request is {len(body)} bytes, at most {MAX_REPORT_BYTES}: shorten the job description",
            "too-large",
        )
    return Message(
        routing_key=f"requests.{request.who}",
        body=body,
        type=REQUEST_TYPE,
        message_id=request.request_id,
        user_id=request.who,
    )


def decode_request(delivery: Delivery) -> Request:
    """Raises BadMessage with the reason for the dead letter."""
    site = _authenticated_site(delivery, "requests", REQUEST_TYPE, MAX_REPORT_BYTES)
    request = Request.from_json(delivery.body, BadMessage)
    if request.who != site or site == SERVER:
        raise BadMessage(f"the body says that {request.who!r} asks, the routing key {site!r}", "wrong-site")
    return request


def encode_heartbeat(status: SiteStatus, ttl_s: float) -> Message:
    return Message(
        routing_key=f"heartbeats.{status.site}",
        body=status.to_json(),
        type=HEARTBEAT_TYPE,
        user_id=status.site,
        persistent=False,
        ttl_s=ttl_s,
    )


def decode_heartbeat(delivery: Delivery) -> SiteStatus:
    """Raises BadMessage."""
    site = _authenticated_site(delivery, "heartbeats", HEARTBEAT_TYPE)
    status = SiteStatus.from_json(delivery.body, BadMessage)
    if status.site != site:
        raise BadMessage(f"the body says site {status.site!r}, the routing key {site!r}", "wrong-site")
    return status


def encode_control(control: Control, to: str = "all") -> Message:
    """`to` is a site, or "all"."""
    return Message(
        routing_key=f"{to}.{control.kind}", body=control.to_json(), type=CONTROL_TYPE, persistent=False
    )


def decode_control(delivery: Delivery) -> Control:
    """Raises BadMessage."""
    _check_envelope(delivery, CONTROL_TYPE)
    try:
        return _CONTROL.validate_json(delivery.body)
    except ValidationError as exc:
        raise BadMessage(f"control message: {describe(exc)}") from exc


def _authenticated_site(
    delivery: Delivery, prefix: str, expected_type: str, max_bytes: int = MAX_BODY_BYTES
) -> str:
    kind, _, site = delivery.routing_key.partition(".")
    if kind != prefix or not is_name(site):
        raise BadMessage(f"routing key {delivery.routing_key!r} is not {prefix}.<site>", "wrong-routing-key")
    if delivery.user_id != site:
        raise BadMessage(
            f"property user_id is {delivery.user_id!r}, must be {site!r} as in the routing key", "wrong-user"
        )
    _check_envelope(delivery, expected_type, max_bytes)
    return site


def _check_envelope(delivery: Delivery, expected_type: str, max_bytes: int = MAX_BODY_BYTES) -> None:
    if len(delivery.body) > max_bytes:
        raise BadMessage(f"body of {len(delivery.body)} bytes, at most {max_bytes}", "too-large")
    if delivery.content_type != JSON_TYPE:
        raise BadMessage(f"content type {delivery.content_type!r}, must be {JSON_TYPE}", "wrong-content-type")
    if delivery.type != expected_type:
        raise BadMessage(f"property type is {delivery.type!r}, must be {expected_type}", "wrong-type")
    # x-… headers are the broker's own (x-delivery-count, x-death)
    foreign = sorted(str(name) for name in delivery.headers if not str(name).startswith("x-"))
    if foreign:
        raise BadMessage(f"unexpected headers {', '.join(foreign)}: send none", "unexpected-header")
