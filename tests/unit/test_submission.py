"""A job's description and models, from a request to version 0: what is checked, and that repeating it is harmless."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federation.ids import new_update_id
from federation.jobs import ModelRef
from federation.keys import job_prefix, models_prefix, updates_prefix
from federation.points import Point, watch
from federation.requests import Answer, Request, SubmitJob
from federation.settings import Settings
from federation.types import SERVER, Created, Head
from storage.audit import audit
from storage.control import announced, load_announcement
from storage.jobs import load_job
from storage.memory import MemoryStore
from storage.models import describe_upload, load_model
from storage.tensors import from_arrays
from tasks import celery
from tasks.accept import accept
from tasks.jobs import UPDATE_SLACK_BYTES
from tasks.publish import publish_pending
from tasks.requests import handle
from tests.factories import Arrays, client_update, payload_of, toy_arrays
from tests.unit.test_tasks import Worker


class Died(BaseException):
    """A worker's death."""


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def worker(store: MemoryStore, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(store, tmp_path)
    yield made
    made.broker.close()
    watch(None)


def document(**changes: Any) -> dict[str, Any]:
    """As a submitter writes it."""
    return {"id": "toy", "classes": ["thing"], "arch": "toy"} | changes


def submission(
    store: MemoryStore,
    who: str = "site-a",
    initial: Arrays | None = None,
    first: Arrays | None = None,
    **changes: Any,
) -> Request:
    """A request whose files are uploaded."""
    written = document(**changes)
    refs = []
    for arrays in (initial or toy_arrays(), first or initial or toy_arrays()):
        data = payload_of(arrays)
        refs.append(describe_upload(written["id"], who, data))
        store.put_if_absent(refs[-1].key, data)
    return request(who, SubmitJob(document=written, initial=refs[0], first=refs[1]))


def request(who: str, what: SubmitJob) -> Request:
    return Request(request_id=new_update_id(), who=who, what=what, at=datetime.now(UTC))


def submit_job(asked: Request) -> SubmitJob:
    assert isinstance(asked.what, SubmitJob)
    return asked.what


def head(worker: Worker, job: str = "toy") -> Head:
    return worker.log(job).head().head


def errors(answer: Answer) -> str:
    assert not answer.ok
    return "\n".join(answer.errors)


@pytest.mark.parametrize("who", ["site-a", SERVER])
def test_a_good_submission_becomes_a_job_that_is_announced(worker: Worker, who: str) -> None:
    asked = submission(worker.store, who, initial=toy_arrays(2.0))
    answer = handle(worker, asked)
    assert (answer.ok, answer.job, answer.who, answer.errors) == (True, "toy", who, ())
    assert "job toy" in answer.message
    job = load_job(worker.store, "toy")
    assert (job.submitted_by, job.request_id) == (who, asked.request_id)
    announcement = load_announcement(worker.store, "toy")
    assert announcement is not None
    assert (announcement.submitted_by, announcement.at) == (who, job.created_at)
    assert [type(r.event) for r in worker.log("toy").history()] == [Created]
    assert head(worker).version == 0
    model = load_model(worker.store, head(worker).current.model).arrays()
    assert np.all(model["conv.weight"] == 2)
    # the uploads are gone, and the audit misses nothing
    assert list(worker.store.list(updates_prefix("toy"))) == []
    assert list(audit(worker.store, "toy")) == []


def test_a_job_with_layers_that_stay_home_has_two_models(worker: Worker) -> None:
    whole = toy_arrays()
    exchanged = {name: array for name, array in whole.items() if name.startswith("conv")}
    plan = {"freeze": ["norm"]}
    answer = handle(worker, submission(worker.store, initial=whole, first=exchanged, plan=plan))
    assert answer.ok, answer.errors
    job = load_job(worker.store, "toy")
    first = load_model(worker.store, head(worker).current.model)
    assert set(first.arrays()) == set(exchanged)
    assert set(load_model(worker.store, job.initial).arrays()) == set(whole)
    assert job.max_update_bytes == head(worker).current.model.nbytes + UPDATE_SLACK_BYTES


def test_an_evaluation_of_version_0_is_asked_for_if_the_job_has_any(worker: Worker) -> None:
    handle(worker, submission(worker.store, evaluation={"every": 4}))
    assert worker.sent == [(celery.EVALUATE, {"job": "toy", "version": "0"})]


def test_participants_that_never_joined_anything_are_named_and_allowed(worker: Worker) -> None:
    asked = submission(worker.store, participants=["site-a", "nrth"])
    worker.store.put("sites/site-a.json", b"{}")
    answer = handle(worker, asked)
    assert answer.ok
    assert answer.message.endswith("never joined a job yet: nrth")


def test_everything_that_is_wrong_is_in_one_answer(worker: Worker) -> None:
    asked = submission(
        worker.store,
        initial={"w": np.full(3, np.nan, np.float32)},
        first={"v": np.zeros(3, np.float32)},
        classes=[],
        colour="blue",
        plan={"image_size": 3, "learning_rate": -1.0},
        stop={"max_versions": 0},
    )
    handle(worker, submission(worker.store, "site-b"))
    worker.store.delete(submit_job(asked).first.key)
    found = errors(handle(worker, asked))
    for field in (
        "classes:",
        "colour:",
        "plan.image_size:",
        "plan.learning_rate:",
        "stop.max_versions:",
        "id: there is a job 'toy' already, of site-b",
        "initial: tensor 'w' holds NaN",
        "first: jobs/toy/updates/site-a/",
    ):
        assert sum(line.startswith(field) for line in found.splitlines()) == 1, (field, found)
    assert load_job(worker.store, "toy").submitted_by == "site-b"


def test_what_does_not_fit_together_is_found_all_at_once(worker: Worker) -> None:
    asked = submission(
        worker.store,
        classes=["a", "a"],
        participants=["site-a", "site-a"],
        participation={"min_sites": 3, "mode": "invited"},
        aggregation={"strategy": "fedavg"},
        stop={"target": 1.5, "patience": 3},
        evaluation={"max_drop": 0.1},
    )
    answer = handle(worker, asked)
    assert [error.partition(":")[0] for error in answer.errors] == [
        "classes",
        "participants",
        "participation.min_sites",
        "participation.mode",
        "stop.target",
        "stop.patience",
        "evaluation.max_drop",
        "stop.target",
    ]
    # nothing is left of it
    assert list(worker.store.list(job_prefix("toy"))) == []
    assert list(announced(worker.store)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stop": {"deadline": "2020-01-01T00:00:00Z"}}, "stop.deadline: .* is over"),
        ({"stop": {"deadline": "2030-01-01T00:00:00"}}, "stop.deadline: .*timezone"),
        ({"plan": {"freeze": ["norm"]}}, "plan.freeze: frozen, and yet .*norm.weight"),
        ({"plan": {"freeze": ["head"]}}, "plan.freeze: the model has no layer 'head'"),
        ({"schema_version": 2}, "schema_version:"),
        ({"weights": "backbone.pth"}, "weights:"),
        ({"evaluation": {"metric": "mAP\n0.5"}}, "evaluation.metric:"),
        ({"classes": [f"c{i}" for i in range(1001)]}, "classes:.*1000"),
    ],
)
def test_a_mistake_is_named_with_its_field(worker: Worker, changes: dict[str, Any], expected: str) -> None:
    found = errors(handle(worker, submission(worker.store, **changes)))
    assert re.search(expected, found), found


