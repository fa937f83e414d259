"""Models for use: asked anew while the store answers, verified from disk while it does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from federation.errors import BadJob, NotFound, StoreUnavailable
from federation.jobs import Job, ModelRef, TrainingPlan
from federation.types import Evaluation, Head, ModelVersion, Published
from producers.offline import KEPT_MODELS, OfflineModels, Pulled
from storage.blob import BlobStore
from storage.channels import check_wanted
from storage.jobs import save_evaluation, save_job
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import save_model
from storage.tensors import from_arrays
from tests.factories import job_spec, payload_of, toy_arrays

URL = "s3://store.example:9000/fedqueue"
NORM = [name for name in toy_arrays() if name.startswith("norm.")]


class Federation:
    """A job in a store that can go away: version v has weights v (without norm layers, if those stay home)."""

    def __init__(self, norm: str = "average") -> None:
        self.store, self.norm, self.asked = MemoryStore(), norm, 0
        self.away = False
        self.initial = save_model(self.store, "toy", from_arrays(toy_arrays(0.0)))
        spec = job_spec(plan=TrainingPlan.from_json(f'{{"norm": "{norm}"}}'))
        self.job = Job(
            spec=spec, initial=self.initial, max_update_bytes=1 << 20, created_at=datetime.now(UTC)
        )
        assert save_job(self.store, self.job)
        self.log = VersionLog(self.store, "toy")
        self.log.create(Head(current=self.version(0)))

    def version(self, number: int) -> ModelVersion:
        arrays = toy_arrays(float(number))
        sent = {n: a for n, a in arrays.items() if self.norm == "average" or n not in NORM}
        return ModelVersion(version=number, model=save_model(self.store, "toy", from_arrays(sent)))

    def publish(self, number: int) -> ModelRef:
        current = self.version(number)
        self.log.append(self.log.head(), Published(merged=()), Head(current=current))
        return current.model

    def measure(self, version: int, value: float) -> None:
        evaluation = Evaluation(
            job="toy",
            version=version,
            who="server",
            num_images=5,
            metrics={"mAP@0.5": value},
            at=datetime.now(UTC),
        )
        save_evaluation(self.store, evaluation)

    def connect(self) -> BlobStore:
        self.asked += 1
        if self.away:
            raise StoreUnavailable("no answer")
        return self.store


@pytest.fixture
def federation() -> Federation:
    return Federation()


@pytest.fixture
def pull(federation: Federation, tmp_path: Path) -> Callable[[str], Pulled]:
    """A new process each time: nothing is remembered but on disk."""

    def pull(wanted: str = "latest") -> Pulled:
        return models(tmp_path).pull(wanted, federation.connect)

    return pull


def models(folder: Path, url: str = URL) -> OfflineModels:
    return OfflineModels(url, "toy", folder / "cache", folder / "site")


def weight(pulled: Pulled) -> float:
    return float(pulled.weights["conv.weight"].flat[0])


def cached(folder: Path, pulled: Pulled) -> Path:
    (path,) = (folder / "cache").rglob(f"{pulled.sha256}.safetensors")
    return path


def test_latest_is_asked_anew_and_means_the_last_answer_while_the_store_is_away(
    federation: Federation, pull: Callable[[str], Pulled]
) -> None:
    federation.publish(1)
    assert (pull("latest").version, weight(pull("latest"))) == (1, 1.0)
    federation.publish(2)
    online = pull("latest")
    assert (online.version, weight(online), online.away) == (2, 2.0, "")
    federation.publish(3)
    federation.away = True
    offline = pull("latest")
    assert (offline.version, weight(offline)) == (2, 2.0)
    assert "no answer" in offline.away
    assert offline.answer == online.answer
    assert offline.job == federation.job, "job.json is needed, too"
    assert weight(pull("2")) == 2.0, "the same version by its number"
    federation.away = False
    assert pull("latest").version == 3


def test_best_is_the_best_that_was_measured_when_the_store_answered(
    federation: Federation, pull: Callable[[str], Pulled]
) -> None:
    with pytest.raises(NotFound, match="measured"):
        pull("best")
    for version, value in ((1, 0.4), (2, 0.7), (3, 0.6)):
        federation.publish(version)
        federation.measure(version, value)
    best = pull("best")
    assert (best.version, weight(best)) == (2, 2.0)
    assert "0.700" in best.answer.reason
    federation.measure(3, 0.9)
    federation.away = True
    assert pull("best").version == 2
    federation.away = False
    assert pull("best").version == 3


def test_what_was_never_pulled_is_refused_with_what_there_is(
    federation: Federation, pull: Callable[[str], Pulled]
) -> None:
    federation.away = True
    with pytest.raises(StoreUnavailable, match="nothing to use without it"):
        pull("latest")
    federation.away = False
    federation.publish(1)
    pull("latest")
    federation.away = True
    with pytest.raises(StoreUnavailable, match=r"no answer.*version best was not pulled.*latest \(1\)"):
        pull("best")


def test_another_stores_job_of_the_same_name_is_another_job(
    federation: Federation, pull: Callable[[str], Pulled], tmp_path: Path
) -> None:
    pull("latest")
    federation.away = True
    with pytest.raises(StoreUnavailable, match="nothing to use"):
        models(tmp_path, "s3://other.example/fedqueue").pull("latest", federation.connect)


def test_a_job_that_was_made_anew_forgets_the_old_ones_versions(
    federation: Federation, pull: Callable[[str], Pulled], tmp_path: Path
) -> None:
    federation.publish(7)
    pull("7")
    pull("latest")
    anew = Federation()
    models(tmp_path).pull("latest", anew.connect)
    anew.away = True
    with pytest.raises(StoreUnavailable, match=r"only latest \(0\)"):
        models(tmp_path).pull("7", anew.connect)


@pytest.mark.parametrize("change", [b"", b"tampered", None], ids=["empty", "longer", "one byte"])
def test_a_changed_model_is_downloaded_again_or_not_used(
    federation: Federation, pull: Callable[[str], Pulled], tmp_path: Path, change: bytes | None
) -> None:
    federation.publish(1)
    file = cached(tmp_path, pull("latest"))
    good = file.read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1]) if change is None else change
    file.write_bytes(bad)
    federation.away = True
    with pytest.raises(StoreUnavailable, match="damaged"):
        pull("latest")
    assert file.read_bytes() == bad, "what somebody did is not hidden"
    federation.away = False
    assert weight(pull("latest")) == 1.0
    assert file.read_bytes() == good
    federation.away = True
    assert weight(pull("latest")) == 1.0


def test_a_broken_note_is_written_anew_and_refused_while_the_store_is_away(
    federation: Federation, pull: Callable[[str], Pulled], tmp_path: Path
) -> None:
    pull("latest")
    (note,) = tmp_path.rglob("known.json")
    note.write_text('{"schema_version": 1}')
    federation.away = True
    with pytest.raises(StoreUnavailable, match=r"known\.json"):
        pull("latest")
    federation.away = False
    pull("latest")
    federation.away = True
    assert pull("latest").version == 0


def test_the_cache_is_bounded_and_promises_only_what_it_has(
    federation: Federation, pull: Callable[[str], Pulled], tmp_path: Path
) -> None:
    for version in range(1, KEPT_MODELS + 3):
        federation.publish(version)
        pull(str(version))
    assert len(list(tmp_path.rglob("*.safetensors"))) == KEPT_MODELS
    federation.away = True
    newest = pull(str(KEPT_MODELS + 2))
    assert weight(newest) == KEPT_MODELS + 2
    with pytest.raises(StoreUnavailable, match="version 1 was not pulled before, only"):
        pull("1")


def test_norm_layers_of_the_site_itself_are_used_where_they_stay_home(tmp_path: Path) -> None:
    federation = Federation(norm="local")
    federation.publish(1)
    plain = models(tmp_path).pull("latest", federation.connect)
    assert not plain.own_norm
    assert plain.weights["norm.bias"].flat[0] == 0.0, "of the initial model"
    (tmp_path / "site").mkdir()
    own = {name: array for name, array in toy_arrays(5.0).items() if name in NORM}
    (tmp_path / "site" / "norm.safetensors").write_bytes(payload_of(own))
    for away in (False, True):
        federation.away = away
        pulled = models(tmp_path).pull("latest", federation.connect)
        assert pulled.own_norm
        assert pulled.weights["norm.bias"].flat[0] == 5.0
        assert weight(pulled) == 1.0


def test_a_missing_job_or_version_is_no_outage(
    federation: Federation, pull: Callable[[str], Pulled], tmp_path: Path
) -> None:
    pull("latest")
    with pytest.raises(NotFound, match="no stored version 9"):
        pull("9")
    federation.store.delete(federation.publish(1).key)
    with pytest.raises(NotFound, match="fedqueue replay toy --to 1"):
        pull("latest")
    with pytest.raises(NotFound, match="no job 'toy'"):
        models(tmp_path).pull("latest", MemoryStore)
    with pytest.raises(BadJob):
        OfflineModels(URL, "../toy", tmp_path, tmp_path)


@pytest.mark.parametrize(("text", "wanted"), [("Latest", "latest"), (" best ", "best"), ("007", "7")])
def test_versions_as_they_may_be_asked_for(text: str, wanted: str) -> None:
    assert check_wanted(text) == wanted


@pytest.mark.parametrize("text", ["", "newest", "-1", "1.5", "１"])
def test_versions_as_they_may_not(text: str) -> None:
    with pytest.raises(ValueError, match="latest, best, stable or a number"):
        check_wanted(text)
