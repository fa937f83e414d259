"""Accounts of the broker: what each may do, and the definitions file that creates them.

A site can write updates, reports, requests and heartbeats under its own name and read its own control queue. It
can declare, bind and delete nothing, so its queue is the server's to create. The broker checks two regular
expressions per operation, one on the exchange or queue and, on a topic exchange, one on the routing key; where no
topic permission is stored for an exchange, every key is allowed, which is why the first one must name one exchange.

    rabbitmqctl import_definitions FILE        into a running broker; existing passwords are replaced
    load_definitions = FILE                    in rabbitmq.conf, at start
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from broker.topology import (
    DELIVERY_LIMIT,
    EXCHANGES,
    UPDATES_EXCHANGE,
    QueueSpec,
    control_queue,
    queues,
    site_name,
    site_queue,
)
from federation.errors import BadSettings

NOTHING = "^$"
EVERYTHING = ".*"
HASHING = "rabbit_password_hashing_sha256"
SITE_LIMITS = {"max-connections": 8, "max-channels": 16}
"""An agent and its heartbeat use two; one site must not exhaust the broker's sockets."""


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """Regular expressions over names. `topic_*` are over routing keys at `topic_exchange`."""

    configure: str
    write: str
    read: str
    topic_exchange: str | None = None
    topic_write: str = EVERYTHING
    topic_read: str = EVERYTHING


def site_permissions(site: str) -> Permissions:
    """What a site's account may do. Raises BadSettings for a name that no site may have."""
    return Permissions(
        configure=NOTHING,
        write=f"^{re.escape(UPDATES_EXCHANGE)}$",
        read=f"^{re.escape(control_queue(site))}$",
        topic_exchange=UPDATES_EXCHANGE,
        topic_write=rf"^(updates|reports|requests|heartbeats)\.{re.escape(site)}$",
        topic_read=NOTHING,
    )


def server_permissions() -> Permissions:
    """Everything in its virtual host, where Celery adds queues under names of its own."""
    return Permissions(configure=EVERYTHING, write=EVERYTHING, read=EVERYTHING)


def password_hash(password: str, salt: bytes | None = None) -> str:
    """Base64 of a 4-byte salt and the SHA-256 of salt and password, as RabbitMQ stores passwords.

    https://www.rabbitmq.com/docs/passwords#computing-password-hash
    """
    salt = os.urandom(4) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def definitions(
    sites: Mapping[str, str],
    servers: Mapping[str, str] | None = None,
    *,
    vhost: str = "/",
    delivery_limit: int = DELIVERY_LIMIT,
) -> dict[str, Any]:
    """A RabbitMQ definitions document: accounts with permissions, exchanges, queues and bindings.

    `sites` and `servers` map account names to passwords; only hashes go into the document. Importing adds
    and replaces, it never removes, so a document with one site enrols that site into a running broker.
    Raises BadSettings for a name that no site may have, or an empty password.
    """
    servers = servers or {}
    both = sorted(set(sites) & set(servers))
    if both:
        raise BadSettings(f"{', '.join(both)}: a site needs an account of its own, not the server's")
    granted = {name: server_permissions() for name in servers}
    granted |= {site_name(site): site_permissions(site) for site in sites}
    specs = (*queues(delivery_limit), *(site_queue(site) for site in sites))
    return {
        "vhosts": [{"name": vhost}],
        "users": [
            *(_user(name, password, {}) for name, password in servers.items()),
            *(_user(name, password, SITE_LIMITS) for name, password in sites.items()),
        ],
        "permissions": [
            {"user": name, "vhost": vhost, "configure": p.configure, "write": p.write, "read": p.read}
            for name, p in granted.items()
        ],
        "topic_permissions": [
            {
                "user": name,
                "vhost": vhost,
                "exchange": p.topic_exchange,
                "write": p.topic_write,
                "read": p.topic_read,
            }
            for name, p in granted.items()
            if p.topic_exchange is not None
        ],
        "exchanges": [
            {
                "name": name,
                "vhost": vhost,
                "type": "topic",
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for name in EXCHANGES
        ],
        "queues": [
            {
                "name": spec.name,
                "vhost": vhost,
                "durable": True,
                "auto_delete": False,
                "arguments": spec.arguments,
            }
            for spec in specs
        ],
        "bindings": _bindings(specs, vhost),
    }


def _user(name: str, password: str, limits: Mapping[str, int]) -> dict[str, Any]:
    if not password:
        raise BadSettings(f"account {name}: give it a password")
    return {
        "name": name,
        "password_hash": password_hash(password),
        "hashing_algorithm": HASHING,
        "tags": [],
        "limits": dict(limits),
    }


def _bindings(specs: Iterable[QueueSpec], vhost: str) -> list[dict[str, Any]]:
    return [
        {
            "source": spec.exchange,
            "vhost": vhost,
            "destination": spec.name,
            "destination_type": "queue",
            "routing_key": key,
            "arguments": {},
        }
        for spec in specs
        for key in spec.keys
    ]