# --- files that are not what they should be -----------------------------------------------------------------


def test_a_model_holds_no_moments(worker: Worker) -> None:
    arrays = toy_arrays()
    arrays |= {f"{n}.exp_avg": arrays[n] for n in ("conv.weight", "norm.weight", "norm.bias")}
    found = errors(handle(worker, submission(worker.store, initial=arrays)))
    assert "initial: names that are kept for the moments of optimisers: conv.weight.exp_avg" in found


def test_an_update_may_be_as_large_as_its_moments_make_it(worker: Worker) -> None:
    handle(worker, submission(worker.store, plan={"optimizer_state": "shared"}))
    job = load_job(worker.store, "toy")
    sent = from_arrays(toy_arrays()).layout.with_moments(2)
    assert job.max_update_bytes > sent.nbytes
    worker.settings = Settings(max_update_bytes=2000)
    found = errors(handle(worker, submission(worker.store, id="toy2", plan={"optimizer_state": "shared"})))
    assert re.search(r"plan\.optimizer_state: .* this server reads at most 2000", found), found


def test_nobody_can_make_a_model_of_what_others_uploaded(worker: Worker) -> None:
    """It would be copied to where every site may read it."""
    payload = payload_of(toy_arrays(9.0))
    others = client_update(payload, site="site-b", job="toy")
    worker.store.put_if_absent(others.payload_key, payload)
    ref = ModelRef(key=others.payload_key, sha256=others.payload_sha256, nbytes=others.payload_bytes)
    found = errors(handle(worker, request("site-a", SubmitJob(document=document(), initial=ref, first=ref))))
    assert found.count("its key must be jobs/toy/updates/site-a/") == 2
    assert list(worker.store.list(models_prefix("toy"))) == []
    assert worker.store.size(others.payload_key) == len(payload)


