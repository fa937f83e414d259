"""What sites measure: the agent between two updates, its message, ingress and task, and the object below metrics/."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker import topology
from broker.sqlite import SqliteBroker
from federation.errors import AccessDenied, BadDataset, BadMessage, BrokerUnavailable, StoreUnavailable
from federation.jobs import EvaluationPolicy, JobSpec, StopRule
from federation.keys import metrics_key
from federation.settings import Settings
from federation.types import SERVER, Evaluation, SiteStatus
from federation.wire import MAX_REPORT_BYTES, Delivery, Message, encode_report
from producers.agent import SiteAgent
from producers.evaluation import Evaluator
from storage.audit import audit
from storage.jobs import list_dead_letters, list_evaluations, save_evaluation
from storage.liveness import FolderLiveness
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.celery import ACCEPT, KEEP_DEAD_LETTER, PUBLISH, RECORD_REPORT, embedded_message
from tasks.context import Context
from tasks.deadletters import keep, requeue
from tasks.ingress import Ingress
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.report import record
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.toy_site import ToyTrainer

WHEN = datetime(2026, 5, 1, tzinfo=UTC)
SITES = ("site-a", "site-b")


class Server:
    """A job `toy`, a store, a queue, and a server that works when it is told to."""

    def __init__(self, folder: Path, spec: JobSpec | None = None, store: MemoryStore | None = None) -> None:
        self.folder = folder
        self.store = store or MemoryStore()
        self.broker = self.connect()
        self.broker.declare(SITES)
        self.context = Context(Settings(), self.store, self.broker, self.send)
        self.gate = Ingress(self.broker, FolderLiveness(folder / "live"), self.send)
        self.received: list[str] = []
        ref = save_model(self.store, "toy", from_arrays(toy_arrays()))
        extra = {"head.weight": toy_arrays()["norm.bias"]}
        initial = save_model(self.store, "toy", from_arrays(toy_arrays() | extra))
        self.job = create(self.context, spec or job_spec(), initial, ref)

    def connect(self) -> SqliteBroker:
        return SqliteBroker(str(self.folder / "queue.db"), lease_s=60, delivery_limit=20)

    def send(self, name: str, arguments: Mapping[str, str]) -> None:
        """Do the task at once."""
        self.received.append(name)
        if name == RECORD_REPORT:
            record(self.context, Evaluation.from_json(arguments["report"]))
        elif name == KEEP_DEAD_LETTER:
            keep(self.store, arguments["letter"])
        elif name == ACCEPT:
            accept(self.context, type(client_update()).from_json(arguments["update"]))
        elif name == PUBLISH:
            publish_pending(self.context, self.job)

    def work(self) -> None:
        """Handle everything that waits."""
        for queue in (topology.UPDATES, topology.DEAD):
            for delivery in self.broker.drain(queue):
                self.gate.handle(delivery)

    def publish(self, message: Message) -> None:
        self.broker.publish(topology.UPDATES_EXCHANGE, message)
        self.work()

    def versions(self, count: int) -> None:
        for _ in range(count):
            payload = payload_of(toy_arrays(1.0))
            update = client_update(payload, base_version=self.version)
            self.store.put(update.payload_key, payload)
            accept(self.context, update)
            publish_pending(self.context, self.job)

    @property
    def version(self) -> int:
        return self.context.log("toy").head().head.version

    def measured(self) -> list[tuple[int, str]]:
        return [(e.version, e.who) for e in list_evaluations(self.store, "toy")]

    def reasons(self) -> list[str]:
        return [letter.reason for letter in list_dead_letters(self.store)]

    def close(self) -> None:
        self.broker.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(**policy: Any) -> Server:
        store = policy.pop("store", None)
        policy.setdefault("sites_every", 1)
        stop = StopRule(max_versions=policy.pop("max_versions", 1000))
        changes = {"participants": p} if (p := policy.pop("participants", None)) else {}
        spec = job_spec(evaluation=EvaluationPolicy(**policy), stop=stop, **changes)
        made.append(Server(tmp_path, spec, store))
        return made[-1]

    yield start
    for server in made:
        server.close()


def report(version: int = 2, who: str = "site-a", value: float = 0.5, **changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "job": "toy",
        "version": version,
        "who": who,
        "num_images": 40,
        "metrics": {"mAP@0.5": value},
        "per_class": {"mAP@0.5": {"thing": value}},
        "at": WHEN,
    }
    return Evaluation(**(fields | changes))


# --- the server's side ---------------------------------------------------------------------------------


def test_a_report_becomes_an_object_of_the_site(serve: Callable[..., Server]) -> None:
    server = serve()
    server.versions(2)
    server.publish(encode_report(report()))
    assert list_evaluations(server.store, "toy") == [report()]
    assert list(server.store.list(metrics_key("toy", 2, "site-a")))
    assert [f for f in audit(server.store, "toy") if f.level == "error"] == []


def test_the_first_report_stays_and_a_duplicate_changes_nothing(serve: Callable[..., Server]) -> None:
    server = serve()
    server.versions(2)
    for value in (0.5, 0.5, 0.9):
        server.publish(encode_report(report(value=value)))
    assert list_evaluations(server.store, "toy") == [report(value=0.5)]
    assert server.reasons() == []


def test_no_site_writes_what_the_server_or_another_site_measured(serve: Callable[..., Server]) -> None:
    server = serve()
    server.versions(2)
    central = report(who=SERVER, value=0.1)
    save_evaluation(server.store, central)
    server.publish(encode_report(report(who="site-b", value=0.2)))
    before = list_evaluations(server.store, "toy")
    for forged in (SERVER, "site-b"):
        good = encode_report(report(value=0.9))
        server.publish(replace(good, body=report(who=forged, value=0.9).to_json()))
        server.publish(replace(good, routing_key=f"reports.{forged}"))
    server.publish(encode_report(report(who=SERVER, value=0.9)))
    assert list_evaluations(server.store, "toy") == before
    assert sorted(server.reasons()) == ["wrong-site"] * 3 + ["wrong-user"] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"job": "another"}, "unknown-job"),
        ({"version": 3}, "unknown-version"),
        ({"version": 10**9}, "unknown-version"),
        ({"who": "site-b"}, "not-a-participant"),
        ({"per_class": {"mAP@0.5": {"thing": 0.5, "thong": 0.1}}}, "unknown-class"),
    ],
)
def test_what_a_site_could_not_have_measured_is_a_dead_letter(
    serve: Callable[..., Server], changes: dict[str, Any], reason: str
) -> None:
    server = serve(participants=("site-a",))
    server.versions(2)
    for _ in range(2):  # delivered again: the same letter
        server.publish(encode_report(report(**changes)))
    assert server.measured() == []
    assert server.reasons() == [reason]


def test_a_site_reports_on_the_versions_that_are_due_alone(serve: Callable[..., Server]) -> None:
    """Retention keeps what was measured: a site that measured everything would fill the bucket with models."""
    server = serve(sites_every=2, max_versions=5)
    server.versions(4)
    for version in range(5):
        server.publish(encode_report(report(version=version)))
    assert server.measured() == [(2, "site-a"), (4, "site-a")]
    assert server.reasons() == ["not-due"] * 3
    server.versions(1)
    server.publish(encode_report(report(version=5)))
    assert server.measured()[-1] == (5, "site-a"), "the last one always"


def test_nobody_reports_where_the_job_does_not_ask(serve: Callable[..., Server]) -> None:
    server = serve(sites_every=0, max_versions=2)
    server.versions(2)
    for version in range(3):
        server.publish(encode_report(report(version=version)))
    assert (server.measured(), server.reasons()) == ([], ["not-due"] * 3)


def test_a_report_on_a_version_whose_model_is_gone_is_a_dead_letter(serve: Callable[..., Server]) -> None:
    """Retention keeps measured versions; one that it has collected cannot become the best."""
    server = serve()
    server.versions(2)
    server.store.delete(server.context.log("toy").version(1).model.key)
    server.publish(encode_report(report(version=1)))
    assert (server.measured(), server.reasons()) == ([], ["unknown-version"])


def test_a_dead_report_is_requeued_as_a_report(serve: Callable[..., Server]) -> None:
    server = serve()
    server.publish(encode_report(report()))
    assert server.reasons() == ["unknown-version"]
    server.versions(2)
    (letter,) = list_dead_letters(server.store)
    assert requeue(server.store, server.send, letter) == RECORD_REPORT
    assert server.measured() == [(2, "site-a")]
    assert server.reasons() == []


def test_a_report_waits_out_an_outage_of_the_store(serve: Callable[..., Server]) -> None:
    class Down(MemoryStore):
        down = False

        def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
            if self.down:
                raise StoreUnavailable("away")
            return super().put_if_absent(key, data)

    store = Down()
    server = serve(store=store)
    server.versions(2)
    store.down = True
    with pytest.raises(StoreUnavailable):  # the task then waits, and its message stays on the queue
        record(server.context, report())
    store.down = False
    record(server.context, report())
    assert server.measured() == [(2, "site-a")]


@pytest.mark.parametrize("letter", ['"', "\\", "ж", "類", "\N{GRINNING FACE}", "a"])
def test_the_largest_report_fits_into_a_task(letter: str) -> None:
    """JSON within JSON: the broker takes 64 KB."""
    name = iter(range(10**6))
    size, table = 0, {}
    while size < MAX_REPORT_BYTES - 700:
        key = f"{next(name)}{letter * 40}"
        table[key] = 0.5
        size += len(json.dumps(key, ensure_ascii=False).encode()) + 5
    body = encode_report(report(per_class={"mAP@0.5": table})).body
    assert len(body) > MAX_REPORT_BYTES * 0.9
    assert len(embedded_message(RECORD_REPORT, {"report": body.decode()}).body) < 60_000


# --- the site's side -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyMeasured:
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    num_images: int = 3


@dataclass
class MeasuringTrainer(ToyTrainer):
    """Measures the mean weight. `server` works after every training. `error` ends each evaluation."""

    server: Server | None = None
    num_validation_images: int = 3
    error: Exception | None = None
    evaluated: list[float] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def train(self, spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], **more: Any) -> Any:
        assert self.server is not None
        self.server.work()
        return super().train(spec, weights, **more)

    def evaluate(
        self, spec: JobSpec, weights: Mapping[str, NDArray[np.generic]], on_image: Callable[[int], None]
    ) -> ToyMeasured:
        for done in range(1, self.num_validation_images + 1):
            on_image(done)
        if self.error is not None:
            raise self.error
        mean = float(np.mean(weights["conv.weight"], dtype=np.float64))
        self.evaluated.append(mean)
        return ToyMeasured({"mean weight": mean}, {"mean weight": {"thing": mean}})


class ServerBroker(SqliteBroker):
    """A site's broker; the server works whenever the site looks for hints. `fault` meets each report."""

    server: Server
    fault: Exception | None = None
    refused: int = 0

    def publish(self, exchange: str, message: Message) -> None:
        if message.routing_key.startswith("reports.") and self.fault is not None:
            self.refused += 1
            raise self.fault
        super().publish(exchange, message)

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        self.server.work()
        return super().drain(queue, limit)


