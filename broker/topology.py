"""Exchanges, queues and keys: the one place that names them. Both brokers build what is described here.

    exchange       kind    who publishes                             key
    fed.updates    topic   sites                                     updates, reports, requests, heartbeats: .<site>
    fed.control    topic   server                                    all.<what>, <site>.<what>
    fed.tasks      topic   server: ingress and tasks                 merge.<task>, evaluate.<task>
    fed.dead       topic   broker (dead letters), ingress            the key that the message had

    queue          kind    bound to                    when it is full      in the end
    fed.updates    quorum  fed.updates updates.*,      refuse the publish   dead letter
                                       reports.*, requests.*
    fed.heartbeats classic fed.updates heartbeats.*    drop the oldest      dropped after 30 s
    fed.merge      quorum  fed.tasks   merge.#         refuse the publish   dead letter; one reader at a time
    fed.evaluate   quorum  fed.tasks   evaluate.#      refuse the publish   dead letter
    fed.dead       quorum  fed.dead    #               grows                stays until it is read
    fed.ctl.<site> classic fed.control all.#, <site>.# drop the oldest      dropped after a day; the queue
                                                                            itself after 14 days unread

What is accepted must never vanish, so the queues of work are replicated (quorum) and refuse when they are
full; heartbeats and control messages are hints, so theirs drop. Why: docs/adr/0005-queues.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker

from federation.errors import AccessDenied, BadSettings, BrokerUnavailable, Fatal, FedqueueError
from federation.ids import is_name
from federation.types import SERVER

UPDATES_EXCHANGE = "fed.updates"
CONTROL_EXCHANGE = "fed.control"
TASKS_EXCHANGE = "fed.tasks"
DEAD_EXCHANGE = "fed.dead"
EXCHANGES = (UPDATES_EXCHANGE, CONTROL_EXCHANGE, TASKS_EXCHANGE, DEAD_EXCHANGE)
"""All are durable topic exchanges."""

UPDATES = "fed.updates"
HEARTBEATS = "fed.heartbeats"
MERGE = "fed.merge"
EVALUATE = "fed.evaluate"
DEAD = "fed.dead"

DELIVERY_LIMIT = 20
WORK_MAX_LENGTH = 100_000
WORK_MAX_BYTES = 1 << 30  # what a flood of large messages from one site may take of the broker's disk
HEARTBEAT_TTL_S = 30
HEARTBEAT_MAX_LENGTH = 1000
CONTROL_TTL_S = 86_400
CONTROL_MAX_LENGTH = 100
CONTROL_EXPIRES_S = 14 * 86_400
# Without a limit RabbitMQ 4 sets 20, and a dead letter returned more often would vanish: fed.dead has no
# dead-letter exchange. 3.x refuses -1, its later word for "none".
NO_DELIVERY_LIMIT = 1_000_000

DEATH_REASON = "x-first-death-reason"
DEATH_QUEUE = "x-first-death-queue"
"""Headers of a message that the broker itself dead-lettered, on both brokers. Reasons: "delivery_limit",
"rejected", "expired"."""

BROADCAST = "all"
"""First word of a control key that every site hears; therefore no name for a site."""


@dataclass(frozen=True, kw_only=True)
class QueueSpec:
    """A durable queue and its bindings. `arguments` says the same in RabbitMQ's words."""

    name: str
    exchange: str
    keys: tuple[str, ...]
    """Binding keys: words between dots; `*` is one word, `#` any number of words."""
    quorum: bool = False
    drop_head: bool = False
    """When it is full the oldest message goes; otherwise the publish is refused."""
    max_length: int | None = None
    """Messages. On a quorum queue a soft limit."""
    max_bytes: int | None = None
    """Sum of the bodies. Only RabbitMQ counts it."""
    ttl_s: int | None = None
    """Seconds after which a waiting message is dropped."""
    expires_s: int | None = None
    """Seconds after which an unread queue is dropped. Only RabbitMQ does."""
    delivery_limit: int | None = None
    """Returns and lost consumers that a message survives; it is delivered at most once more than that."""
    dead_letter: bool = False
    single_active: bool = False
    """At most one consumer has a message at any time (for efficiency; it is no fence)."""

    @property
    def routing_key(self) -> str:
        """The first binding key, which is the only one of a queue of tasks."""
        return self.keys[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of queue.declare, for pika, kombu and definitions alike."""
        table: dict[str, Any] = {"x-queue-type": "quorum" if self.quorum else "classic"}
        if self.max_length is not None:
            table["x-max-length"] = self.max_length
            table["x-overflow"] = "drop-head" if self.drop_head else "reject-publish"
        if self.max_bytes is not None:
            table["x-max-length-bytes"] = self.max_bytes
        if self.ttl_s is not None:
            table["x-message-ttl"] = self.ttl_s * 1000
        if self.expires_s is not None:
            table["x-expires"] = self.expires_s * 1000
        if self.delivery_limit is not None:
            table["x-delivery-limit"] = self.delivery_limit
        if self.dead_letter:
            table["x-dead-letter-exchange"] = DEAD_EXCHANGE
            # The default moves dead letters without confirm and may lose them. This one needs a quorum
            # queue that refuses when full.
            table["x-dead-letter-strategy"] = "at-least-once"
        if self.single_active:
            table["x-single-active-consumer"] = True
        return table


def _work_queue(
    name: str, exchange: str, keys: tuple[str, ...], limit: int, single_active: bool = False
) -> QueueSpec:
    return QueueSpec(
        name=name,
        exchange=exchange,
        keys=keys,
        quorum=True,
        max_length=WORK_MAX_LENGTH,
        max_bytes=WORK_MAX_BYTES,
        delivery_limit=limit,
        dead_letter=True,
        single_active=single_active,
    )


def queues(delivery_limit: int = DELIVERY_LIMIT) -> tuple[QueueSpec, ...]:
    """All queues but the sites' own. The dead-letter queue first: the others point to it."""
    return (
        QueueSpec(
            name=DEAD, exchange=DEAD_EXCHANGE, keys=("#",), quorum=True, delivery_limit=NO_DELIVERY_LIMIT
        ),
        _work_queue(UPDATES, UPDATES_EXCHANGE, ("updates.*", "reports.*", "requests.*"), delivery_limit),
        QueueSpec(
            name=HEARTBEATS,
            exchange=UPDATES_EXCHANGE,
            keys=("heartbeats.*",),
            drop_head=True,
            max_length=HEARTBEAT_MAX_LENGTH,
            ttl_s=HEARTBEAT_TTL_S,
        ),
        _work_queue(MERGE, TASKS_EXCHANGE, ("merge.#",), delivery_limit, single_active=True),
        _work_queue(EVALUATE, TASKS_EXCHANGE, ("evaluate.#",), delivery_limit),
    )


QUEUES = queues()
"""With the default delivery limit."""
TASK_QUEUES = tuple(spec for spec in QUEUES if spec.exchange == TASKS_EXCHANGE)
"""The queues that Celery workers read."""


def queue_arguments(name: str, delivery_limit: int = DELIVERY_LIMIT) -> dict[str, Any]:
    """The arguments that `name` is declared with. Raises KeyError for a queue that is not in `queues`."""
    return {spec.name: spec for spec in queues(delivery_limit)}[name].arguments


def control_queue(site: str) -> str:
    """The queue of hints for `site`. Raises BadSettings for a name that no site may have."""
    return f"fed.ctl.{site_name(site)}"


def site_queue(site: str) -> QueueSpec:
    """The control queue of a site. Raises BadSettings for a name that no site may have."""
    return QueueSpec(
        name=control_queue(site),
        exchange=CONTROL_EXCHANGE,
        keys=(f"{BROADCAST}.#", f"{site}.#"),
        drop_head=True,
        max_length=CONTROL_MAX_LENGTH,
        ttl_s=CONTROL_TTL_S,
        expires_s=CONTROL_EXPIRES_S,
    )


def site_name(site: str) -> str:
    """`site` itself. Raises BadSettings if it is not a name, or one that means everybody or the server."""
    if not is_name(site) or site in (BROADCAST, SERVER):
        raise BadSettings(
            f"{site!r} cannot name a site: use lower-case letters, digits and hyphens, and neither {BROADCAST!r} "
            f"nor {SERVER!r}"
        )
    return site


def matches(pattern: str, key: str) -> bool:
    """True if a topic exchange routes `key` to a queue bound with `pattern`.

    Words are separated by dots; `*` stands for exactly one word, `#` for zero or more.
    """
    words = key.split(".")
    # reachable[i]: the pattern so far can have consumed the first i words
    reachable = [True] + [False] * len(words)
    for part in pattern.split("."):
        if part == "#":
            first = reachable.index(True) if True in reachable else len(reachable)
            reachable = [i >= first for i in range(len(reachable))]
        else:
            reachable = [False] + [reachable[i] and part in ("*", word) for i, word in enumerate(words)]
    return reachable[-1]


def declare(channel: BlockingChannel, delivery_limit: int = DELIVERY_LIMIT) -> None:
    """Create every exchange, queue and binding that is missing. Doing it again changes nothing.

    Raises Fatal if one exists with other properties, AccessDenied if the account may not declare,
    BrokerUnavailable if the broker says anything else; the channel is closed then. A lost connection is
    pika's error.
    """
    for exchange in EXCHANGES:
        try:
            channel.exchange_declare(exchange, exchange_type="topic", durable=True)
        except ChannelClosedByBroker as exc:
            raise _declare_error(f"exchange {exchange}", f"delete exchange {exchange}", exc) from exc
    declare_queues(channel, queues(delivery_limit))


def declare_site(channel: BlockingChannel, site: str) -> None:
    """Create the control queue of an enrolled site. Raises like `declare`."""
    declare_queues(channel, [site_queue(site)])


def declare_queues(channel: BlockingChannel, specs: Iterable[QueueSpec]) -> None:
    """Create queues with their bindings. Raises like `declare`."""
    for spec in specs:
        try:
            channel.queue_declare(spec.name, durable=True, arguments=spec.arguments)
            for key in spec.keys:
                channel.queue_bind(spec.name, spec.exchange, key)
        except ChannelClosedByBroker as exc:
            advice = f"let it run empty, then `rabbitmqctl delete_queue {spec.name}`"
            raise _declare_error(f"queue {spec.name}", advice, exc) from exc


def _declare_error(what: str, advice: str, exc: ChannelClosedByBroker) -> FedqueueError:
    if exc.reply_code == 403:
        return AccessDenied(
            f"this account may not declare {what}: only the server's account does ({exc.reply_text})"
        )
    if exc.reply_code == 406:
        return Fatal(
            f"{what} exists with other properties than this version or setting wants ({exc.reply_text}): "
            f"stop everything that uses it, {advice}, and declare again"
        )
    return BrokerUnavailable(f"could not declare {what}: {exc.reply_text}")
