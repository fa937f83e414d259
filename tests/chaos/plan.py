"""What is done to whom and when: a pure function of the seed.

Two streams. Strikes hit one process, one site's network, Redis or the order of messages, one every few seconds.
Outages take RabbitMQ or the store away; they are rare enough that the system works most of the time. Both deal
their kinds from shuffled decks, so that a short run meets every kind too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """A fault, in the words of the report."""

    KILL_WORKER = "kill -9 a merge worker"
    KILL_CHILD = "kill -9 a merge worker's child"
    PAUSE_WORKER = "stop a merge worker, let it go on"
    KILL_INGRESS = "kill -9 an ingress"
    KILL_SITE = "kill -9 a site"
    CUT_SITE = "cut a site off"
    REDIS_RESTART = "restart Redis, empty"
    REDIS_FLUSH = "flush Redis"
    REORDER = "return messages in another order"
    RABBITMQ_RESTART = "restart RabbitMQ"
    RABBITMQ_KILL = "kill -9 RabbitMQ"
    TWO_LEADERS = "kill -9 RabbitMQ while the leading worker is stopped, let that go on beside the next"
    S3_KILL = "kill -9 the S3 server"


STRIKES = (
    *(Kind.KILL_WORKER, Kind.KILL_WORKER, Kind.KILL_CHILD, Kind.KILL_CHILD, Kind.PAUSE_WORKER),
    *(Kind.KILL_INGRESS, Kind.KILL_INGRESS, Kind.KILL_SITE, Kind.KILL_SITE, Kind.KILL_SITE),
    *(Kind.CUT_SITE, Kind.CUT_SITE, Kind.CUT_SITE, Kind.REORDER, Kind.REORDER, Kind.REORDER),
    *(Kind.REDIS_RESTART, Kind.REDIS_FLUSH),
)
OUTAGES = (Kind.RABBITMQ_RESTART, Kind.RABBITMQ_KILL, Kind.TWO_LEADERS, Kind.S3_KILL)

STRIKE_EVERY_S = (2.0, 6.0)
OUTAGE_EVERY_S = (24.0, 34.0)
FIRST_S = (3.0, 13.0)

LEADER = "leader"
"""Target: the worker that is at work when the fault begins."""


@dataclass(frozen=True)
class Fault:
    """`at_s` after the begin of the run. `seconds`: how long it lasts, beyond the time that a start takes.
    `hang`: a cut-off site's connections hang instead of being refused."""

    at_s: float
    kind: Kind
    target: str = ""
    seconds: float = 0.0
    hang: bool = False


def plan(
    seed: int, seconds: float, workers: Sequence[str], ingresses: Sequence[str], sites: Sequence[str]
) -> list[Fault]:
    """All faults of a run of `seconds`, in order of time. A shorter run begins as a longer one does."""
    targets = {
        Kind.KILL_WORKER: (LEADER, *workers),
        Kind.KILL_CHILD: (LEADER, *workers),
        Kind.PAUSE_WORKER: (LEADER, *workers),
        Kind.KILL_INGRESS: ingresses,
        Kind.KILL_SITE: sites,
        Kind.CUT_SITE: sites,
    }
    lasting = {
        Kind.PAUSE_WORKER: (2.0, 8.0),
        Kind.CUT_SITE: (5.0, 20.0),
        Kind.REDIS_RESTART: (0.0, 5.0),
        Kind.RABBITMQ_RESTART: (0.0, 4.0),
        Kind.RABBITMQ_KILL: (0.0, 4.0),
        Kind.S3_KILL: (0.0, 6.0),
    }

    def faults(deck: Sequence[Kind], every_s: tuple[float, float]) -> Iterator[Fault]:
        rng = random.Random(f"{seed}/{every_s}")
        at_s = rng.uniform(*FIRST_S)
        kinds = _dealt(rng, deck)
        while at_s < seconds:
            kind = next(kinds)
            yield Fault(
                at_s=at_s,
                kind=kind,
                target=rng.choice(targets[kind]) if kind in targets else "",
                seconds=rng.uniform(*lasting[kind]) if kind in lasting else 0.0,
                hang=rng.random() < 0.5,
            )
            at_s += rng.uniform(*every_s)

    return sorted([*faults(STRIKES, STRIKE_EVERY_S), *faults(OUTAGES, OUTAGE_EVERY_S)], key=lambda f: f.at_s)


def _dealt(rng: random.Random, deck: Sequence[Kind]) -> Iterator[Kind]:
    while True:
        yield from rng.sample(deck, len(deck))
