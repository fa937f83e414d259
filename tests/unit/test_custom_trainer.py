"""A trainer that the site brings: what it is given, and what of its result is refused before it is sent."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.initial import first_weights
from cli.main import app
from federation.errors import BadDataset, BadJob, BadPayload, BadSettings
from federation.jobs import EvaluationPolicy, TrainingPlan
from producers.custom_trainer import CustomMeasured, CustomTrained, CustomTraining, TrainerFailed
from producers.evaluation import Evaluator
from producers.trainer import Progress
from storage.tensors import encode, from_arrays
from tests.factories import Arrays, job_spec, toy_arrays


class Trainer:
    """Calls a function; keeps the plan that it was given."""

    def __init__(self, result: Callable[[Arrays], Any] = lambda weights: (weights, 7, {"loss": 0.5})) -> None:
        self.result = result

    def train(self, weights: Arrays, plan: TrainingPlan) -> Any:
        self.plan = plan
        return self.result(weights)


def train(trainer: Any, seed: int = 3, weights: Arrays | None = None) -> CustomTrained:
    steps: list[Progress] = []
    trained = CustomTraining("ours", trainer).train(
        job_spec(), weights or toy_arrays(1.0), base_version=0, seed=seed, on_progress=steps.append
    )
    assert steps == [Progress(0, 0, 0.0)] * 2
    return trained


def test_it_is_told_before_it_trains_that_it_has_no_moments_to_share() -> None:
    training = CustomTraining("ours", Trainer())
    training.prepare(job_spec(plan=TrainingPlan(optimizer_state="kept")))
    with pytest.raises(BadJob, match=r'needs plan\.optimizer_state = "fresh" or "kept"'):
        training.prepare(job_spec(plan=TrainingPlan(optimizer_state="shared")))


def test_it_gets_copies_and_a_plan_with_the_updates_own_seed() -> None:
    weights = toy_arrays(1.0)
    for array in weights.values():
        array.flags.writeable = False  # as a version from the cache is

    def double(given: Arrays) -> Any:
        for array in given.values():
            array *= 2
        return given, np.int64(7), {"loss": np.float32(0.5)}

    trainer = Trainer(double)
    trained = train(trainer, seed=2**32 - 1, weights=weights)
    assert (trained.weights["conv.weight"] == 2).all()
    assert (weights["conv.weight"] == 1).all()
    assert trained.num_examples == 7
    assert trained.metrics == {"loss": 0.5}
    assert trainer.plan == TrainingPlan(seed=2**31 - 1)
    train(trainer, seed=4)
    assert trainer.plan.seed == 4


def changed(name: str, value: Any) -> Callable[[Arrays], Any]:
    return lambda weights: ({**weights, name: value}, 7, {})


REFUSED: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "nothing": (lambda weights: None, r"must return \(weights"),
    "no mapping": (lambda weights: ([], 7, {}), "missing.*conv.weight"),
    "a tensor less": (
        lambda w: ({n: a for n, a in w.items() if n != "norm.bias"}, 7, {}),
        r"missing \['norm.bias'\]",
    ),
    "a tensor more": (changed("extra", np.zeros(1, np.float32)), r"not asked for \['extra'\]"),
    "another shape": (
        changed("norm.bias", np.zeros(5, np.float32)),
        r"'norm.bias' is float32 \(5,\), must be",
    ),
    "another type": (changed("norm.bias", np.zeros(4)), "'norm.bias' is float64"),
    "no array": (changed("norm.bias", [0.0] * 4), "'norm.bias' is list"),
    "not finite": (changed("norm.bias", np.full(4, np.nan, np.float32)), "'norm.bias' holds NaN"),
    "no examples": (lambda weights: (weights, 0, {}), "num_examples.*0"),
    "half an example": (lambda weights: (weights, 1.5, {}), "num_examples.*1.5"),
    "true": (lambda weights: (weights, True, {}), "num_examples.*True"),
    "no metrics": (lambda weights: (weights, 7, None), "metrics must be a dict"),
    "words": (lambda weights: (weights, 7, {"loss": "low"}), "metrics must be a dict"),
    "infinite metric": (lambda weights: (weights, 7, {"loss": float("inf")}), "metrics: loss"),
    "odd name": (lambda weights: (weights, 7, {"lo\nss": 1.0}), "metrics"),
    "too many": (lambda weights: (weights, 7, {f"m{i}": 1.0 for i in range(33)}), "metrics"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_result_that_is_no_update_is_refused_with_its_reason(case: str) -> None:
    result, error = REFUSED[case]
    with pytest.raises(BadPayload, match=error):
        train_silently(Trainer(result))


def train_silently(trainer: Any) -> None:
    CustomTraining("ours", trainer).train(
        job_spec(), toy_arrays(1.0), base_version=0, seed=3, on_progress=lambda step: None
    )


class Measuring(Trainer):
    """Returns `metrics` for any weights, which it overwrites."""

    def __init__(self, metrics: Any) -> None:
        super().__init__()
        self.metrics = metrics

    def evaluate(self, weights: Arrays) -> Any:
        weights["conv.weight"][:] = 0
        return self.metrics


def measure(metrics: Any, of_job: str = "accuracy") -> CustomMeasured:
    weights, done = toy_arrays(1.0), list[int]()
    weights["conv.weight"].flags.writeable = False  # as a version from the cache is
    spec = job_spec(evaluation=EvaluationPolicy(sites_every=1, metric=of_job))
    measured = CustomTraining("ours", Measuring(metrics)).evaluate(spec, weights, done.append)
    assert done == [0], "the agent may be told to stop before it begins"
    return measured


def test_a_trainer_that_can_measure_is_an_evaluator() -> None:
    assert isinstance(CustomTraining("ours", Measuring({})), Evaluator)
    assert CustomTraining("ours", Measuring({})).num_validation_images is None
    assert CustomTraining("ours", Trainer()).num_validation_images == 0


@pytest.mark.parametrize("given", [{}, {"num_images": 5}, {"num_images": np.int64(5)}])
def test_its_measurement_weighs_as_much_as_it_says(given: dict[str, Any]) -> None:
    measured = measure({"accuracy": np.float32(0.5), **given})
    assert measured == CustomMeasured({"accuracy": 0.5}, 5 if given else 1)


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        (None, "metrics must be a dict"),
        (0.5, "metrics must be a dict"),
        ({"accuracy": float("nan")}, "metrics: accuracy"),
        ({"accuracy": 0.5, "num_images": 0}, "num_images must be a whole number from 1 on, is 0"),
        ({"accuracy": 0.5, "num_images": 2.5}, "is 2.5"),
    ],
)
def test_what_are_no_metrics_is_refused(metrics: Any, error: str) -> None:
    with pytest.raises(BadPayload, match=error):
        measure(metrics)


def test_a_measure_that_the_job_does_not_go_by_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert measure({"recall": 0.5}, of_job="recall").metrics == {"recall": 0.5}
    assert not caplog.messages
    assert measure({"recall": 0.5}).metrics == {"recall": 0.5}
    assert "measures recall, but the job's best version goes by accuracy" in caplog.text


def test_an_error_in_evaluate_is_the_trainers() -> None:
    class Fails(Trainer):
        def evaluate(self, weights: Arrays) -> Any:
            raise KeyError("camera 7")

    with pytest.raises(TrainerFailed, match=r"KeyError.*camera 7"):
        CustomTraining("ours", Fails()).evaluate(job_spec(), toy_arrays(), lambda done: None)


def test_the_server_cannot_measure_what_it_does_not_know_but_sites_can(tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    path.write_bytes(encode(from_arrays(toy_arrays())))
    with pytest.raises(BadJob, match=r"set evaluation\.every to 0"):
        first_weights(job_spec(arch="our-own", evaluation=EvaluationPolicy(every=1)), str(path))
    policy = EvaluationPolicy(sites_every=1, metric="accuracy")
    first = first_weights(job_spec(arch="our-own", evaluation=policy), str(path))
    assert "most 'accuracy'" in first.report[-1]


def test_an_error_of_the_trainer_drops_the_attempt_and_not_the_agent() -> None:
    def fails(weights: Arrays) -> Any:
        raise KeyError("camera 7")

    with pytest.raises(TrainerFailed, match=r"KeyError.*camera 7"):
        train_silently(Trainer(fails))

    def knows(weights: Arrays) -> Any:
        raise BadDataset("no images")

    with pytest.raises(BadDataset):
        train_silently(Trainer(knows))


def test_a_trainer_is_found_by_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("company_training")
    vars(module).update(
        Trainer=Trainer, made=Trainer(), make=lambda: Trainer(), number=3, broken=lambda: 1 / 0
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("Trainer", "made", "make"):
        assert isinstance(CustomTraining.from_settings(f"company_training:{name}").trainer, Trainer)
    for name, error in {
        "company_training:number": "could not be made|no train",
        "company_training:broken": "ZeroDivisionError",
        "company_training:missing": "cannot be imported",
        "nowhere:at_all": "cannot be imported",
        "unheard-of": "no installed entry point|there is no 'unheard-of'",
    }.items():
        with pytest.raises(BadSettings, match=error):
            CustomTraining.from_settings(name)


def test_a_site_with_a_trainer_of_its_own_says_which_jobs_it_is_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = types.ModuleType("company_training")
    vars(module).update(Trainer=Trainer)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    environment = {"FEDQUEUE_TRAINER": "company_training:Trainer", "FEDQUEUE_SITE_NICE": "0"}
    result = CliRunner().invoke(app, ["site", "run", "--site", "north"], env=environment)
    assert result.exit_code == 1
    assert "set FEDQUEUE_SITE_CLASSES, or name the jobs with --job" in result.output
