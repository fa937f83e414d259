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
from federation.keys import job_prefix, updates_prefix
from federation.points import watch
from federation.requests import Answer, Request, SubmitJob
from federation.types import SERVER, Created, Head
from storage.audit import audit
from storage.control import announced, load_announcement
from storage.jobs import load_job
from storage.memory import MemoryStore
from storage.models import describe_upload, load_model
from tasks import celery
from tasks.jobs import UPDATE_SLACK_BYTES
from tasks.requests import handle
from tests.factories import Arrays, payload_of, toy_arrays
from tests.unit.test_tasks import Worker

Change = Callable[[dict[str, Any]], object]


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
