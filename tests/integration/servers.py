"""A fedqueue server as real processes, embedded or over real servers, for tests to talk to as sites do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from broker.accounts import definitions
from broker.open import connect, declare
from broker.port import Broker
from federation.errors import NotFound
from federation.ids import new_update_id
from federation.jobs import JobSpec
from federation.keys import SITES_PREFIX
from federation.requests import Answer, Request, SubmitJob, What
from federation.settings import ENV_PREFIX, Settings, env_name
from federation.types import SERVER, ClientUpdate, Head
from federation.wire import encode_request, encode_update
from storage.blob import BlobStore
from storage.control import load_answer
from storage.log import VersionLog
from storage.models import describe_upload
from storage.open import create_bucket, open_store
from tests.factories import Arrays, payload_of, toy_arrays
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import RedisServer
from tests.servers.rgw import Rgw

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
SITES = ("site-a", "site-b", "site-c")
OVERSEE_EVERY_S = "1"


def until(what: str, condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for `condition` to become true; fail with `what` if it does not."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what}"
        time.sleep(0.05)


@dataclass
class Server:
    """A server: its settings as environment, each site's broker URL where it has its own, its processes."""

    environment: dict[str, str]
    site_urls: dict[str, str]
    folder: Path
    commands: dict[str, list[str]]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.site_settings("")

    def site_settings(self, site: str) -> Settings:
        """What `site` has in its environment; for "" the server's own."""
        values = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in self.environment.items()}
        if site:
            values["site"] = site
            # one folder for all tests of a server: it has the key by which the server knows the site
            values.setdefault("site_state", str(self.folder / "sites" / site))
        if site in self.site_urls:
            values["broker_url"] = self.site_urls[site]
        return Settings.model_validate(values)

    def as_site(self, site: str) -> Broker:
        """The broker with that site's account."""
        return connect(self.site_settings(site))

    @property
    def store(self) -> BlobStore:
        return open_store(self.settings)

    def start(self, name: str) -> None:
        """Start or restart one of `commands`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FEDQUEUE_")}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *self.commands[name]],
                cwd=ROOT,
                env={**inherited, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal the process and its children, and wait for the end."""
        process = self.processes.pop(name)
        os.killpg(process.pid, number)
        process.wait(30)

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes.values())

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')}" for p in self.folder.glob("*.log"))

    def create_job(self, spec: JobSpec, arrays: Arrays | None = None) -> None:
        """Submit it as an operator, and wait until it is there."""
        answer = self.answer(self.submit(spec, arrays))
        assert answer.ok, answer.errors

    def submit(self, spec: JobSpec, arrays: Arrays | None = None, site: str = "") -> Request:
        """As `fedqueue job submit` does it, with a toy model; "": an operator. Nothing is waited for."""
        data = payload_of(arrays or toy_arrays())
        ref = describe_upload(spec.id, site or SERVER, data)
        self.store.put_if_absent(ref.key, data)
        return self.ask(SubmitJob(document=json.loads(spec.to_json()), initial=ref, first=ref), site)

    def ask(self, what: What, site: str = "") -> Request:
        """Send a request of a site, or of an operator; nothing is waited for."""
        request = Request(request_id=new_update_id(), who=site or SERVER, what=what, at=datetime.now(UTC))
        self.send_request(request)
        return request

    def send_request(self, request: Request) -> None:
        if request.who == SERVER:
            self.send_as_operator(request)
            return
        broker = self.as_site(request.who)
        broker.publish("fed.updates", encode_request(request))
        broker.close()

    def send_as_operator(self, request: Request) -> None:
        """As a task, which only the server's account may send; so nobody checks whose name is in it."""
        from tasks.celery import HANDLE_REQUEST, ROUTING_KEYS, embedded_message

        arguments = {"request": request.to_json().decode()}
        if self.settings.embedded:
            broker = connect(self.settings)
            broker.publish("fed.tasks", embedded_message(HANDLE_REQUEST, arguments))
            broker.close()
        else:
            from celery import Celery

            key = ROUTING_KEYS[HANDLE_REQUEST]
            with Celery(broker=self.settings.broker_url.get_secret_value()) as sender:
                sender.send_task(HANDLE_REQUEST, kwargs=arguments, exchange="fed.tasks", routing_key=key)

    def answer(self, request: Request) -> Answer:
        """What the server says to it; waits for that."""
        found: list[Answer | None] = []

        def answered() -> bool:
            found.append(load_answer(self.store, request.who, request.request_id))
            return found[-1] is not None

        until(f"the answer to {request.what.kind} of {request.who}", answered)
        assert found[-1] is not None
        return found[-1]

    def head(self, job: str) -> Head | None:
        try:
            return VersionLog(self.store, job).head().head
        except NotFound:
            return None

    def send(self, update: ClientUpdate, payload: bytes | None) -> None:
        """Upload and publish as a site does; no upload for None."""
        if payload is not None:
            self.store.put_if_absent(update.payload_key, payload)
        broker = self.as_site(update.site)
        try:
            broker.publish("fed.updates", encode_update(update))
        finally:
            broker.close()

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill(name)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Started, and stopped at the end; the logs are shown if a test failed."""
    create_bucket(server.settings)
    declare(server.settings, SITES)
    store = server.store
    for key in list(store.list(SITES_PREFIX)):  # one bucket serves all modules, and each has new sites
        store.delete(key)
    for name in server.commands:
        server.start(name)
    try:
        yield server
    finally:
        print(server.logs())
        server.stop()


def embedded(folder: Path) -> Server:
    """One aggregator process, on a queue file and a folder."""
    environment = {
        env_name("broker_url"): f"sqlite:{folder / 'queue.db'}",
        env_name("store_url"): f"file:{folder / 'store'}",
        env_name("live_url"): f"file:{folder / 'live'}",
        env_name("oversee_every_s"): OVERSEE_EVERY_S,
    }
    commands = {"aggregator": ["cli.main", "worker", "--queue", "merge"]}
    return Server(environment, {}, folder, commands)


def real(folder: Path, rabbitmq: RabbitMQ, redis: RedisServer, s3: Rgw) -> Server:
    """Ingress and a Celery worker started by Celery's own command; every site with its own broker account."""
    rabbitmq.reset()
    rabbitmq.import_definitions(definitions({site: f"{site}-secret" for site in SITES}))
    environment = {
        env_name("broker_url"): rabbitmq.url,
        env_name("store_url"): s3.url("fedqueue"),
        env_name("store_access_key"): s3.admin.access_key,
        env_name("store_secret_key"): s3.admin.secret_key,
        env_name("live_url"): redis.url,
        env_name("oversee_every_s"): OVERSEE_EVERY_S,
    }
    site_urls = {site: rabbitmq.url_of(site, f"{site}-secret") for site in SITES}
    commands = {
        "ingress": ["cli.main", "ingress"],
        "worker": ["celery", "-A", "tasks", "worker", "--loglevel", "INFO"],
    }
    return Server(environment, site_urls, folder, commands)


def site_process(server: Server, folder: Path, job: str, seconds: float, **settings: str) -> Server:
    """The toy agent of site-a as a process of its own, `agent`, with its own account; its log goes to `folder`."""
    state = server.site_settings("site-a").site_state
    values = {"site": "site-a", "site_state": str(state), "poll_s": "0.1"}
    values |= {"backoff_limit_s": "0.5", **settings}
    environment = server.environment | {env_name(name): value for name, value in values.items()}
    if "site-a" in server.site_urls:
        environment[env_name("broker_url")] = server.site_urls["site-a"]
    commands = {"agent": ["tests.toy_site", job, str(seconds)]}
    return replace(server, environment=environment, folder=folder, commands=commands, processes={})


def end(site: Server) -> None:
    """Kill the agent of a `site_process`, if it runs."""
    if site.processes and site.alive():
        site.kill("agent")