def run_site(
    server: Server,
    trainer: MeasuringTrainer,
    store: MemoryStore | None = None,
    fault: Exception | None = None,
) -> ServerBroker:
    """Until the job is closed, or the trainer ends it. Returns the site's broker."""
    trainer.server = server
    broker = ServerBroker(str(server.folder / "queue.db"), lease_s=60, delivery_limit=20)
    broker.server, broker.fault = server, fault
    settings = Settings(site="site-a", site_state=server.folder / "site", poll_s=0.01, backoff_limit_s=0.01)
    brokers = iter([broker])  # the heartbeat has one of its own
    agent = SiteAgent(
        settings,
        ["toy"],
        store or server.store,
        lambda: next(brokers, server.connect()),
        lambda spec: trainer,
        trainer.stop,
    )
    agent.run()
    server.work()
    return broker


def test_the_toy_is_an_evaluator_and_a_plain_trainer_is_none() -> None:
    assert isinstance(MeasuringTrainer(), Evaluator)
    assert not isinstance(ToyTrainer(), Evaluator)


def test_a_site_measures_what_is_due_and_the_last_version(serve: Callable[..., Server]) -> None:
    server = serve(sites_every=2, max_versions=5, metric="mean weight")
    trainer = MeasuringTrainer()
    run_site(server, trainer)
    found = list_evaluations(server.store, "toy")
    assert [(e.version, e.who, e.num_images) for e in found] == [(v, "site-a", 3) for v in (2, 4, 5)]
    # alpha is a half and the site adds one: each version is half a step above the one before
    assert [e.metrics["mean weight"] for e in found] == [1.0, 2.0, 2.5]
    assert found[0].per_class == {"mean weight": {"thing": 1.0}}
    assert server.reasons() == []


