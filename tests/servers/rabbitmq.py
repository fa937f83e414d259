"""A private RabbitMQ node: its own name, ports, data and cookie, so that it meets no other on the machine.

`rabbitmq_server` starts one per session. It can be stopped, killed and started again on the same data.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pika
import pytest

from broker import topology
from tests.servers import free_port, missing

ADMIN = "admin"
START_LIMIT_S = 90.0
MAX_MESSAGE_BYTES = 65_536


class RabbitMQ:
    """One node. `url` is the administrator's; `url_of` is another account's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.dist_port = free_port()
        self.node = f"fedqueue-{os.getpid()}-{secrets.token_hex(4)}@localhost"
        self._password = secrets.token_hex(16)
        self.vhost = "/"
        self._vhosts = {"/"}
        self._process: subprocess.Popen[bytes] | None = None
        self._write_configuration()

    @property
    def url(self) -> str:
        return self.url_of(ADMIN, self._password)

    def url_of(self, user: str, password: str) -> str:
        """In the virtual host that `reset` chose last."""
        return f"amqp://{user}:{password}@127.0.0.1:{self.port}/{quote(self.vhost, safe='')}"

    def start(self) -> None:
        """Start, on the data that is there, and return when clients can connect."""
        log = (self.home / "output.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [str(_script("rabbitmq-server"))],
                env=self._environment(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self.connect().close()
                return
            except (pika.exceptions.AMQPError, OSError) as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    output = (self.home / "output.log").read_text(errors="replace")[-3000:]
                    self.kill()
                    raise RuntimeError(f"RabbitMQ did not start:\n{output}") from exc
            time.sleep(0.2)

    def stop(self) -> None:
        """A clean stop: the node says goodbye to its clients."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def signal(self, sig: signal.Signals) -> None:
        """SIGSTOP and SIGCONT, to the whole node."""
        assert self._process is not None
        os.killpg(self._process.pid, sig)

    def connect(self) -> pika.BlockingConnection:
        """As the administrator, with plain pika."""
        parameters = pika.URLParameters(self.url)
        parameters.socket_timeout = 5
        return pika.BlockingConnection(parameters)

    def reset(
        self, delivery_limit: int = topology.DELIVERY_LIMIT, sites: Sequence[str] = (), vhost: str = ""
    ) -> None:
        """Turn to a virtual host where our exchanges and queues, and those of `sites`, are declared and empty.

        The queues are purged, never deleted: RabbitMQ 3.10 now and then cannot start a quorum queue that was
        deleted and declared again. Another delivery limit therefore means another virtual host.
        """
        self.vhost = vhost or (
            "/" if delivery_limit == topology.DELIVERY_LIMIT else f"limit-{delivery_limit}"
        )
        if self.vhost not in self._vhosts:
            self.ctl("add_vhost", self.vhost)
            self.ctl("set_permissions", "--vhost", self.vhost, ADMIN, ".*", ".*", ".*")
            self._vhosts.add(self.vhost)
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with self.connect() as connection:
                    _make_empty(connection.channel(), delivery_limit, sites)
                return
            except pika.exceptions.AMQPError:  # quorum queues elect their leaders after the node has started
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def depth(self, queue: str) -> int:
        """Messages that wait in `queue` and are with no consumer."""
        connection = self.connect()
        try:
            return int(connection.channel().queue_declare(queue, passive=True).method.message_count)
        finally:
            connection.close()

    def import_definitions(self, document: dict[str, Any]) -> None:
        """Create what `document` describes (broker.accounts.definitions), in the present virtual host."""
        document = document | {
            part: [entry | {"vhost": self.vhost} if "vhost" in entry else entry for entry in entries]
            for part, entries in document.items()
            if part != "vhosts"
        }
        document["vhosts"] = [{"name": self.vhost}]
        path = self.home / "definitions.json"
        path.write_text(json.dumps(document))
        self.ctl("import_definitions", str(path))

    def ctl(self, *arguments: str) -> str:
        """rabbitmqctl; a second or two. Raises RuntimeError with its output if it fails."""
        result = subprocess.run(
            [str(_script("rabbitmqctl")), "--node", self.node, *arguments],
            env=self._environment(),
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if result.returncode:
            raise RuntimeError(f"rabbitmqctl {arguments[0]}: {result.stdout}{result.stderr}")
        return result.stdout

    def _end(self, sig: signal.Signals) -> None:
        if self._process is None:
            return
        # the start script and the Erlang machine are one process group
        try:
            os.killpg(self._process.pid, sig)
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        except ProcessLookupError:
            self._process.wait()
        self._process = None

    def _write_configuration(self) -> None:
        (self.home / "enabled_plugins").write_text("[].\n")
        (self.home / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"default_user = {ADMIN}\n"
            f"default_pass = {self._password}\n"
            f"max_message_size = {MAX_MESSAGE_BYTES}\n"
            "disk_free_limit.absolute = 50MB\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
        )
        cookie = self.home / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.home / "log"),
            "RABBITMQ_PID_FILE": str(self.home / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self.home / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.home / "none.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.home / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }


def _make_empty(channel: Any, delivery_limit: int, sites: Sequence[str]) -> None:
    for site in sites:
        channel.queue_delete(topology.control_queue(site))
    topology.declare(channel, delivery_limit)
    for site in sites:
        topology.declare_site(channel, site)
    for spec in topology.queues():
        # what a consumer held returns when the broker notices that it is gone
        while channel.queue_declare(spec.name, passive=True).method.consumer_count:
            time.sleep(0.05)
        channel.queue_purge(spec.name)


def _script(name: str) -> Path:
    """Debian's wrappers on PATH refuse ordinary users and change to another account: avoid them."""
    for folder in (Path("/usr/lib/rabbitmq/bin"), Path("/opt/rabbitmq/sbin")):
        if (folder / name).exists():
            return folder / name
    found = shutil.which(name)
    if found is None:
        missing("RabbitMQ", "apt-get install rabbitmq-server")
    return Path(found)


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A running node for the session. Begin a test with `reset`; leave the node running."""
    _script("rabbitmq-server")
    server = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.stop()
