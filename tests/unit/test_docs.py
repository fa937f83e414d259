"""The documents stay true: examples parse, links lead somewhere, reasons and settings exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import aggregator
import detection
import producers
import storage
import tasks
from aggregator import decide
from cli.submission import read
from federation.jobs import (
    AUGMENTATIONS,
    AggregationPolicy,
    EvaluationPolicy,
    JobSpec,
    Participation,
    ReleaseRule,
    StopRule,
    TrainingPlan,
)
from federation.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)


@pytest.mark.parametrize(
    "package", [aggregator, detection, producers, storage, tasks], ids=lambda p: p.__name__
)
def test_the_overview_of_a_package_names_every_module(package: ModuleType) -> None:
    (folder,) = package.__path__
    modules = {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}
    assert modules <= {*re.findall(r"\w+", package.__doc__ or "")}


def test_the_example_job_is_a_job() -> None:
    example, augmentation = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "jobs.md").read_text(), re.S)
    spec = JobSpec.from_json(json.dumps(tomllib.loads(example)))
    assert tomllib.loads(augmentation) == {"plan": {"augmentation": AUGMENTATIONS["light"].model_dump()}}
    assert spec.aggregation.strategy == "fedasync"
    # what is commented out is an example too
    optional = re.findall(r"^# (\w+ = .+?)(?:  +#.*)?$", example, re.M)
    assert len(optional) >= 4
    for line in optional:
        tomllib.loads(line)


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "jobs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_commented_examples_are_jobs(file: Path) -> None:
    described = read(file)
    comments = [line for line in file.read_text().splitlines() if "#" in line]
    assert len(comments) >= len(described.document)
    # every section of a job is shown in one of them
    shown = {section for other in file.parent.glob("*.toml") for section in tomllib.loads(other.read_text())}
    assert {*JobSpec.model_fields} - shown <= {"max_inflight"}


def test_the_document_names_every_field_of_a_job() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text()
    for model in (
        JobSpec,
        Participation,
        TrainingPlan,
        AggregationPolicy,
        StopRule,
        EvaluationPolicy,
        ReleaseRule,
    ):
        missing = {name for name in model.model_fields if not re.search(rf"\b{name}\b", text)}
        assert missing == set(), f"docs/jobs.md does not explain {missing} of {model.__name__}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"`[^`]*`", "", document.read_text())  # code is no link
    for target in re.findall(r"\]\(([^)#]+)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_settings_that_are_named_exist(document: Path) -> None:
    named = set(re.findall(rf"{ENV_PREFIX}([A-Z0-9_]+)", document.read_text()))
    known = {name.upper() for name in Settings.model_fields} | {"CONFIG"}
    assert {name for name in named if not name.startswith("CLI_")} <= known


def test_the_protocol_lists_every_reason_of_a_refusal() -> None:
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    reasons = {value for name, value in vars(decide).items() if name.isupper() and isinstance(value, str)}
    sources = [
        ROOT / "federation" / "wire.py",
        ROOT / "storage" / "tensors.py",
        ROOT / "storage" / "models.py",
    ]
    for source in sources:
        reasons |= set(
            re.findall(r'Bad(?:Message|Payload)\([^)]*?"([a-z]+(?:-[a-z]+)+)"', source.read_text(), re.S)
        )
    assert len(reasons) > 15
    assert {reason for reason in reasons if f"`{reason}`" not in protocol} == set()


def test_the_tests_that_the_promises_rest_on_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / "docs" / "reliability.md").read_text())
    path, found = "", 0
    for file, name in named:
        path = file or path
        if not (file or name):
            continue
        source = ROOT / path
        assert source.is_file(), f"docs/reliability.md names {path}"
        if name:
            assert f"def {name}(" in source.read_text(), f"docs/reliability.md names {path}::{name}"
            found += 1
    assert found > 15