@pytest.mark.parametrize(("every", "images"), [(0, 3), (2, 0)])
def test_nothing_is_measured_where_it_is_not_asked_for_or_there_are_no_images(
    serve: Callable[..., Server], every: int, images: int
) -> None:
    server = serve(sites_every=every, max_versions=3)
    trainer = MeasuringTrainer(num_validation_images=images)
    run_site(server, trainer)
    assert (server.version, trainer.evaluated, server.measured()) == (3, [], [])


def test_a_site_that_starts_again_does_not_measure_again(serve: Callable[..., Server]) -> None:
    server = serve(sites_every=2, max_versions=3)
    run_site(server, MeasuringTrainer())
    again = MeasuringTrainer()
    run_site(server, again)
    assert again.evaluated == []
    assert server.measured() == [(2, "site-a"), (3, "site-a")]


def test_a_site_that_comes_when_all_is_over_measures_the_last_version(serve: Callable[..., Server]) -> None:
    server = serve(sites_every=2, max_versions=3)
    server.versions(3)
    trainer = MeasuringTrainer()
    run_site(server, trainer)
    assert (trainer.bases, server.measured()) == ([], [(3, "site-a")])


def test_a_job_that_closes_while_a_site_measures_has_its_last_version_measured(
    serve: Callable[..., Server],
) -> None:
    class Slow(MeasuringTrainer):
        def evaluate(self, spec: JobSpec, weights: Any, on_image: Callable[[int], None]) -> ToyMeasured:
            if not self.evaluated:
                server.versions(2)  # by other sites
            return super().evaluate(spec, weights, on_image)

    server = serve(sites_every=1, max_versions=3)
    server.versions(1)
    run_site(server, Slow())
    assert server.measured() == [(2, "site-a"), (3, "site-a")]


