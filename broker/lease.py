"""The embedded queue's file: messages of all queues in one SQLite database, handed out under leases.

    queues     name, how it is bounded, how many messages it holds
    bindings   exchange, binding key, queue
    messages   seq (order of arrival), queue, the message, attempts, lease_until

A lease hides a message from others until `lease_until`. Each lease raises `attempts`, and (seq, attempts) is its
fencing token: whoever slept through the end of its lease holds an old token, and its acknowledgement changes
nothing. Write-ahead log and synchronous=FULL: what `publish` returned from survives kill -9 and power cuts.
Any number of processes of one machine may have the file open; a network file system will not do.

Times are wall-clock seconds, because processes share them. A clock that jumps ends leases early: a duplicate,
which is legal. One that steps back does not make the leases of dead processes longer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.database import Database
from broker.delivery import plain
from broker.topology import DEAD, DEATH_QUEUE, DEATH_REASON, QueueSpec, matches
from federation.errors import BadMessage, BrokerUnavailable
from federation.wire import Delivery, Message

LATEST_LEASES = 2
"""A lease ends at most so many lease times from now; twice, for a process that has another setting."""


@dataclass(frozen=True)
class Lease:
    """A delivery, and the token that alone can acknowledge it."""

    seq: int
    token: int
    delivery: Delivery


class LeaseQueue:
    """The queues in one file. Every method is one transaction. Errors and sharing: as Database says."""

    def __init__(self, path: Path, specs: Iterable[QueueSpec]) -> None:
        """Open, and create the file and those queues of `specs` that are missing."""
        self.path = path
        self._db = Database(path)
        try:
            with self._db.transaction():
                self._declare(specs, "DO NOTHING")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def declare(self, specs: Iterable[QueueSpec]) -> None:
        """Create queues and bindings, or give existing ones these properties. Messages stay."""
        with self._db.transaction():
            self._declare(
                specs,
                "DO UPDATE SET max_length = excluded.max_length, "
                "drop_head = excluded.drop_head, ttl_s = excluded.ttl_s, "
                "delivery_limit = excluded.delivery_limit, dead_letter = excluded.dead_letter, "
                "single_active = excluded.single_active",
            )

    def publish(self, exchange: str, message: Message) -> None:
        """Into every queue that is bound for the key, or none.

        A message that waits already, same id and same content, is not added again. Raises BadMessage
        ("unroutable"), BrokerUnavailable if a queue is full.
        """
        with self._db.transaction():
            rows = self._db.execute(
                "SELECT DISTINCT queue, key FROM bindings WHERE exchange = ?", (exchange,)
            )
            bound = sorted({queue for queue, key in rows if matches(key, message.routing_key)})
            if not bound:
                raise BadMessage(
                    f"publish to {exchange} with key {message.routing_key}: no queue is bound for that key; "
                    "is the site enrolled?",
                    "unroutable",
                )
            for queue in bound:
                self._enqueue(queue, message)

    def lease(self, queues: Sequence[str], seconds: float) -> Lease | None:
        """The oldest message of `queues` that nobody holds. Spent and expired ones on the way are removed."""
        with self._db.reading():
            # Without a write lock, so that idle consumers disturb nobody.
            if self._oldest(queues, seconds) is None:
                return None
        with self._db.transaction():
            while (found := self._oldest(queues, seconds)) is not None:
                seq, queue = found
                if not self._removed(seq, queue):
                    self._db.execute(
                        "UPDATE messages SET attempts = attempts + 1, lease_until = ? WHERE seq = ?",
                        (time.time() + seconds, seq),
                    )
                    delivery = self._delivery(seq)
                    return Lease(seq, delivery.attempts, delivery)
        return None

    def renew(self, lease: Lease, seconds: float) -> bool:
        """Keep it `seconds` from now. False: the lease ended and somebody else has had the message."""
        return self._held(
            "UPDATE messages SET lease_until = ? WHERE seq = ? AND attempts = ? AND lease_until IS NOT NULL",
            (time.time() + seconds, lease.seq, lease.token),
        )

    def acknowledge(self, lease: Lease) -> bool:
        """Remove the message. False as for `renew`, and then nothing is removed."""
        return self._held("DELETE FROM messages WHERE seq = ? AND attempts = ?", (lease.seq, lease.token))

    def give_back(self, lease: Lease) -> bool:
        """End the lease, to the message's old place; or to fed.dead after its last attempt. False as above."""
        with self._db.transaction():
            done = self._db.execute(
                "UPDATE messages SET lease_until = NULL WHERE seq = ? AND attempts = ?",
                (lease.seq, lease.token),
            ).rowcount
            if done:
                self._removed(lease.seq, lease.delivery.queue)
            return bool(done)

    def take(self, queue: str, limit: int) -> list[Delivery]:
        """Remove up to `limit` waiting messages and return them."""
        taken: list[Delivery] = []
        with self._db.transaction():
            while len(taken) < limit and (found := self._oldest([queue])) is not None:
                if not self._removed(*found):
                    self._db.execute("UPDATE messages SET attempts = attempts + 1 WHERE seq = ?", found[:1])
                    taken.append(self._delivery(found[0]))
                    self._db.execute("DELETE FROM messages WHERE seq = ?", found[:1])
        return taken

    def depth(self, queue: str) -> int:
        """Messages in `queue`, leased ones included; 0 if there is no such queue."""
        with self._db.reading():
            row = self._db.execute("SELECT length FROM queues WHERE name = ?", (queue,)).fetchone()
        return int(row[0]) if row else 0

    # --- inside a transaction --------------------------------------------------------------------------------

    def _oldest(self, queues: Sequence[str], lease_s: float = math.inf) -> tuple[int, str] | None:
        """(seq, queue) of the first message that may be leased now, by somebody who leases for `lease_s`."""
        now = time.time()
        # No lease of ours ends later than this, so one that does was given before the clock stepped back
        latest = now + LATEST_LEASES * lease_s
        found: tuple[int, str] | None = None
        for queue in queues:
            # one consumer at a time: while a message of the queue is held, the others wait
            row = self._db.execute(
                "SELECT seq FROM messages WHERE queue = ?1 "
                "AND (lease_until IS NULL OR lease_until <= ?2 OR lease_until > ?3) "
                "AND NOT EXISTS (SELECT 1 FROM queues JOIN messages held ON held.queue = queues.name "
                "WHERE queues.name = ?1 AND single_active AND held.lease_until > ?2 AND held.lease_until <= ?3) "
                "ORDER BY seq LIMIT 1",
                (queue, now, latest),
            ).fetchone()
            if row and (found is None or row[0] < found[0]):
                found = (int(row[0]), queue)
        return found

    def _removed(self, seq: int, queue: str) -> bool:
        """Dead-letter or drop the message if its attempts or its time are used up."""
        attempts, expires_at, limit, dead_letter = self._db.execute(
            "SELECT attempts, expires_at, delivery_limit, dead_letter FROM messages "
            "JOIN queues ON name = queue WHERE seq = ?",
            (seq,),
        ).fetchone()
        if limit is not None and attempts > limit:
            reason = "delivery_limit"
        elif expires_at is not None and expires_at <= time.time():
            reason = "expired"
        else:
            return False
        if dead_letter:
            self._db.execute(
                "INSERT INTO messages (queue, routing_key, body, type, content_type, message_id, user_id, headers) "
                "SELECT ?, routing_key, body, type, content_type, message_id, user_id, "
                "json_set(headers, ?, ?, ?, ?) FROM messages WHERE seq = ?",
                (DEAD, f'$."{DEATH_REASON}"', reason, f'$."{DEATH_QUEUE}"', queue, seq),
            )
        self._db.execute("DELETE FROM messages WHERE seq = ?", (seq,))
        return True

    def _enqueue(self, queue: str, message: Message) -> None:
        length, max_length, drop_head, ttl_s = self._db.execute(
            "SELECT length, max_length, drop_head, ttl_s FROM queues WHERE name = ?", (queue,)
        ).fetchone()
        headers = json.dumps(plain(dict(message.headers)))
        what = (
            queue,
            message.routing_key,
            message.body,
            message.type,
            message.content_type,
            message.message_id,
            message.user_id,
            headers,
        )
        if message.message_id is not None:
            waiting = self._db.execute(
                "SELECT 1 FROM messages WHERE queue = ? AND routing_key = ? AND body = ? AND type IS ? "
                "AND content_type IS ? AND message_id = ? AND user_id IS ? AND headers = ?",
                what,
            ).fetchone()
            if waiting:
                return
        if max_length is not None and length >= max_length:
            if not drop_head:
                raise BrokerUnavailable(f"{self.path}: {queue} is full; check that its consumers run")
            self._db.execute(
                "DELETE FROM messages WHERE seq IN (SELECT seq FROM messages WHERE queue = ? "
                "AND (lease_until IS NULL OR lease_until <= ?) ORDER BY seq LIMIT ?)",
                (queue, time.time(), length - max_length + 1),
            )
        lives_s = min((t for t in (ttl_s, message.ttl_s) if t is not None), default=None)
        self._db.execute(
            "INSERT INTO messages (queue, routing_key, body, type, content_type, message_id, user_id, headers, "
            "expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*what, None if lives_s is None else time.time() + lives_s),
        )

    def _delivery(self, seq: int) -> Delivery:
        queue, key, body, type_, content_type, message_id, user_id, headers, attempts = self._db.execute(
            "SELECT queue, routing_key, body, type, content_type, message_id, user_id, headers, attempts "
            "FROM messages WHERE seq = ?",
            (seq,),
        ).fetchone()
        return Delivery(
            queue=queue,
            routing_key=key,
            body=body,
            type=type_,
            content_type=content_type,
            message_id=message_id,
            user_id=user_id,
            headers=json.loads(headers),
            attempts=attempts,
        )

    def _declare(self, specs: Iterable[QueueSpec], if_there: str) -> None:
        for s in specs:
            self._db.execute(
                "INSERT INTO queues (name, max_length, drop_head, ttl_s, delivery_limit, dead_letter, "
                f"single_active) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) {if_there}",
                (
                    s.name,
                    s.max_length,
                    s.drop_head,
                    s.ttl_s,
                    s.delivery_limit,
                    s.dead_letter,
                    s.single_active,
                ),
            )
            for key in s.keys:
                self._db.execute(
                    "INSERT INTO bindings (exchange, key, queue) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                    (s.exchange, key, s.name),
                )

    def _held(self, statement: str, parameters: tuple[float | int, ...]) -> bool:
        with self._db.transaction():
            return self._db.execute(statement, parameters).rowcount == 1
