"""When training comes to nothing: a site reports it, drops the attempt, makes another, publishes nothing broken."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from broker.sqlite import SqliteBroker
from detection.engine import Diverged, OutOfMemory
from detection.threads import use_threads
from detection.weights import exchanged_names, initial_state, module_for
from federation.errors import BadDataset
from federation.jobs import JobSpec, StopRule, TrainingPlan
from federation.settings import Settings
from federation.types import ClientUpdate, SiteStatus
from producers.agent import SiteAgent
from producers.custom_trainer import CustomTraining
from producers.detection_trainer import DetectionTrainer
from producers.outbox import Outbox
from producers.trainer import Progress, Trained, Trainer
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import decode, from_arrays
from tasks.context import Context
from tasks.jobs import create
from tests.factories import Arrays, job_spec, toy_arrays
from tests.toy_site import ToyTrained, ToyTrainer


class Site:
    """A store with a job at version 0, a queue that nobody reads, and the site's agent, which never waits long."""

    def __init__(
        self,
        folder: Path,
        spec: JobSpec,
        arrays: Arrays,
        exchanged: list[str],
        trainer: Trainer,
        stop: threading.Event,
    ) -> None:
        store, self.folder, self.job = MemoryStore(), folder, spec.id
        broker = SqliteBroker(str(folder / "queue.db"), lease_s=60, delivery_limit=20)
        broker.declare(("site-a",))
        context = Context(Settings(), store, broker, lambda name, arguments: None)
        create(
            context,
            spec,
            save_model(store, spec.id, from_arrays(arrays)),
            save_model(store, spec.id, from_arrays({name: arrays[name] for name in exchanged})),
        )
        settings = Settings(site="site-a", site_state=folder, backoff_limit_s=0.01, poll_s=0.01)
        connect: Callable[[], SqliteBroker] = lambda: SqliteBroker(  # noqa: E731
            str(folder / "queue.db"), lease_s=60, delivery_limit=20
        )
        self.agent = SiteAgent(settings, [spec.id], store, connect, lambda spec: trainer, stop)

    @property
    def status(self) -> SiteStatus:
        return self.agent._heartbeat.status

    @property
    def updates(self) -> list[ClientUpdate]:
        outbox = Outbox(self.folder / self.job)
        return [*outbox.waiting(), *outbox.sent()]


# --- any trainer ---------------------------------------------------------------------------------------


@dataclass
class Failing(ToyTrainer):
    """The first attempt fails as told; the second is good and the last."""

    fail: Callable[[ToyTrained], ToyTrained] = lambda trained: trained
    stop: threading.Event = field(default_factory=threading.Event)
    seeds: list[int] = field(default_factory=list)

    def train(self, spec: JobSpec, weights: Mapping[str, Any], *, seed: int, **more: Any) -> ToyTrained:
        self.seeds.append(seed)
        trained = super().train(spec, weights, seed=seed, **more)
        if len(self.seeds) == 1:
            return self.fail(trained)
        self.stop.set()
        return trained


def raising(error: Exception) -> Callable[[ToyTrained], ToyTrained]:
    def fail(trained: ToyTrained) -> ToyTrained:
        raise error

    return fail


def with_value(name: str, value: float) -> Callable[[ToyTrained], ToyTrained]:
    def fail(trained: ToyTrained) -> ToyTrained:
        trained.weights[name].flat[0] = value  # type: ignore[index]
        return trained

    return fail