@pytest.mark.parametrize(
    "key",
    [
        "jobs/toy/job.json",
        "jobs/other/updates/site-a/{id}.safetensors",
        "jobs/toy/updates/site-a/x.safetensors",
        "jobs/toy/updates/site-a/../site-b/{id}.safetensors",
        "answers/site-a/{id}.json",
    ],
)
def test_a_key_that_is_no_upload_of_this_job_is_neither_read_nor_deleted(worker: Worker, key: str) -> None:
    key = key.format(id=new_update_id())
    if ".." not in key:
        worker.store.put(key, b"not yours")
    ref = ModelRef(key=key, sha256="0" * 64, nbytes=9)
    answer = handle(
        worker, request("site-a", SubmitJob(document=document(id="toy2"), initial=ref, first=ref))
    )
    assert all("its key must be jobs/toy2/updates/site-a/" in error for error in answer.errors)
    if not key.startswith(
        "jobs/other/"
    ):  # that is an upload of this site's own, of a job that there is none of
        assert ".." in key or worker.store.size(key)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda ref: ref.model_copy(update={"nbytes": ref.nbytes + 1}), "declared are"),
        (lambda ref: ref.model_copy(update={"sha256": "0" * 64}), "declared is 0000"),
        (lambda ref: ref.model_copy(update={"nbytes": 2 << 30}), "at most 1073741824 are read"),
    ],
)
def test_a_file_that_is_not_as_declared_is_refused_and_says_so(
    worker: Worker, spoil: Callable[[ModelRef], ModelRef], expected: str
) -> None:
    good = submit_job(submission(worker.store))
    found = errors(handle(worker, request("site-a", good.model_copy(update={"first": spoil(good.first)}))))
    assert found.startswith("first: ")
    assert expected in found


def test_a_model_too_large_for_this_server_is_refused_unread(store: MemoryStore, worker: Worker) -> None:
    worker.settings = Settings(max_update_bytes=1024)
    asked = submission(store, initial={"w": np.zeros(500, np.float32)})
    found = errors(handle(worker, asked))
    assert found.startswith("initial: ")
    assert f"{submit_job(asked).initial.nbytes} bytes, at most 1024 are read" in found


def test_a_first_version_must_be_part_of_the_model(worker: Worker) -> None:
    first = {**toy_arrays(), "conv.weight": np.zeros(3, np.float32), "more": np.zeros(1, np.float32)}
    (error,) = handle(worker, submission(worker.store, initial=toy_arrays(), first=first)).errors
    assert error == "first: not in the initial model, or of another type or shape: conv.weight, more"


# --- once ---------------------------------------------------------------------------------------------------


class DyingStore(MemoryStore):
    """Dies before its `moment`-th change."""

    def __init__(self) -> None:
        super().__init__()
        self.moment = -1

    def _live(self) -> None:
        self.moment -= 1
        if self.moment == 0:
            raise Died

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self._live()
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        self._live()
        return super().put_if_absent(key, data)

    def delete(self, key: str) -> None:
        self._live()
        super().delete(key)


