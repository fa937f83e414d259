"""docs/custom-models.md as it stands: its code is run, by the real commands, until the job closes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.initial import first_weights
from cli.main import app
from federation import plugins
from federation.errors import BadJob
from federation.jobs import EvaluationPolicy, JobSpec, StopRule, TrainingPlan
from federation.types import Evaluation, Published
from producers.agent import SiteAgent
from producers.custom_trainer import CustomTraining
from producers.detection_trainer import DetectionTrainer
from storage.channels import best_version
from storage.jobs import list_evaluations, load_job
from storage.log import VersionLog
from storage.models import load_full_model
from tasks.context import open_context
from tasks.evaluate import evaluate
from tests.integration.servers import ROOT, Server, embedded, running, until
from tests.integration.test_site_agent import merged_ids, site_settings

CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "custom-models.md").read_text(), re.S)
DETECTOR, CLASSIFIER, FIRST_WEIGHTS = CODE
JOB = """
id = "bright"
classes = ["dark", "bright"]
arch = "our-classifier"
[plan]
batch_size = 16
local_steps = 30
learning_rate = 0.1
[aggregation]
alpha = 0.8
[stop]
max_versions = 6
[evaluation]
sites_every = 2
metric = "accuracy"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(embedded(tmp_path_factory.mktemp("server"))) as started:
        yield started


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the document's package in it, importable here and in child processes."""
    package = tmp_path / "our_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "detector.py").write_text(DETECTOR)
    (package / "classifier.py").write_text(CLASSIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plugins.allow(())
    for name in [name for name in sys.modules if name.partition(".")[0] == "our_models"]:
        del sys.modules[name]


def accuracy(arrays: Mapping[str, Any]) -> float:
    """Of a version of the classifier, on the document's images."""
    import torch
    from our_models import classifier  # type: ignore[import-not-found]

    network = classifier.model()
    network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    images, labels = classifier.local_images()
    with torch.inference_mode():
        return float((network.eval()(images).argmax(1) == labels).float().mean())


def reports(server: Server) -> list[Evaluation]:
    return list_evaluations(server.store, "bright")


def test_an_image_classifier_is_trained_by_two_sites_until_its_job_closes(
    server: Server, models: Path
) -> None:
    subprocess.run([sys.executable, "-c", FIRST_WEIGHTS], check=True, timeout=60)
    (models / "job.toml").write_text(JOB)
    environment = server.environment
    result = CliRunner().invoke(app, ["job", "submit", "job.toml", "--weights", "first.pth"], env=environment)
    assert result.exit_code == 0, result.output
    assert "--trainer" in result.output
    assert "most 'accuracy'" in result.output
    command = [sys.executable, "-m", "cli.main", "site", "run", "--job", "bright"]
    sites = {
        site: subprocess.Popen(
            [*command, "--site", site, "--state", site, "--trainer", "our_models.classifier:Trainer"],
            env={**os.environ, **environment, "FEDQUEUE_POLL_S": "0.1", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for site in ("site-a", "site-b")
    }
    for site in sites.values():
        _, log = site.communicate(timeout=120)
        assert site.returncode == 0, log
    head = server.head("bright")
    assert head is not None
    assert head.closed
    assert head.version == 6
    assert len(merged_ids(server, "bright")) == 6
    job = load_job(server.store, "bright")
    first = load_full_model(server.store, job, job.initial).arrays()
    last = load_full_model(server.store, job, head.current.model).arrays()
    assert int(last["1.num_batches_tracked"]) > 0
    assert accuracy(first) < 0.8
    assert accuracy(last) > 0.95
    last_reports = {(6, "site-a"), (6, "site-b")}
    until(
        "the reports on the last version",
        lambda: last_reports <= {(e.version, e.who) for e in reports(server)},
    )
    # two updates that are merged in one publish leave out a version: then the next one stored is due
    stored = [
        r.head.version for r in VersionLog(server.store, "bright").history() if isinstance(r.event, Published)
    ]
    due = {after for before, after in pairwise([0, *stored]) if after // 2 > before // 2}
    assert {e.version for e in reports(server)} <= due
    assert {e.num_images for e in reports(server)} == {64}
    best = best_version(server.store, "bright")
    assert best is not None
    assert best.metric == "accuracy"
    assert best.value > 0.9
    shown = CliRunner().invoke(app, ["model", "metrics", "bright"], env=environment)
    assert "accuracy" in shown.output


def test_a_trainer_of_ones_own_for_a_built_in_detector(server: Server) -> None:
    """It rounds half of every weight down; nothing else of the pipeline differs from the built-in training."""

    class Halve:
        def train(
            self, weights: dict[str, Any], plan: TrainingPlan
        ) -> tuple[dict[str, Any], int, dict[str, float]]:
            for array in weights.values():
                array //= 2
            return weights, 5, {"loss": 0.25}

    spec = JobSpec(
        id="halved", classes=("a",), plan=TrainingPlan(image_size=64), stop=StopRule(max_versions=1)
    )
    arrays = dict(first_weights(spec, None).arrays)
    server.create_job(spec, arrays)
    settings = site_settings(server, "site-a")
    stop = threading.Event()
    trainer = CustomTraining("halve", Halve())
    agent = SiteAgent(
        settings, ["halved"], server.store, lambda: server.as_site("site-a"), lambda spec: trainer, stop
    )
    thread = threading.Thread(target=agent.run)
    thread.start()
    until("the agent to end", lambda: not thread.is_alive())
    head = server.head("halved")
    assert head is not None
    assert head.closed
    merged = load_full_model(server.store, load_job(server.store, "halved"), head.current.model).arrays()
    name = "backbone.body.conv1.0.weight"
    expected = 0.4 * arrays[name] + 0.6 * (arrays[name] // 2)  # alpha 0.6
    np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("models")
def test_the_documents_detector_is_an_architecture_once_it_is_listed() -> None:
    path = "our_models.detector:build"
    spec = JobSpec(id="own", classes=("a", "b"), arch=path, plan=TrainingPlan(image_size=64))
    with pytest.raises(BadJob, match="FEDQUEUE_PLUGINS"):
        first_weights(spec, None)
    plugins.allow([path])
    first = first_weights(spec, None)
    assert any(name.startswith("backbone.body.layer1") for name in first.exchanged)


@pytest.mark.usefixtures("models")
def test_a_site_whose_operator_did_not_choose_the_code_refuses_the_job(
    server: Server, tmp_path: Path
) -> None:
    spec = JobSpec(id="foreign", classes=("a",), arch="our_models.detector:build")
    server.create_job(spec)
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    result = CliRunner().invoke(
        app,
        [
            "site",
            "run",
            "--job",
            "foreign",
            "--site",
            "site-a",
            "--annotations",
            "coco.json",
            "--images",
            ".",
        ],
        env=server.environment,
    )
    assert result.exit_code == 1
    assert "our_models" not in sys.modules
    with pytest.raises(BadJob, match="settings do not list"):
        DetectionTrainer(tmp_path / "coco.json", tmp_path).prepare(spec)


def test_an_evaluation_that_cannot_be_says_why(server: Server, tmp_path: Path) -> None:
    """The command refuses such a job. Made by other means: BadJob, so the task is a dead letter, not retried."""
    spec = JobSpec(
        id="no-detector",
        classes=("a",),
        arch="our-classifier",
        evaluation=EvaluationPolicy(every=1),
        stop=StopRule(max_versions=1),
    )
    server.create_job(spec)
    (tmp_path / "coco.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "1.png", "width": 8, "height": 8}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
                "categories": [{"id": 1, "name": "a"}],
            }
        )
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    held_out = {"eval_annotations": tmp_path / "coco.json", "eval_images": tmp_path}
    context = open_context(server.settings.model_copy(update=held_out))
    with pytest.raises(BadJob, match="our-classifier"):
        evaluate(context, "no-detector", 0)
