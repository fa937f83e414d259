"""What a site trains from, and what it uploads, under each norm policy and strategy."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from federation.errors import BadPayload, StoreUnavailable
from federation.jobs import AggregationPolicy, Job, ModelRef, TrainingPlan
from federation.types import ModelVersion
from producers.local import LocalModel
from storage.memory import MemoryStore
from storage.models import ModelCache, save_model
from storage.tensors import decode, from_arrays
from tests.factories import Arrays, job_spec, toy_arrays

NORM = [name for name in toy_arrays() if name.startswith("norm.")]


def site(
    folder: Path,
    store: MemoryStore,
    norm: str = "average",
    strategy: str = "fedasync",
    optimizer_state: str = "fresh",
) -> LocalModel:
    spec = job_spec(
        plan=TrainingPlan.from_json(f'{{"norm": "{norm}", "optimizer_state": "{optimizer_state}"}}'),
        aggregation=AggregationPolicy.from_json(f'{{"strategy": "{strategy}"}}'),
    )
    initial = save_model(store, "toy", from_arrays(toy_arrays(0.0)))
    job = Job(spec=spec, initial=initial, max_update_bytes=1 << 20, created_at=datetime.now(UTC))
    return LocalModel(job, store, ModelCache(folder / "models", 3), folder)


def version(store: MemoryStore, arrays: Arrays) -> ModelRef:
    return save_model(store, "toy", from_arrays(arrays))


def exchanged(value: float, norm: str) -> Arrays:
    return {n: a for n, a in toy_arrays(value).items() if norm == "average" or n not in NORM}


@pytest.mark.parametrize("norm", ["average", "local", "frozen"])
def test_training_starts_from_the_version_completed_by_the_initial_model(tmp_path: Path, norm: str) -> None:
    store = MemoryStore()
    model = site(tmp_path, store, norm)
    arrays = model.assemble(model.pull(version(store, exchanged(2.0, norm))))
    assert arrays.keys() == toy_arrays().keys()
    assert arrays["conv.weight"].flat[0] == 2.0
    assert arrays["norm.weight"].flat[0] == (2.0 if norm == "average" else 0.0)


@pytest.mark.parametrize(("norm", "kept"), [("local", 5.0), ("frozen", 0.0)])
def test_norm_layers_that_stay_home_are_kept_only_where_they_are_the_sites_own(
    tmp_path: Path, norm: str, kept: float
) -> None:
    store = MemoryStore()
    model = site(tmp_path, store, norm)
    first = model.pull(version(store, exchanged(2.0, norm)))
    trained = toy_arrays(5.0)
    model.keep_norm(first, trained)
    payload = model.payload(first, trained)
    assert sorted(payload.arrays()) == sorted(exchanged(0.0, norm))  # no norm tensor leaves the site
    again = site(tmp_path, store, norm).assemble(first)
    assert again["norm.weight"].flat[0] == kept
    assert again["conv.weight"].flat[0] == 2.0


def test_fedbuff_uploads_differences_of_weights_and_values_of_statistics(tmp_path: Path) -> None:
    store = MemoryStore()
    model = site(tmp_path, store, strategy="fedbuff")
    base = model.pull(version(store, toy_arrays(2.0)))
    payload = model.payload(base, toy_arrays(5.0)).arrays()
    assert payload["conv.weight"].flat[0] == 3.0
    assert payload["norm.running_mean"].flat[0] == 5.0
    assert payload["norm.running_var"].flat[0] == 6.0
    assert int(payload["norm.num_batches_tracked"]) == 5
    assert base.arrays()["conv.weight"].flat[0] == 2.0  # the base itself is unchanged


def test_moments_come_from_the_versions_state_and_travel_as_values(tmp_path: Path) -> None:
    store = MemoryStore()
    model = site(tmp_path, store, strategy="fedbuff", optimizer_state="shared")
    base = model.pull(version(store, toy_arrays(2.0)))
    stored = ModelVersion(version=1, model=version(store, toy_arrays(2.0)))
    assert model.moments(stored, base) == {}, "nobody has any before the first merge"
    count = base.layout.weight_count
    state = {"m": np.arange(count, dtype=np.float32), "v": np.arange(count, dtype=np.float32) * 2}
    stored = stored.model_copy(update={"server_state": save_model(store, "toy", from_arrays(state))})
    moments = model.moments(stored, base)
    assert {name: array.shape for name, array in moments.items()} == {
        name + suffix: toy_arrays()[name].shape
        for name in ("conv.weight", "norm.bias", "norm.weight")
        for suffix in (".exp_avg", ".exp_avg_sq")
    }
    weights = model.assemble(base) | moments
    trained = {name: np.asarray(array + np.ones((), array.dtype)) for name, array in weights.items()}
    sent = model.payload(base, trained)
    assert sent.layout == base.layout.with_moments(2)
    assert np.array_equal(sent.flat[:count], np.ones(count)), "the difference of the weights"
    assert np.array_equal(sent.flat[count : 2 * count], state["m"] + 1)
    assert np.array_equal(sent.flat[2 * count : 3 * count], state["v"] + 1)
    model.keep_norm(base, trained)
    assert not (tmp_path / "norm.safetensors").exists()
    short = save_model(store, "toy", from_arrays({"m": np.zeros(3, np.float32)}))
    with pytest.raises(BadPayload, match=r"must have \(80,\)"):
        model.moments(stored.model_copy(update={"server_state": short}), base)


def test_a_trainer_that_returns_no_moments_has_no_update_to_send(tmp_path: Path) -> None:
    store = MemoryStore()
    model = site(tmp_path, store, optimizer_state="shared")
    base = model.pull(version(store, toy_arrays(2.0)))
    with pytest.raises(BadPayload, match=r"conv\.weight\.exp_avg"):
        model.payload(base, toy_arrays(5.0))


def test_a_broken_download_is_an_outage_not_the_end(tmp_path: Path) -> None:
    store = MemoryStore()
    model = site(tmp_path, store)
    good = version(store, toy_arrays(2.0))
    store.put(good.key, bytes(good.nbytes))
    with pytest.raises(StoreUnavailable, match="downloaded model"):
        model.pull(good)
    assert not list((tmp_path / "models").glob("*.safetensors"))
    assert np.isfinite(model.pull(version(store, toy_arrays(3.0))).flat).all()


def test_frozen_layers_come_from_the_initial_model_and_are_kept_nowhere_else(tmp_path: Path) -> None:
    store = MemoryStore()
    plan = TrainingPlan(freeze=("conv",), norm="local")
    spec = job_spec(plan=plan)
    arrays = {**toy_arrays(), "head.weight": np.zeros(3, np.float32)}
    initial = save_model(store, "toy", from_arrays(arrays))
    job = Job(spec=spec, initial=initial, max_update_bytes=1 << 20, created_at=datetime.now(UTC))
    model = LocalModel(job, store, ModelCache(tmp_path / "models", 3), tmp_path)
    base = model.pull(version(store, {"head.weight": np.full(3, 2.0, np.float32)}))
    trained = {**toy_arrays(5.0), "head.weight": np.full(3, 3.0, np.float32)}
    model.keep_norm(base, trained)
    assert decode((tmp_path / "norm.safetensors").read_bytes()).arrays().keys() == set(NORM)
    assert model.payload(base, trained).arrays().keys() == {"head.weight"}
    again = model.assemble(base)
    assert [again[n].flat[0] for n in ("conv.weight", "norm.weight", "head.weight")] == [0.0, 5.0, 2.0]
