"""The harness itself, without servers: the seed makes the plan, the accounting finds mistakes, a cut line is cut."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest

from federation.jobs import ModelRef
from federation.types import Contribution, Head, ModelVersion, Refusal
from tests.chaos import accounting
from tests.chaos.accounting import DeadLetters, Ledger
from tests.chaos.killer import Done
from tests.chaos.network import Network
from tests.chaos.plan import OUTAGE_EVERY_S, OUTAGES, Fault, Kind, plan
from tests.chaos.report import recoveries
from tests.factories import client_update

CREW = (("worker-1", "worker-2"), ("ingress-1",), ("site-1", "site-2"))
CI_SECONDS = 120.0


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_its_seeds_and_a_short_run_meets_every_fault(seed: int) -> None:
    faults = plan(seed, CI_SECONDS, *CREW)
    assert faults == plan(seed, CI_SECONDS, *CREW)
    assert faults == [fault for fault in plan(seed, 600.0, *CREW) if fault.at_s < CI_SECONDS]
    assert faults != plan(seed + 1, CI_SECONDS, *CREW)
    assert {fault.kind for fault in faults} == set(Kind)
    outages = [fault.at_s for fault in faults if fault.kind in OUTAGES]
    assert all(later - earlier >= OUTAGE_EVERY_S[0] for earlier, later in pairwise(outages))


# --- accounting ----------------------------------------------------------------------------------------------------


def sound() -> Ledger:
    """Two updates merged, one refused, one a dead letter, each with its payload."""
    updates = [client_update(job="chaos") for _ in range(4)]
    merged = [
        Contribution(update=update, staleness=0, weight=0.5, version=version)
        for version, update in enumerate(updates[:2], 1)
    ]
    model = ModelRef(key="jobs/chaos/models/x", sha256="0" * 64, nbytes=1)
    return Ledger(
        head=Head(current=ModelVersion(version=2, model=model)),
        merged=merged,
        refused=[Refusal(update=updates[2], reason="too-stale", message="", version=2)],
        dead=DeadLetters({updates[3].update_id}, 0),
        uploads={update.update_id: update.payload_key for update in updates},
    )


def found(ledger: Ledger, confirmed: set[str] | None = None) -> str:
    return "\n".join(
        accounting.problems(ledger, set(ledger.uploads) if confirmed is None else confirmed, set())
    )


def test_a_sound_ledger_has_no_problem() -> None:
    assert found(sound()) == ""


def test_a_lost_update_is_found() -> None:
    ledger = sound()
    assert "neither in the log nor dead letters" in found(ledger, {*ledger.uploads, "lost"})


def test_an_update_that_counts_twice_is_found() -> None:
    ledger = sound()
    ledger.merged.append(ledger.merged[0].model_copy(update={"version": 3}))
    assert "1 updates are named by more than one record" in found(ledger)
    ledger = sound()
    ledger.refused.append(ledger.refused[0].model_copy(update={"update": ledger.merged[0].update}))
    assert "1 updates are named by more than one record" in found(ledger)


def test_uploads_of_nobody_and_merges_of_nothing_are_found() -> None:
    ledger = sound()
    merged = ledger.merged[0].update
    del ledger.uploads[merged.update_id]
    assert "1 merged updates have no payload" in found(ledger)
    ledger = sound()
    ledger.dead = DeadLetters(set(), 0)
    assert "1 uploads belong to no update" in found(ledger, set())


def test_a_version_that_no_update_made_is_found() -> None:
    ledger = sound()
    del ledger.merged[0]
    assert "do not count the versions up" in found(ledger)


def test_what_is_pending_at_the_end_is_found() -> None:
    ledger = sound()
    pending = ledger.head.model_copy(update={"pending": (ledger.merged[0],)})
    assert "1 updates are still pending" in found(replace(ledger, head=pending))


def test_recovery_is_the_next_sign_of_work() -> None:
    def done(kind: Kind, target: str = "", recovered_s: float | None = None) -> Done:
        return Done(Fault(0.0, kind, target), target, 5.0, 10.0, recovered_s)

    times = recoveries(
        [
            done(Kind.S3_KILL),
            done(Kind.KILL_SITE, "site-1"),
            done(Kind.KILL_SITE, "site-2"),
            done(Kind.REDIS_FLUSH, recovered_s=0.5),
        ],
        records=[9.0, 12.0, 13.0],
        confirms={"site-1": [8.0, 17.0], "site-2": [8.0]},
    )
    assert [one.seconds for one in times] == [2.0, 7.0, None, 0.5]


# --- network -------------------------------------------------------------------------------------------------------


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.request.sendall(data)


@contextmanager
def echo_server() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def said(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(1024)


def test_a_line_passes_on_and_hangs_and_refuses() -> None:
    with echo_server() as port, Network() as network:
        line = network.line(port)
        with socket.create_connection(("127.0.0.1", line.ports[0]), timeout=10) as connection:
            assert said(connection, b"before") == b"before"
            line.cut(hang=True)
            connection.sendall(b"during")
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1024)
            connection.settimeout(10)
            line.repair()
            assert connection.recv(1024) == b"during"
            line.cut(hang=False)
            assert gone(connection)
        with socket.create_connection(("127.0.0.1", line.ports[0]), timeout=10) as connection:
            assert gone(connection)
        line.repair()
        with socket.create_connection(("127.0.0.1", line.ports[0]), timeout=10) as connection:
            assert said(connection, b"after") == b"after"


def gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1024) == b""
    except ConnectionResetError:
        return True
