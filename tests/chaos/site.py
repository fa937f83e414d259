"""A light site as a process: python -m tests.chaos.site JOB SEED IDLE-FILE

The real agent, with a trainer that only adds noise. The broker beneath it tells the journal of every confirmed
update. When IDLE-FILE is there it trains no more, and goes on delivering and reading the log.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.faulty import FaultyBroker
from broker.open import connect
from broker.port import Broker, Handler
from cli.options import log_to_stderr, stop_on_signals
from federation.errors import BadDataset
from federation.faults import QUEUES, READS, WRITES, Fault, FaultPlan, Seeded
from federation.jobs import JobSpec
from federation.settings import Settings
from federation.wire import UPDATE_TYPE, Delivery, Message
from producers.agent import SiteAgent
from producers.trainer import Progress
from storage.faulty import FaultyStore
from storage.open import open_store
from tests.chaos.journal import Journal
from tests.toy_site import ToyTrained

TRAINING_S = (0.1, 0.9)
"""As fast as two cores carry eight sites, the servers and the workers."""
IDLE_S = 0.5
BROKER_RATES = {Fault.FAIL_BEFORE: 0.01, Fault.FAIL_AFTER: 0.03, Fault.DELAY: 0.02, Fault.REPEAT: 0.05}
"""Of the publishes of updates."""
STORE_RATES = {Fault.FAIL_BEFORE: 0.002, Fault.FAIL_AFTER: 0.002, Fault.DELAY: 0.005}
STORE_CALLS = READS | WRITES
DELAY_S = 0.5


@dataclass(frozen=True)
class JournalledBroker:
    """Writes the id of each update that the broker has confirmed into the journal."""

    inner: Broker
    journal: Journal

    def publish(self, exchange: str, message: Message) -> None:
        self.inner.publish(exchange, message)
        if message.type == UPDATE_TYPE and message.message_id is not None:  # requests have ids, too
            self.journal.write(message.message_id)

    def consume(self, queues: Sequence[str], handler: Handler, stop: Callable[[], bool]) -> None:
        self.inner.consume(queues, handler, stop)

    def drain(self, queue: str, limit: int = 100) -> list[Delivery]:
        return self.inner.drain(queue, limit)

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class JournalledPlan:
    """Writes each fault that the plan asks for into the journal: counts in memory would die with the site."""

    inner: FaultPlan
    where: str
    journal: Journal

    def next(self, operation: str, target: str) -> Fault | None:
        fault = self.inner.next(operation, target)
        if fault is not None:
            self.journal.write(self.where, fault.value)
        return fault


@dataclass(frozen=True)
class NoiseTrainer:
    """Moves every weight at random, so that no two updates are equal and their order shows in the model."""

    idle: Path
    rng: random.Random
    num_images: int = 10

    def prepare(self, spec: JobSpec) -> None:
        pass

    def train(
        self,
        spec: JobSpec,
        weights: Mapping[str, NDArray[np.generic]],
        *,
        base_version: int,
        seed: int,
        on_progress: Callable[[Progress], None],
    ) -> ToyTrained:
        if self.idle.exists():
            time.sleep(IDLE_S)
            raise BadDataset("told to train no more")
        time.sleep(self.rng.uniform(*TRAINING_S))
        noise = np.random.default_rng(self.rng.getrandbits(64))
        return ToyTrained({name: _moved(array, noise) for name, array in weights.items()})


def _moved(array: NDArray[Any], noise: np.random.Generator) -> NDArray[Any]:
    if array.dtype.kind == "i":
        return np.asarray(array + np.ones((), array.dtype))
    # positive, as a variance must be; a tenth of the way, so that weights stay of order one
    return np.abs(0.9 * array + 0.1 * noise.random(array.shape)).astype(array.dtype)


def agent(settings: Settings, job: str, seed: int, idle: Path, stop: threading.Event) -> SiteAgent:
    journal, faults = Journal(settings.site_state / "journal"), Journal(settings.site_state / "faults")
    broker_plan = Seeded(seed, BROKER_RATES, operations=QUEUES, target="updates.*")
    store_plan = Seeded(seed + 1, STORE_RATES, operations=STORE_CALLS)

    def connected() -> Broker:
        journalled = JournalledBroker(connect(settings), journal)
        return FaultyBroker(journalled, JournalledPlan(broker_plan, "broker", faults), delay_s=DELAY_S)

    store = FaultyStore(open_store(settings), JournalledPlan(store_plan, "store", faults), delay_s=DELAY_S)
    trainer = NoiseTrainer(idle, random.Random(seed + 2))
    return SiteAgent(settings, [job], store, connected, lambda spec: trainer, stop)


if __name__ == "__main__":
    log_to_stderr()
    heavy = {"torch", "torchvision"} & set(sys.modules)
    assert not heavy, f"a light site has no use for {heavy}"
    loaded = Settings.load()
    loaded.site_state.mkdir(parents=True, exist_ok=True)
    agent(loaded, sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), stop_on_signals()).run()
