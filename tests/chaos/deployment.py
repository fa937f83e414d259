"""The system under test, as operators run it: real servers, 2 ingresses, 3 merge workers, 8 sites.

Every site has its own accounts at broker and store, and reaches both through a line of its own.
"""

from __future__ import annotations

import tomllib
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from broker import topology
from federation.jobs import AggregationPolicy, StopRule
from federation.settings import env_name
from storage.log import VersionLog
from tests.chaos.journal import Journal
from tests.chaos.network import Line, Network
from tests.chaos.processes import Command, Supervised, Supervisor
from tests.factories import Arrays, job_spec, toy_arrays
from tests.integration.servers import Server
from tests.servers.__main__ import write_configs
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw

JOB = "chaos"
INGRESSES = ("ingress-1", "ingress-2")
WORKERS = ("worker-1", "worker-2", "worker-3")
SITES = tuple(f"site-{number}" for number in range(1, 9))
STORE_BYTES = 8 << 30

# All that eight sites may have on their way is not too stale together: what is refused comes from a site that was away.
POLICY = AggregationPolicy(strategy="fedasync", alpha=0.6, max_staleness=150)
NEVER = StopRule(max_versions=10**9)
MAX_INFLIGHT = 16
SOFT_STOP = {"REMAP_SIGTERM": "SIGQUIT"}
"""As `fedqueue worker` sets it."""
SITE_SETTINGS = {"poll_s": 1.0, "heartbeat_s": 1.0, "heartbeat_ttl_s": 5.0, "backoff_limit_s": 5.0}


@dataclass(frozen=True)
class Site:
    """A site as the harness sees it."""

    process: Supervised
    line: Line
    folder: Path

    @property
    def journal(self) -> Journal:
        """Its confirmed updates."""
        return Journal(self.folder / "journal")

    @property
    def faults(self) -> Journal:
        return Journal(self.folder / "faults")

    def outbox(self) -> set[str]:
        """Ids that the broker has not confirmed, as far as the site knows."""
        return {path.stem for path in (self.folder / JOB / "out").glob("*.json")}

    def sent(self) -> set[str]:
        """Confirmed ids whose fate the site has not seen in the log."""
        return {path.stem for path in (self.folder / JOB / "sent").glob("*.json")}


@dataclass(frozen=True)
class Deployment:
    """Everything, running. `server` is the operator's access to job and store."""

    folder: Path
    rabbitmq: RabbitMQ
    redis: RedisServer
    s3: Rgw
    server: Server
    workers: dict[str, Supervised]
    ingresses: dict[str, Supervised]
    sites: dict[str, Site]
    supervisor: Supervisor
    idle: Path

    @property
    def processes(self) -> list[Supervised]:
        return [
            *self.workers.values(),
            *self.ingresses.values(),
            *(site.process for site in self.sites.values()),
        ]

    def leader(self) -> str:
        """The worker that wrote to its log last: those that stand by say nothing."""
        return max(self.workers, key=lambda name: _modified(self.workers[name].log))

    def newest_record(self) -> float:
        """Unix time of the log's newest record."""
        return VersionLog(self.server.store, JOB).head().at.timestamp()

    def waiting(self) -> dict[str, int]:
        """Messages in the queues of work, those in somebody's hands included."""
        messages = self._queues("messages")
        return {name: messages[name] for name in (topology.UPDATES, topology.MERGE, topology.DEAD)}

    def absent(self) -> dict[str, int]:
        """How many of the processes that should read a queue do not."""
        consumers = self._queues("consumers")
        readers = {topology.UPDATES: INGRESSES, topology.DEAD: INGRESSES, topology.MERGE: WORKERS}
        return {queue: len(names) - consumers[queue] for queue, names in readers.items()}

    def _queues(self, what: str) -> dict[str, int]:
        lines = self.rabbitmq.ctl("list_queues", "--quiet", "--no-table-headers", "name", what).splitlines()
        return {name: int(count) for name, count in (line.split() for line in lines)}


@contextmanager
def deployment(folder: Path, seed: int) -> Iterator[Deployment]:
    """Started, with the job created and the sites at work; everything is stopped at the end."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        s3 = stack.enter_context(Rgw(store="bluestore", size=STORE_BYTES))
        home = folder / "rabbitmq"
        home.mkdir()
        rabbitmq = RabbitMQ(home)
        stack.callback(rabbitmq.stop)
        rabbitmq.start()
        write_configs(folder / "accounts", rabbitmq, redis, s3, SITES)
        network = stack.enter_context(Network())
        supervisor = Supervisor()
        stack.callback(supervisor.stop)
        supervisor.start()

        def supervised(name: str, environment: dict[str, str], command: Command) -> Supervised:
            process = Supervised(name, command, environment, folder / f"{name}.log")
            supervisor.add(process)
            return process

        server_environment = _environment(folder, "server")
        workers = {name: supervised(name, server_environment | SOFT_STOP, _worker(name)) for name in WORKERS}
        ingresses = {
            name: supervised(name, server_environment, lambda _: ("cli.main", "ingress"))
            for name in INGRESSES
        }
        server = Server(server_environment, {}, folder, {})
        server.create_job(job_spec(JOB, aggregation=POLICY, stop=NEVER, max_inflight=MAX_INFLIGHT), _model())
        idle = folder / "idle"
        sites = {}
        for name in SITES:
            line = network.line(rabbitmq.port, s3.port)
            environment = _site_environment(folder, name, rabbitmq, s3, line)
            process = supervised(name, environment, _site(name, seed, idle))
            sites[name] = Site(process, line, folder / name)
        yield Deployment(folder, rabbitmq, redis, s3, server, workers, ingresses, sites, supervisor, idle)


def _worker(name: str) -> Command:
    """What `fedqueue worker` executes."""
    flags = (
        "-n",
        f"{name}@%h",
        "-Q",
        topology.MERGE,
        "--loglevel",
        "INFO",
        "--without-gossip",
        "--without-mingle",
    )
    return lambda _: ("celery", "-A", "tasks", "worker", *flags)


def _site(name: str, seed: int, idle: Path) -> Command:
    """Each start has a seed of its own, or a restarted site would meet the same faults again."""
    return lambda start: (
        "tests.chaos.site",
        JOB,
        str(zlib.crc32(f"{seed}/{name}/{start}".encode())),
        str(idle),
    )


def _environment(folder: Path, account: str) -> dict[str, str]:
    """The settings that `write_configs` made for an account, as environment."""
    values: dict[str, Any] = tomllib.loads((folder / "accounts" / f"{account}.toml").read_text())
    return {env_name(field): str(value) for field, value in values.items()}


def _site_environment(folder: Path, site: str, rabbitmq: RabbitMQ, s3: Rgw, line: Line) -> dict[str, str]:
    environment = _environment(folder, site)
    for field, server_port, port in (
        ("broker_url", rabbitmq.port, line.ports[0]),
        ("store_url", s3.port, line.ports[1]),
    ):
        name = env_name(field)
        environment[name] = environment[name].replace(f"127.0.0.1:{server_port}/", f"127.0.0.1:{port}/")
    own = SITE_SETTINGS | {"site": site, "site_state": folder / site}
    return environment | {env_name(field): str(value) for field, value in own.items()}


def _model() -> Arrays:
    """Version 0, 5 KB."""
    return toy_arrays(1.0) | {"conv.weight": np.ones((8, 16, 3, 3), np.float32)}


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
