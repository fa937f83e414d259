"""`make servers`: RabbitMQ, Redis and an S3 server with accounts for a server and some sites, until Ctrl-C.

Writes a settings file for each into --out, which FEDQUEUE_CONFIG names:

    FEDQUEUE_CONFIG=runs/servers/server.toml fedqueue demo --site-configs runs/servers
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from pathlib import Path

from broker.accounts import definitions
from broker.open import declare
from federation.settings import Settings
from storage.access import site_policy
from storage.open import create_bucket, open_store
from storage.s3 import S3Store
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Account, Rgw

COMPANIES = ("company-a", "company-b", "company-c")
SITES = ("north", "harbour", "market", "site-a", "site-b", "site-c", *COMPANIES)
BUCKET = "fedqueue"


def write_configs(
    folder: Path, rabbitmq: RabbitMQ, redis: RedisServer, s3: Rgw, sites: tuple[str, ...]
) -> None:
    """Make the accounts, and <folder>/server.toml and <folder>/<site>.toml with each one's own."""
    rabbitmq.reset()  # also turns its URLs to the virtual host that is used from here on
    folder.mkdir(parents=True, exist_ok=True)
    common = {"store_url": s3.url(BUCKET)}
    server = common | {
        "broker_url": rabbitmq.url,
        "live_url": redis.url,
        "store_access_key": s3.admin.access_key,
        "store_secret_key": s3.admin.secret_key,
    }
    _write(folder / "server.toml", server)
    rabbitmq.import_definitions(definitions({site: f"{site}-secret" for site in sites}))
    accounts = {site: s3.user(Account(site, f"{site}-key", f"{site}-secret")) for site in sites}
    for site, account in accounts.items():
        keys = {"store_access_key": account.access_key, "store_secret_key": account.secret_key}
        broker = {"broker_url": rabbitmq.url_of(site, f"{site}-secret")}
        _write(folder / f"{site}.toml", common | broker | keys)
    settings = Settings.model_validate(server)
    create_bucket(settings)
    declare(settings, sites)
    policy = site_policy(
        settings.store_url, {site: account.arn for site, account in accounts.items()}, s3.admin.arn
    )
    store = open_store(settings)
    assert isinstance(store, S3Store)
    store.set_policy(json.dumps(policy))


def _write(path: Path, values: dict[str, str]) -> None:
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)  # so that every server is stopped on the way out


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/servers"))
    parser.add_argument("--durable", action="store_true", help="keep S3 objects on disk, not in memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, RedisServer() as redis:
        store: dict[str, object] = {"store": "bluestore", "size": 8 << 30} if arguments.durable else {}
        rabbitmq = RabbitMQ(Path(home))
        rabbitmq.start()
        try:
            with Rgw(**store) as s3:  # type: ignore[arg-type]
                write_configs(arguments.out, rabbitmq, redis, s3, SITES)
                print(f"ready: FEDQUEUE_CONFIG={arguments.out}/server.toml; Ctrl-C ends it", flush=True)
                while True:
                    signal.pause()
        finally:
            rabbitmq.stop()


if __name__ == "__main__":
    main()