@pytest.mark.parametrize(
    ("fail", "problem"),
    [
        (
            raising(Diverged("the loss became nan at step 3 of 20")),
            "diverged: the loss became nan at step 3 of 20",
        ),
        (raising(OutOfMemory("lower the plan's batch_size")), "out-of-memory: lower the plan's batch_size"),
        (raising(MemoryError()), "out-of-memory: the memory of this machine is not enough"),
        (with_value("conv.weight", np.nan), "not-finite: "),
        (with_value("norm.running_var", -1.0), "negative-variance: "),
    ],
    ids=["loss", "memory", "python memory", "weight", "variance"],
)
def test_a_failed_attempt_is_reported_and_another_is_made(
    fail: Callable[[ToyTrained], ToyTrained], problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Failing(fail=fail)
    site = Site(tmp_path, job_spec(), toy_arrays(), list(toy_arrays()), trainer, trainer.stop)
    with caplog.at_level(logging.WARNING, "fedqueue.site"):
        site.agent.run()
    assert site.status.dropped == 1
    assert site.status.problem.startswith(problem)
    assert site.status.problem_at is not None
    said = [record.getMessage() for record in caplog.records if record.name == "fedqueue.site"]
    assert [message.count("attempt dropped") for message in said] == [1]
    assert trainer.bases == [0, 0]
    assert len(set(trainer.seeds)) == 2, "the same order again would fail again"
    (update,) = site.updates
    payload = Outbox(tmp_path / "toy").payload(update)
    assert np.isfinite(decode(payload).flat).all()


def test_names_of_images_stay_at_the_site(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Failing(fail=raising(BadDataset("frames/mrs-miller.jpg: cannot be read as an image")))
    site = Site(tmp_path, job_spec(), toy_arrays(), list(toy_arrays()), trainer, trainer.stop)
    site.agent.run()
    assert "mrs-miller" in caplog.text
    assert "mrs-miller" not in site.status.to_json().decode()
    assert site.status.problem == "bad-dataset: images cannot be read; the site's log names them"


@pytest.mark.parametrize(
    ("num_examples", "metrics"),
    [(["mrs-miller.jpg"], {}), (7, {"worst": "mrs-miller.jpg"}), (7, {"mrs-miller.jpg": "x" * 99})],
    ids=["examples", "metric", "name of a metric"],
)
def test_what_a_trainer_of_the_sites_own_returns_by_mistake_is_not_quoted(
    num_examples: Any, metrics: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()

    class Trainer:
        calls = 0

        def train(self, weights: Arrays, plan: TrainingPlan) -> Any:
            self.calls += 1
            if self.calls == 1:
                return weights, num_examples, metrics
            stop.set()
            return weights, 7, {}

    training = CustomTraining("ours", Trainer())
    site = Site(tmp_path, job_spec(), toy_arrays(), list(toy_arrays()), training, stop)
    site.agent.run()
    assert "bad-payload" in caplog.text
    assert "miller" not in site.status.to_json().decode()
    assert site.status.problem == "bad-payload: the site's log says why"


def test_an_unknown_failure_of_a_trainer_is_no_attempt_to_repeat(tmp_path: Path) -> None:
    trainer = Failing(fail=raising(ZeroDivisionError("a mistake in the program")))
    site = Site(tmp_path, job_spec(), toy_arrays(), list(toy_arrays()), trainer, trainer.stop)
    with pytest.raises(ZeroDivisionError):
        site.agent.run()
    assert site.updates == []


# --- detectors and real files --------------------------------------------------------------------------

SPEC = JobSpec(
    id="street",
    classes=("thing",),
    plan=TrainingPlan(image_size=64, batch_size=3, local_epochs=2.0, warmup_steps=0),
    stop=StopRule(max_versions=100),
    max_inflight=10,
)
IMAGES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of 64x64 with one box each."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(IMAGES)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 0, "bbox": [8, 8, 30, 30]} for i in range(IMAGES)
        ],
        "categories": [{"id": 0, "name": "thing"}],
    }
    (tmp_path / "site.json").write_text(json.dumps(coco))
    return tmp_path


@dataclass
class Harmed(DetectionTrainer):
    """`harm`: what happens after the first step of each attempt, in this order; then the agent is stopped."""

    harm: Iterator[Callable[[], object]] = field(default_factory=lambda: iter(()))
    stop: threading.Event = field(default_factory=threading.Event)
    results: list[Trained] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    def train(self, *args: Any, on_progress: Callable[[Progress], None], **more: Any) -> Trained:
        harm = next(self.harm, None)

        def step(progress: Progress) -> None:
            on_progress(progress)
            self.progress.append(progress)
            if harm is not None and progress.step == 1:
                harm()

        trained = super().train(*args, on_progress=step, **more)
        self.results.append(trained)
        if harm is None:
            self.stop.set()
        return trained


def harmed(folder: Path, *harm: Callable[[], object]) -> tuple[Harmed, Site]:
    use_threads(1)
    trainer = Harmed(folder / "site.json", folder, cache_bytes=0, harm=iter(harm))
    names = exchanged_names(module_for(SPEC), SPEC.plan)
    return trainer, Site(folder / "state", SPEC, initial_state(SPEC), names, trainer, trainer.stop)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()


def truncate(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("how", ["truncated", "gone", "another size"])
def test_training_goes_on_without_an_image_that_was_harmed_and_takes_it_back(
    how: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = folder / "3.png"
    whole = victim.read_bytes()
    harms: dict[str, Callable[[], object]] = {
        "truncated": truncate(victim),
        "gone": victim.unlink,
        "another size": lambda: Image.new("RGB", (32, 64)).save(victim),
    }
    trainer, site = harmed(folder, harms[how], lambda: victim.write_bytes(whole))
    site.agent.run()
    assert site.status.dropped == 1, site.status.problem
    assert [trained.num_examples for trained in trainer.results] == [5, 6]
    assert [trained.metrics.get("left_out") for trained in trainer.results] == [1.0, None]
    assert [p.left_out for p in trainer.progress if p.step == 0] == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert (
        site.status.problem
        == "bad-dataset: images that cannot be read and are left out: 1; the site's log names them"
    )
    assert caplog.text.count("training without an image") == 1
    assert str(victim) in caplog.text
    assert sorted(update.num_examples for update in site.updates) == [5, 6]


def test_a_folder_that_vanishes_is_waited_for(folder: Path) -> None:
    """As when a network disk is away for a while."""
    away = folder / "away"
    away.mkdir()
    images = [folder / f"{i}.png" for i in range(IMAGES)]
    trainer, site = harmed(folder, lambda: [path.rename(away / path.name) for path in images])
    tries = 0
    real = DetectionTrainer.train

    def second_try(self: DetectionTrainer, *args: Any, **more: Any) -> Trained:
        nonlocal tries
        tries += 1
        if tries == 4:
            for path in images:
                (away / path.name).rename(path)
        return real(self, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTrainer, "train", second_try)
        site.agent.run()
    assert site.status.dropped == 3
    assert [trained.num_examples for trained in trainer.results] == [6]


def test_a_model_that_is_not_finite_makes_no_update(folder: Path) -> None:
    trainer, site = harmed(folder)
    trainer.prepare(SPEC)
    weights = initial_state(SPEC)
    weights["backbone.body.conv1.0.weight"][0] = np.nan
    with pytest.raises(Diverged):
        trainer.train(SPEC, weights, base_version=0, seed=1, on_progress=lambda progress: None)
    assert site.updates == []