class SiteStore(MemoryStore):
    """What a site's account gets: nothing is missing, it may not be read. Shares the server's objects."""

    def __init__(self, server: Server) -> None:
        self.__dict__ = server.store.__dict__

    def get(self, key: str, *, max_bytes: int) -> bytes:
        if not list(self.list(key)):
            raise AccessDenied(f"{key}: 403")
        return super().get(key, max_bytes=max_bytes)


def test_a_site_that_is_not_told_what_is_missing_measures_all_the_same(serve: Callable[..., Server]) -> None:
    server = serve(sites_every=1, max_versions=2)
    run_site(server, MeasuringTrainer(), SiteStore(server))
    assert server.measured() == [(1, "site-a"), (2, "site-a")]


@pytest.mark.parametrize(
    "error", [BadDataset("an image is gone"), RuntimeError("out of memory"), MemoryError(), ValueError("nan")]
)
def test_an_evaluation_that_fails_stops_nothing(serve: Callable[..., Server], error: Exception) -> None:
    server = serve(sites_every=1, max_versions=3)
    run_site(server, MeasuringTrainer(error=error))
    assert (server.version, server.measured()) == (3, [])


def test_a_report_waits_for_the_broker_and_training_does_not(serve: Callable[..., Server]) -> None:
    server = serve(sites_every=1, max_versions=3)
    broker = run_site(server, MeasuringTrainer(), fault=BrokerUnavailable("away"))
    assert (server.version, server.measured()) == (3, [])
    assert broker.refused >= 3

    server.store.delete(metrics_key("toy", 3, "site-a"))
    run_site(server, MeasuringTrainer())  # what was lost with the process is measured by the next one
    assert server.measured() == [(3, "site-a")]


@pytest.mark.parametrize("fault", [BadMessage("nowhere", "unroutable"), AccessDenied("no")])
def test_a_server_that_takes_no_reports_is_not_asked_again(
    serve: Callable[..., Server], fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(sites_every=1, max_versions=4)
    trainer = MeasuringTrainer()
    broker = run_site(server, trainer, fault=fault)
    assert (server.version, broker.refused, len(trainer.evaluated)) == (4, 1, 1)
    assert "fedqueue server init" in caplog.text


def test_a_site_can_be_stopped_while_it_measures(serve: Callable[..., Server]) -> None:
    class Stopping(MeasuringTrainer):
        def evaluate(self, spec: JobSpec, weights: Any, on_image: Callable[[int], None]) -> ToyMeasured:
            self.stop.set()
            return super().evaluate(spec, weights, on_image)

    server = serve(sites_every=1, max_versions=3)
    trainer = Stopping()
    run_site(server, trainer)
    assert (trainer.evaluated, server.measured()) == ([], [])


def test_the_status_says_that_a_site_evaluates() -> None:
    status = SiteStatus(site="site-a", state="evaluating", step=3, steps=9, at=WHEN)
    assert SiteStatus.from_json(status.to_json()) == status
