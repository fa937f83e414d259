"""Which version is the best: from the server's figures, else from the sites' where they can be compared."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from federation.best import Best, best_of
from federation.errors import BadMessage, NotFound
from federation.jobs import EvaluationPolicy, Job, ModelRef
from federation.types import SERVER, Evaluation, Head, ModelVersion
from storage.channels import best_version
from storage.jobs import list_evaluations, save_evaluation, save_job
from storage.log import VersionLog
from storage.memory import MemoryStore
from tests.factories import job_spec

MAP_50 = "mAP@0.5"


def measured(version: int, who: str, value: float, images: int = 10, metric: str = MAP_50) -> Evaluation:
    return Evaluation(
        job="toy",
        version=version,
        who=who,
        num_images=images,
        metrics={metric: value},
        at=datetime(2026, 5, 1, tzinfo=UTC),
    )


def best(*evaluations: Evaluation) -> int | None:
    found = best_of(evaluations, MAP_50)
    return None if found is None else found.version


def test_nothing_measured_is_no_best() -> None:
    assert best() is None
    assert best(measured(4, "north", 0.5, metric="accuracy"), measured(4, "north", 0.5, images=0)) is None


def test_the_highest_of_the_server_and_of_equal_ones_the_newest() -> None:
    assert best(measured(4, SERVER, 0.5), measured(8, SERVER, 0.7), measured(12, SERVER, 0.6)) == 8
    assert best(measured(12, SERVER, 0.7), measured(8, SERVER, 0.7)) == 12


def test_the_server_alone_counts_where_it_has_measured() -> None:
    found = best_of([measured(4, SERVER, 0.2), measured(8, "north", 0.9)], MAP_50)
    assert found == Best(4, MAP_50, 0.2, (SERVER,))


def test_the_sites_mean_is_weighted_by_images() -> None:
    four = [measured(4, "north", 0.9, images=10), measured(4, "harbour", 0.4, images=90)]
    eight = [measured(8, "north", 0.5, images=10), measured(8, "harbour", 0.5, images=90)]
    found = best_of([*eight, *four], MAP_50)
    assert found is not None
    assert (found.version, found.who) == (8, ("harbour", "north"))
    assert found.value == pytest.approx(0.5)
    assert best(*four, measured(8, "north", 0.1, 10), measured(8, "harbour", 0.48, 90)) == 4  # 0.45 > 0.442


def test_a_version_is_compared_over_the_sites_that_measured_both() -> None:
    """Whoever has easy images would otherwise decide by being away."""
    three = [measured(4, site, value) for site, value in (("a", 0.9), ("b", 0.5), ("c", 0.5))]
    assert best(*three, measured(8, "b", 0.6), measured(8, "c", 0.6)) == 8  # its mean is lower: 0.6 < 0.63
    assert best(*three, measured(8, "a", 0.8), measured(8, "b", 0.5)) == 4  # its mean is higher: 0.65


def test_a_version_that_few_measured_does_not_win() -> None:
    three = [measured(4, site, 0.5) for site in ("a", "b", "c")]
    assert best(*three, measured(8, "a", 0.9)) == 4
    assert best(*three, measured(8, "stranger", 0.9, images=1000)) == 4
    assert best(*three, measured(8, "a", 0.9, images=60)) == 8  # it has most of the images by now


def test_best_version_goes_by_the_metric_of_the_job() -> None:
    store = MemoryStore()
    ref = ModelRef(key="jobs/toy/models/x", sha256="0" * 64, nbytes=1)
    spec = job_spec(evaluation=EvaluationPolicy(metric="accuracy"))
    save_job(store, Job(spec=spec, initial=ref, max_update_bytes=1, created_at=datetime.now(UTC)))
    VersionLog(store, "toy").create(Head(current=ModelVersion(version=0, model=ref)))
    assert best_version(store, "toy") is None
    for version, (value, accuracy) in {1: (0.9, 0.1), 2: (0.1, 0.9)}.items():
        both = {MAP_50: value, "accuracy": accuracy}
        save_evaluation(store, measured(version, SERVER, 0.0).model_copy(update={"metrics": both}))
    assert best_version(store, "toy") == Best(2, "accuracy", 0.9, (SERVER,))
    with pytest.raises(NotFound):
        best_version(store, "another")


def test_an_evaluation_of_an_older_release_is_read() -> None:
    store = MemoryStore()
    old = (
        b'{"schema_version":1,"job":"toy","version":4,"who":"server","num_images":191,'
        b'"metrics":{"mAP@0.5":0.5,"mAP@[.5:.95]":0.25},"per_class":{"chair":0.5,"cart":0.0},"at":"2026-05-01T00:00:00Z"}'
    )
    store.put("jobs/toy/metrics/0000000004/server.json", old)
    (read,) = list_evaluations(store, "toy")
    assert read.per_class == {"mAP@[.5:.95]": {"chair": 0.5, "cart": 0.0}}
    assert Evaluation.from_json(read.to_json()) == read


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {MAP_50: 1.01}},
        {"metrics": {"VOC2010 mAP@0.5": -0.1}},
        {"per_class": {MAP_50: {"chair": 40.0}}},
        {"per_class": {MAP_50: {"chair": 0.4}, "x": 0.5}},
        {"num_images": -1},
    ],
)
def test_an_evaluation_that_cannot_be(changes: dict[str, object]) -> None:
    fields = measured(1, SERVER, 0.5).model_dump(mode="json") | changes
    with pytest.raises(BadMessage):
        Evaluation.from_json(json.dumps(fields), BadMessage)


@pytest.mark.parametrize(
    ("every", "previous", "version", "closed", "due"),
    [
        (0, 0, 8, True, False),
        (4, 3, 4, False, True),
        (4, 2, 5, False, True),
        (4, 4, 7, False, False),
        (4, 4, 7, True, True),
        (1, 6, 7, False, True),
    ],
)
def test_what_is_due(every: int, previous: int, version: int, closed: bool, due: bool) -> None:
    assert EvaluationPolicy(every=every).server_due(previous, version, closed) is due
    assert EvaluationPolicy(sites_every=every).sites_due(previous, version, closed) is due
    assert not EvaluationPolicy(every=every).sites_due(previous, version, closed)
