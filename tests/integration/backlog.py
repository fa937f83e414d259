"""A job and the updates sent to it, and what its log and its model must be in the end, whatever happened meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from federation.ids import new_update_id
from federation.jobs import AggregationPolicy
from federation.keys import DEADLETTERS_PREFIX
from federation.types import ClientUpdate, Contribution, Published
from storage.audit import audit
from storage.log import VersionLog
from storage.models import load_model
from storage.tensors import decode
from tasks.replay import replay
from tests.factories import Arrays, client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import Server, until

ALPHA = 0.6
# A publish for every few accepts, so that a kill meets both; all updates have base 0, so each weighs differently.
POLICY = AggregationPolicy(strategy="fedasync", alpha=ALPHA, max_pending=4, max_staleness=1000)


@dataclass
class Backlog:
    """A job and the updates that were sent to it, each with its own random model."""

    server: Server
    job: str = field(default_factory=lambda: f"job-{new_update_id()[-12:]}")
    ids: list[str] = field(default_factory=list)
    sent: list[ClientUpdate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.create_job(job_spec(self.job, aggregation=POLICY), random_arrays(0))

    def send(self, count: int) -> None:
        for _ in range(count):
            payload = payload_of(random_arrays(len(self.ids) + 1))
            update = client_update(payload, job=self.job)
            self.server.send(update, payload)
            self.ids.append(update.update_id)
            self.sent.append(update)

    def accepted(self) -> int:
        """How many updates are in the log."""
        head = self.server.head(self.job)
        assert head is not None
        return head.version + len(head.pending)

    def merged(self) -> list[Contribution]:
        """In log order."""
        return merged(self.server, self.job)

    def wait_and_check(self) -> None:
        """Every update merged exactly once, and the model is what the formula gives in the log's order."""
        until(
            "all updates to be merged",
            lambda: (head := self.server.head(self.job)) is not None and head.version >= len(self.ids),
        )
        contributions = self.merged()
        assert sorted(c.update.update_id for c in contributions) == sorted(self.ids)
        assert [c.version for c in contributions] == list(range(1, len(self.ids) + 1))
        head = self.server.head(self.job)
        assert head is not None
        assert (head.version, head.pending) == (len(self.ids), ())
        assert not list(self.server.store.list(DEADLETTERS_PREFIX))
        expected = random_arrays(0)
        for staleness, contribution in enumerate(contributions):
            assert contribution.staleness == staleness
            assert contribution.weight == ALPHA * (1 + staleness) ** -0.5
            data = self.server.store.get(contribution.update.payload_key, max_bytes=1 << 20)
            expected = fedasync(expected, dict(decode(data).arrays()), contribution.weight)
        arrays = load_model(self.server.store, head.current.model).arrays()
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            assert arrays[name].tobytes() == array.tobytes(), name
        assert [found for found in audit(self.server.store, self.job) if found.level == "error"] == []
        assert [step for step in replay(self.server.store, self.job) if not step.equal] == []


def merged(server: Server, job: str) -> list[Contribution]:
    events = [record.event for record in VersionLog(server.store, job).history()]
    return [c for event in events if isinstance(event, Published) for c in event.merged]


def random_arrays(seed: int) -> Arrays:
    """Some 150 KB, so that a merge takes long enough to be hit."""
    rng = np.random.default_rng(seed)
    arrays = toy_arrays() | {"conv.weight": np.zeros((64, 64, 3, 3), np.float32)}
    for name, array in arrays.items():
        arrays[name] = rng.standard_normal(array.shape).astype(np.float32)
    arrays["norm.running_var"] = np.square(arrays["norm.running_var"])
    arrays["norm.num_batches_tracked"] = np.array(seed, np.int64)
    return arrays


def fedasync(model: Arrays, payload: Arrays, a: float) -> Arrays:
    """x ← (1-α)x + αy as a step from the nearer end in float32; statistics as those of a mixture, in float64."""
    mixed = {}
    mean, var = (model[f"norm.running_{name}"].astype(np.float64) for name in ("mean", "var"))
    other_mean, other_var = (payload[f"norm.running_{name}"].astype(np.float64) for name in ("mean", "var"))
    for name, x in model.items():
        y = payload[name]
        if name == "norm.num_batches_tracked":
            mixed[name] = np.maximum(x, y)
        elif name == "norm.running_mean":
            mixed[name] = ((1 - a) * mean + a * other_mean).astype(np.float32)
        elif name == "norm.running_var":
            apart = a * (1 - a) * np.square(other_mean - mean)
            mixed[name] = ((1 - a) * var + a * other_var + apart).astype(np.float32)
        else:
            mixed[name] = x + (y - x) * np.float32(a) if a < 0.5 else y - (y - x) * np.float32(1 - a)
    return mixed
