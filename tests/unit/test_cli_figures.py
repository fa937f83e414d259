"""What commands say about measurements: who measured what, and which version is the best."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.sqlite import SqliteBroker
from cli.main import app
from federation.jobs import EvaluationPolicy
from federation.settings import Settings
from federation.types import SERVER, Evaluation
from storage.folder import FolderStore
from storage.jobs import save_evaluation
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.context import Context
from tasks.jobs import create
from tasks.publish import publish_pending
from tests.factories import client_update, job_spec, payload_of, toy_arrays

WHEN = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FolderStore]:
    """Job toy of classes cart and chair at version 4."""
    store = FolderStore(tmp_path / "store")
    broker = SqliteBroker(tmp_path / "queue.db")
    broker.declare()
    context = Context(Settings(), store, broker, lambda name, arguments: None)
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    spec = job_spec(classes=("cart", "chair"), evaluation=EvaluationPolicy(sites_every=2))
    job = create(context, spec, ref, ref)
    for base in range(4):
        payload = payload_of(toy_arrays(float(base + 1)))
        update = client_update(payload, base_version=base)
        store.put(update.payload_key, payload)
        accept(context, update)
        publish_pending(context, job)
    yield store
    broker.close()


def measure(store: FolderStore, version: int, who: str, value: float, images: int = 10) -> None:
    metrics = {"mAP@0.5": value, "VOC2010 mAP@0.5": value / 2}
    per_class = {"mAP@0.5": {"cart": value, "chair": 0.125}, "VOC2010 mAP@0.5": {"cart": 0.0625}}
    save_evaluation(
        store,
        Evaluation(
            job="toy",
            version=version,
            who=who,
            num_images=images,
            metrics=metrics,
            per_class=per_class,
            at=WHEN,
        ),
    )


def says(store: FolderStore, tmp_path: Path, *command: str, code: int = 0) -> list[list[str]]:
    """The words of each line."""
    result = CliRunner().invoke(app, [*command, "--store-url", f"file:{tmp_path / 'store'}"])
    assert result.exit_code == code, result.output
    return [line.split() for line in result.output.splitlines()]


def test_list_shows_the_server_and_each_site_and_marks_versions(store: FolderStore, tmp_path: Path) -> None:
    measure(store, 2, "north", 0.75)
    measure(store, 2, "harbour", 0.25)
    measure(store, 4, "north", 0.5)
    lines = says(store, tmp_path, "model", "list", "toy")
    assert lines[0][:8] == ["version", "made", "(UTC)", "updates", "mAP@0.5,", "harbour", "north", "bytes"]
    rows = {line[0]: line for line in lines[1:]}
    assert rows["2"][1] == "best"
    assert rows["2"][5:7] == ["0.250", "0.750"]
    assert rows["4"][1] == "latest"
    assert "0.500" in rows["4"]
    measure(store, 1, SERVER, 0.1)
    rows = {line[0]: line for line in says(store, tmp_path, "model", "list", "toy")}
    assert rows["1"][1] == "best", "where the server has measured, its figures count"


def test_many_sites_are_one_column(store: FolderStore, tmp_path: Path) -> None:
    for i in range(8):
        measure(store, 2, f"site-{i}", 0.5 if i else 0.25, images=30 if i else 70)
    lines = says(store, tmp_path, "model", "list", "toy")
    assert lines[0][4:8] == ["mAP@0.5,", "mean", "of", "sites"]
    assert {line[0]: line for line in lines}["2"][5:8] == ["0.438", "of", "8"]


def test_status_shows_the_newest_measured_versions_and_the_best(store: FolderStore, tmp_path: Path) -> None:
    assert not any("mAP@0.5," in line for line in says(store, tmp_path, "job", "status", "toy"))
    for version, value in {0: 0.9, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}.items():
        measure(store, version, "north", value)
    rows = [line for line in says(store, tmp_path, "job", "status", "toy") if line and line[0] in "01234"]
    assert rows[0] == ["0", "best", "0.900"]
    assert rows[4] == ["4", "latest", "0.400"]


def test_metrics_shows_means_and_classes_by_who(store: FolderStore, tmp_path: Path) -> None:
    measure(store, 2, "north", 0.75)
    measure(store, 4, "north", 0.5, images=30)
    measure(store, 4, SERVER, 0.25, images=191)
    lines = says(store, tmp_path, "model", "metrics", "toy")
    assert lines[0] == ["toy", "version", "4"]
    assert lines[1] == ["the", "best", "is", "version", "4:", "mAP@0.5", "0.250,", "by", "the", "server"]
    assert ["server", "191", "0.250", "0.125", "2026-05-01", "00:00:00"] in lines
    assert ["north", "30", "0.500", "0.250", "2026-05-01", "00:00:00"] in lines
    assert ["mAP@0.5", "of", "class", "server", "north"] in lines
    assert ["cart", "0.250", "0.500"] in lines
    assert ["chair", "0.125", "0.125"] in lines

    lines = says(store, tmp_path, "model", "metrics", "toy", "--version", "2", "--metric", "VOC2010 mAP@0.5")
    assert ["cart", "0.062"] in lines
    assert not any(line[:1] == ["chair"] for line in lines)


def test_metrics_says_what_there_is_instead(store: FolderStore, tmp_path: Path) -> None:
    def refusal(*options: str) -> str:
        return " ".join(
            word for line in says(store, tmp_path, "model", "metrics", *options, code=1) for word in line
        )

    assert "sites_every" in refusal("toy")
    measure(store, 2, "north", 0.75)
    assert "measured are: 2" in refusal("toy", "--version", "3")
    assert "VOC2010 mAP@0.5, mAP@0.5" in refusal("toy", "--metric", "accuracy")
    assert "there are: toy" in refusal("toys")


def test_names_that_a_site_gave_its_measures_are_shown_as_they_are(
    store: FolderStore, tmp_path: Path
) -> None:
    measured = Evaluation(
        job="toy",
        version=4,
        who="north",
        num_images=10,
        metrics={"mAP@0.5": 0.5, "[/b]": 3.0, "[red]": 4.0},
        per_class={"[/b]": {"cart": 2.0}},
        at=WHEN,
    )
    save_evaluation(store, measured)
    words = [word for line in says(store, tmp_path, "model", "metrics", "toy") for word in line]
    assert {"[/b]", "[red]"} <= {*words}
    assert ["[/b]", "of", "class", "north"] in says(
        store, tmp_path, "model", "metrics", "toy", "--metric", "[/b]"
    )
