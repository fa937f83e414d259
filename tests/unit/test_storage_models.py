"""Models, payloads, the sites' cache, and the small objects of a job."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federation.errors import BadPayload, CorruptLog, NotFound, StoreUnavailable
from federation.ids import new_update_id
from federation.jobs import Job, JobSpec, ModelRef
from federation.keys import job_key, model_key, update_key
from federation.types import ClientUpdate, DeadLetter, Evaluation, Refusal
from storage.jobs import (
    list_dead_letters,
    list_evaluations,
    list_jobs,
    list_refusals,
    load_evaluation,
    load_job,
    save_dead_letter,
    save_evaluation,
    save_job,
    save_refusal,
)
from storage.memory import MemoryStore
from storage.models import ModelCache, load_full_model, load_model, load_payload, save_model
from storage.tensors import TensorFile, encode, from_arrays

AT = datetime(2030, 1, 1, tzinfo=UTC)


def model(value: float = 1.0, **more: float) -> TensorFile:
    arrays: dict[str, np.ndarray[Any, Any]] = {"w": np.full(10, value, np.float32), "n": np.ones(2, np.int64)}
    return from_arrays({**arrays, **{name: np.full(2, v, np.float32) for name, v in more.items()}})


def job(name: str = "job", initial: ModelRef | None = None, classes: tuple[str, ...] = ("car",)) -> Job:
    ref = initial or ModelRef(key=model_key(name, "0" * 64), sha256="0" * 64, nbytes=8)
    return Job(spec=JobSpec(id=name, classes=classes), initial=ref, max_update_bytes=10_000, created_at=AT)


def update_for(data: bytes, **fields: Any) -> ClientUpdate:
    update_id = new_update_id()
    values: dict[str, Any] = {
        "update_id": update_id,
        "job": "job",
        "site": "north",
        "base_version": 0,
        "num_examples": 1,
        "payload_kind": "weights",
        "payload_key": update_key("job", "north", update_id),
        "payload_sha256": hashlib.sha256(data).hexdigest(),
        "payload_bytes": len(data),
        "created_at": AT,
    }
    return ClientUpdate(**{**values, **fields})


# --- models --------------------------------------------------------------------------------------------------


def test_a_model_is_stored_under_its_digest_once() -> None:
    store, file = MemoryStore(), model()
    ref = save_model(store, "job", file)
    assert ref == save_model(store, "job", file)
    assert list(store.list("")) == [ref.key] == [f"jobs/job/models/{ref.sha256}.safetensors"]
    again = load_model(store, ref, file.layout)
    assert again.flat.tolist() == file.flat.tolist()
    assert again.ints.tolist() == file.ints.tolist()
    with pytest.raises(BadPayload, match="'more' is missing"):
        load_model(store, ref, model(more=1).layout)


def test_a_model_of_ones_own_has_a_name_of_its_own() -> None:
    store, file = MemoryStore(), model()
    refs = [save_model(store, "job", file), *(save_model(store, "job", file, own=True) for _ in range(3))]
    assert len({ref.key for ref in refs}) == 4
    assert len({(ref.sha256, ref.nbytes) for ref in refs}) == 1
    for ref in refs[:3]:
        store.delete(ref.key)
    assert load_model(store, refs[3]).flat.tolist() == file.flat.tolist()


def test_a_model_that_was_tampered_with_is_noticed() -> None:
    store = MemoryStore()
    ref = save_model(store, "job", model(1.0))
    for data, reason in (
        (encode(model(2.0)), "wrong-digest"),
        (encode(model(1.0))[:-1], "wrong-size"),
        (encode(model(1.0)) + b"x", "too-large"),
    ):
        store.put(ref.key, data)
        with pytest.raises(BadPayload) as caught:
            load_model(store, ref)
        assert caught.value.reason == reason
    with pytest.raises(CorruptLog, match="has not the size"):
        save_model(store, "job", model(1.0))
    store.delete(ref.key)
    with pytest.raises(NotFound):
        load_model(store, ref)


def test_a_full_model_takes_what_is_not_exchanged_from_the_initial_one() -> None:
    store = MemoryStore()
    initial = save_model(store, "job", model(1.0, norm=5.0))
    version = save_model(store, "job", model(2.0))
    arrays = load_full_model(store, job(initial=initial), version).arrays()
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "w": [2.0] * 10,
        "norm": [5.0] * 2,
        "n": [1, 1],
    }
    whole = load_full_model(store, job(initial=version), version)
    assert whole.layout == model().layout
    store.delete(version.key)
    with pytest.raises(NotFound, match="fedqueue replay"):
        load_full_model(store, job(initial=initial), version)


# --- payloads ------------------------------------------------------------------------------------------------


def test_a_good_payload_is_read() -> None:
    store, data = MemoryStore(), encode(model(3.0))
    update = update_for(data)
    store.put(update.payload_key, data)
    file = load_payload(store, update, model().layout, max_bytes=len(data))
    assert file.flat.tolist() == [3.0] * 10


@pytest.mark.parametrize(
    ("stored", "fields", "max_bytes", "reason"),
    [
        (None, {}, 10**6, "missing-payload"),
        (encode(model()), {}, 100, "too-large"),
        (encode(model()) + b"x", {}, 10**6, "wrong-size"),
        (encode(model())[:-1], {}, 10**6, "wrong-size"),
        (encode(model(2.0)), {}, 10**6, "wrong-digest"),
    ],
)
def test_a_payload_that_is_not_as_declared_is_refused(
    stored: bytes | None, fields: dict[str, Any], max_bytes: int, reason: str
) -> None:
    class Counting(MemoryStore):
        reads = 0

        def get(self, key: str, *, max_bytes: int) -> bytes:
            self.reads += 1
            return super().get(key, max_bytes=max_bytes)

    store, update = Counting(), update_for(encode(model()), **fields)
    if stored is not None:
        store.put(update.payload_key, stored)
    with pytest.raises(BadPayload) as caught:
        load_payload(store, update, model().layout, max_bytes)
    assert caught.value.reason == reason
    assert update.payload_key in str(caught.value)
    reads = 2 if reason == "wrong-digest" else 0
    assert store.reads == reads, "sizes are judged before anything is read, a digest after reading twice"


@pytest.mark.parametrize("garble", [lambda data: data[:-1], lambda data: b"\0" * len(data)])
def test_a_reading_that_failed_condemns_nothing(garble: Callable[[bytes], bytes]) -> None:
    class Garbling(MemoryStore):
        reads = 0

        def get(self, key: str, *, max_bytes: int) -> bytes:
            self.reads += 1
            data = super().get(key, max_bytes=max_bytes)
            return garble(data) if self.reads == 1 else data

    data, store = encode(model(3.0)), Garbling()
    update = update_for(data)
    store.put(update.payload_key, data)
    with pytest.raises(StoreUnavailable, match="incompletely"):
        load_payload(store, update, model().layout, len(data))
    assert load_payload(store, update, model().layout, len(data)).flat.tolist() == [3.0] * 10
    store = Garbling()
    ref = save_model(store, "job", model())
    with pytest.raises(StoreUnavailable, match="incompletely"):
        load_model(store, ref)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nonsense", "malformed-header"),
        (encode(model(more=1)), "layout"),
        (encode(model(float("nan"))), "not-finite"),
    ],
)
def test_a_payload_with_bad_content_is_refused(data: bytes, reason: str) -> None:
    store, update = MemoryStore(), update_for(data)
    store.put(update.payload_key, data)
    with pytest.raises(BadPayload) as caught:
        load_payload(store, update, model().layout, 10**6)
    assert caught.value.reason == reason


# --- the sites' cache ------------------------------------------------------------------------------------------


class CountingStore(MemoryStore):
    downloads = 0

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        self.downloads += 1
        super().get_to_file(key, path, nbytes=nbytes, sha256=sha256)


def test_a_model_is_downloaded_once(tmp_path: Path) -> None:
    store = CountingStore()
    ref = save_model(store, "job", model())
    cache = ModelCache(tmp_path / "models", max_files=2)
    path = cache.fetch(store, ref)
    assert path.read_bytes() == encode(model())
    assert cache.fetch(store, ref) == path
    assert ModelCache(tmp_path / "models", max_files=2).fetch(store, ref) == path
    assert store.downloads == 1


@pytest.mark.parametrize("found", [b"short", encode(model(2.0))], ids=["short", "another model"])
def test_a_file_that_is_not_the_model_is_downloaded_again(tmp_path: Path, found: bytes) -> None:
    store = CountingStore()
    ref = save_model(store, "job", model(1.0))
    cache = ModelCache(tmp_path, max_files=2)
    cache.fetch(store, ref).write_bytes(found)
    assert not cache.holds(ref)
    assert cache.fetch(store, ref).read_bytes() == encode(model(1.0))
    assert cache.holds(ref)
    assert store.downloads == 2


def test_the_least_recently_used_models_go(tmp_path: Path) -> None:
    store, cache = CountingStore(), ModelCache(tmp_path, max_files=2)
    refs = [save_model(store, "job", model(value)) for value in (1.0, 2.0, 3.0)]
    paths = [tmp_path / f"{ref.sha256}.safetensors" for ref in refs]
    for age, n in enumerate((0, 1, 0)):  # the first is used again, so the second is the oldest
        os.utime(cache.fetch(store, refs[n]), (age, age))
    cache.fetch(store, refs[2])
    assert [path.exists() for path in paths] == [True, False, True]
    left = ModelCache(tmp_path, max_files=1).fetch(store, refs[0])
    assert list(tmp_path.iterdir()) == [left]


def test_a_wrong_model_does_not_enter_the_cache(tmp_path: Path) -> None:
    store, cache = MemoryStore(), ModelCache(tmp_path, max_files=2)
    ref = save_model(store, "job", model(1.0))
    store.put(ref.key, encode(model(2.0)))
    with pytest.raises(BadPayload, match="declared is"):
        cache.fetch(store, ref)
    assert list(tmp_path.iterdir()) == []
    store.delete(ref.key)
    with pytest.raises(NotFound):
        cache.fetch(store, ref)


def test_a_cache_without_a_folder_is_transient(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = MemoryStore()
    with pytest.raises(StoreUnavailable, match="model cache"):
        ModelCache(tmp_path / "file", 2).fetch(store, save_model(store, "job", model()))


# --- jobs, evaluations, refusals, dead letters -------------------------------------------------------------------


def test_a_job_is_written_once() -> None:
    store = MemoryStore()
    assert save_job(store, job())
    assert save_job(store, job()), "the reply to an earlier attempt may have been lost"
    assert not save_job(store, job(classes=("bus",)))
    assert load_job(store, "job") == job()
    with pytest.raises(NotFound):
        load_job(store, "other")
    store.put(job_key("broken"), b"{}")
    with pytest.raises(CorruptLog, match=r"job\.json"):
        load_job(store, "broken")


def test_jobs_are_listed_without_walking_through_them() -> None:
    class Counting(MemoryStore):
        seen = 0

        def _list(self, prefix: str, start_after: str) -> Any:
            for key in super()._list(prefix, start_after):
                self.seen += 1
                yield key

    store = Counting()
    names = ["a", "a-b", "a0", "ab", "b", "z9"]
    for name in names:
        save_job(store, job(name))
        for n in range(20):
            store.put(f"jobs/{name}/log/{n:020d}.json", b"")
    store.put("jobs/uploading/models/x.safetensors", b"")
    store.put("other/x", b"")
    assert list_jobs(store) == names
    assert store.seen == len(names) + 1
    assert list_jobs(MemoryStore()) == []


def evaluation(version: int, who: str, value: float) -> Evaluation:
    return Evaluation(job="job", version=version, who=who, num_images=3, metrics={"mAP@0.5": value}, at=AT)


def test_evaluations() -> None:
    store = MemoryStore()
    assert load_evaluation(store, "job", 2, "server") is None
    for version, who in ((10, "server"), (2, "server"), (2, "north")):
        save_evaluation(store, evaluation(version, who, 0.5))
    save_evaluation(store, evaluation(2, "server", 0.6))
    assert load_evaluation(store, "job", 2, "server") == evaluation(2, "server", 0.6)
    assert list_evaluations(store, "job") == [
        evaluation(2, "north", 0.5),
        evaluation(2, "server", 0.6),
        evaluation(10, "server", 0.5),
    ]
    assert list_evaluations(store, "other") == []


def test_the_first_reason_of_a_refusal_stays() -> None:
    store, update = MemoryStore(), update_for(b"x")
    first = Refusal(update=update, reason="layout", message="m", version=3)
    save_refusal(store, first)
    save_refusal(store, Refusal(update=update, reason="too-stale", message="m", version=9))
    assert list(list_refusals(store, "job")) == [first]
    assert list(store.list("")) == [f"jobs/job/rejected/north/{update.update_id}.json"]


def test_dead_letters_are_kept() -> None:
    store = MemoryStore()
    letters = [
        DeadLetter(
            id=new_update_id(),
            reason="malformed-message",
            message="m",
            queue="fed.updates",
            routing_key="updates.north",
            body_base64="AAAA",
            at=AT,
        )
        for _ in range(2)
    ]
    for letter in (*letters, letters[0]):
        save_dead_letter(store, letter)
    assert sorted(list_dead_letters(store), key=lambda d: d.id) == sorted(letters, key=lambda d: d.id)


@pytest.mark.parametrize(
    "listing", [lambda s: list_evaluations(s, "job"), lambda s: list(list_dead_letters(s))]
)
def test_a_broken_object_is_named(listing: Callable[[MemoryStore], object]) -> None:
    store = MemoryStore()
    store.put("jobs/job/metrics/0000000001/server.json", b"[]")
    store.put("deadletters/x.json", b"[]")
    with pytest.raises(CorruptLog, match=r"server\.json|x\.json"):
        listing(store)
