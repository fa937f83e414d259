"""A trainer that the site brings: what it is given, and what of its result is refused before it is sent."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from federation.errors import BadDataset, BadPayload, BadSettings
from federation.jobs import TrainingPlan
from producers.agent import Progress
from producers.custom_trainer import CustomTrained, CustomTraining, TrainingFailed
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


def test_an_error_of_the_trainer_drops_the_attempt_and_not_the_agent() -> None:
    def fails(weights: Arrays) -> Any:
        raise KeyError("camera 7")

    with pytest.raises(TrainingFailed, match=r"KeyError.*camera 7"):
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
