"""The SQLite file under the embedded queue: its schema, its settings, its transactions and its errors."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from federation.errors import AccessDenied, BrokerUnavailable, Fatal

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 20.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS queues (
    name TEXT PRIMARY KEY, length INTEGER NOT NULL DEFAULT 0, max_length INTEGER, drop_head INTEGER NOT NULL,
    ttl_s REAL, delivery_limit INTEGER, dead_letter INTEGER NOT NULL, single_active INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS bindings (
    exchange TEXT NOT NULL, key TEXT NOT NULL, queue TEXT NOT NULL REFERENCES queues (name),
    PRIMARY KEY (exchange, key, queue)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL REFERENCES queues (name),
    routing_key TEXT NOT NULL, body BLOB NOT NULL, type TEXT, content_type TEXT, message_id TEXT, user_id TEXT,
    headers TEXT NOT NULL, expires_at REAL, attempts INTEGER NOT NULL DEFAULT 0, lease_until REAL);
CREATE INDEX IF NOT EXISTS messages_in_order ON messages (queue, seq);
CREATE INDEX IF NOT EXISTS messages_held ON messages (queue, lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_by_id ON messages (queue, message_id) WHERE message_id IS NOT NULL;
-- counting a long queue at every publish would cost more than the publish
CREATE TRIGGER IF NOT EXISTS message_came AFTER INSERT ON messages
    BEGIN UPDATE queues SET length = length + 1 WHERE name = NEW.queue; END;
CREATE TRIGGER IF NOT EXISTS message_went AFTER DELETE ON messages
    BEGIN UPDATE queues SET length = length - 1 WHERE name = OLD.queue; END;
"""


class Database:
    """One connection. Threads take turns in it; a forked process needs its own.

    Everything raises BrokerUnavailable (busy for BUSY_TIMEOUT_S, disk full), AccessDenied (not writable) or
    Fatal (not such a file, or damaged).
    """

    def __init__(self, path: Path) -> None:
        """Open, and create the file and its tables where they are missing."""
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise AccessDenied(f"{path.parent}: the folder of the queue cannot be made: {exc}") from exc
        with self._errors():
            self._db = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def execute(self, statement: str, parameters: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Inside `transaction` or `reading` only."""
        return self._db.execute(statement, parameters)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Without a write lock: idle consumers disturb nobody."""
        with self._errors(), self._lock:
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything in the block or nothing; on disk when it ends."""
        with self._errors(), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _prepare(self) -> None:
        self._enter_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise Fatal(
                f"{self.path} is a queue of schema {version}, this program knows {SCHEMA_VERSION}: "
                "let the program that made it work it off, then delete the file"
            )
        with self.transaction():
            for statement in _statements(_SCHEMA):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _enter_wal(self) -> None:
        """SQLite does not wait here for others that are opening the same new file, so this does."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            # extended codes carry the primary one in their low byte
            code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in (
                sqlite3.SQLITE_BUSY,
                sqlite3.SQLITE_LOCKED,
                sqlite3.SQLITE_FULL,
                sqlite3.SQLITE_IOERR,
            ):
                raise BrokerUnavailable(
                    f"{self.path}: {exc}; check the disk and who else has it open"
                ) from exc
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
                raise AccessDenied(f"{self.path}: {exc}; this process must be able to write there") from exc
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise Fatal(
                    f"{self.path}: {exc}; it is damaged or no queue: move it away and start again, "
                    "the sites send again what the log does not name"
                ) from exc
            raise


def _statements(script: str) -> Iterator[str]:
    """Split at complete statements: executescript would commit the transaction around it."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