def test_wherever_a_worker_dies_the_next_one_finishes(tmp_path: Path) -> None:
    deaths = 0
    for moment in range(1, 100):
        store = DyingStore()
        asked = submission(
            store, initial=toy_arrays(1.0), first={"conv.weight": toy_arrays(1.0)["conv.weight"]}
        )
        store.moment = moment
        workers = [Worker(store, tmp_path) for _ in range(2)]
        try:
            handle(workers[0], asked)
        except Died:
            deaths += 1
        else:
            break
        finally:
            store.moment = -1
        answer = handle(workers[1], asked)
        assert answer.ok, (moment, answer.errors)
        assert [type(r.event) for r in workers[1].log("toy").history()] == [Created]
        assert [*announced(store)] == ["toy"]
        assert [*store.list(updates_prefix("toy"))] == []
        assert len([*store.list(models_prefix("toy"))]) == 2
        assert list(audit(store, "toy")) == []
        for worker in workers:
            worker.broker.close()
    assert deaths == 8  # two models, job.json, log, announcement, answer, two uploads


def test_a_refusal_is_the_same_when_its_message_comes_again(tmp_path: Path) -> None:
    for moment in (1, 2):  # the answer, the upload
        store = DyingStore()
        asked = submission(store, classes=[])
        store.moment = moment
        worker = Worker(store, tmp_path)
        with pytest.raises(Died):
            handle(worker, asked)
        store.moment = -1
        assert errors(handle(worker, asked)).startswith("classes: ")
        assert [*store.list("jobs/")] == []
        worker.broker.close()


def test_a_request_again_changes_nothing_and_the_same_job_again_is_another_request(worker: Worker) -> None:
    asked = submission(worker.store)
    first = handle(worker, asked)
    assert handle(worker, asked) == first
    before = {key: worker.store.get(key, max_bytes=1 << 20) for key in worker.store.list("")}
    found = errors(handle(worker, submission(worker.store)))
    assert found == "id: there is a job 'toy' already, of site-a: choose another"
    after = {key: worker.store.get(key, max_bytes=1 << 20) for key in worker.store.list("")}
    assert {key: after[key] for key in before} == before


def test_of_two_that_race_for_an_id_one_wins_and_the_other_is_told(
    store: MemoryStore, worker: Worker, tmp_path: Path
) -> None:
    """The second comes when the first has looked, and not yet written."""
    mine, theirs = submission(store, "site-a"), submission(store, "site-b", initial=toy_arrays(3.0))
    other = Worker(store, tmp_path)
    answers: list[Answer] = []

    def meanwhile(point: Point) -> None:
        if point is Point.MODELS_COPIED:
            watch(None)
            answers.append(handle(other, theirs))

    watch(meanwhile)
    answers.append(handle(worker, mine))
    other.broker.close()
    assert [answer.ok for answer in answers] == [True, False]
    assert answers[1].errors == ("id: there is a job 'toy' already, of site-b: choose another",)
    assert load_job(store, "toy").submitted_by == "site-b"
    model = load_model(store, head(worker).current.model).arrays()
    assert np.all(model["conv.weight"] == 3)
    assert [f for f in audit(store, "toy") if f.level == "error"] == []


def test_a_request_that_comes_again_deletes_no_update(worker: Worker) -> None:
    """A site may give an update the id of a file that it submitted."""
    asked = submission(worker.store)
    handle(worker, asked)
    payload = payload_of(toy_arrays(1.0))
    update_id = submit_job(asked).first.key.rpartition("/")[2].removesuffix(".safetensors")
    update = client_update(payload, update_id=update_id, job="toy", site="site-a")
    worker.store.put_if_absent(update.payload_key, payload)
    accept(worker, update)
    handle(worker, asked)
    publish_pending(worker, load_job(worker.store, "toy"))
    assert head(worker).version == 1
    assert [f for f in audit(worker.store, "toy") if f.level == "error"] == []


def test_a_refused_submission_deletes_no_update_of_the_job_that_is_there(worker: Worker) -> None:
    handle(worker, submission(worker.store, "site-b"))
    payload = payload_of(toy_arrays(1.0))
    update = client_update(payload, job="toy", site="site-a")
    worker.store.put_if_absent(update.payload_key, payload)
    accept(worker, update)
    publish_pending(worker, load_job(worker.store, "toy"))
    ref = ModelRef(key=update.payload_key, sha256=update.payload_sha256, nbytes=update.payload_bytes)
    handle(worker, request("site-a", SubmitJob(document=document(), initial=ref, first=ref)))
    assert [f for f in audit(worker.store, "toy") if f.level == "error"] == []
