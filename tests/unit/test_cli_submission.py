"""`fedqueue job submit | check | schema | list | show | history`: what the submitter and whoever looks on are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.sqlite import SqliteBroker
from cli.main import app
from cli.submission import Description, read, send_job
from federation.errors import BadMessage
from federation.governance import Member
from federation.jobs import EvaluationPolicy, Job, JobSpec
from federation.settings import Settings
from federation.types import (
    Cleared,
    Closed,
    Evaluation,
    Event,
    Held,
    Promoted,
    Quarantined,
    Resumed,
    RolledBack,
)
from storage.control import save_member
from storage.folder import FolderStore
from storage.jobs import newest_measured, save_evaluation
from storage.log import VersionLog
from storage.models import save_model
from storage.tensors import from_arrays
from tasks.context import Context
from tasks.jobs import create
from tests.factories import job_spec, payload_of, toy_arrays

AT = datetime(2040, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate(
        {
            "broker_url": f"sqlite:{tmp_path / 'queue.db'}",
            "store_url": f"file:{tmp_path / 'store'}",
            "site": "site-a",
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def job(store: FolderStore, tmp_path: Path) -> Iterator[Job]:
    broker = SqliteBroker(str(tmp_path / "server.db"), lease_s=60, delivery_limit=20)
    broker.declare(("site-a",))
    context = Context(Settings(), store, broker, lambda name, arguments: None)
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    yield create(
        context, job_spec(evaluation=EvaluationPolicy(sites_every=1)), ref, ref, submitted_by="site-a"
    )
    broker.close()


def fedqueue(store: FolderStore, tmp_path: Path, *command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--store-url", f"file:{tmp_path / 'store'}"])
    assert result.exit_code == 0, result.output
    return result.output


# --- the description ----------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    file = folder / "job.toml"
    file.write_text(text)
    return file


GOOD = 'id = "toy"\nclasses = ["thing"]\narch = "toy"\n'


def test_weights_are_a_file_beside_the_description_or_a_name(tmp_path: Path) -> None:
    assert read(write(tmp_path, GOOD)).weights is None
    for name, expected in {
        "first.safetensors": str(tmp_path / "first.safetensors"),
        "../up.pth": str(tmp_path / "../up.pth"),
        "COCO_V1": "COCO_V1",
    }.items():
        described = read(write(tmp_path, f'weights = "{name}"\n{GOOD}'))
        assert described.weights == expected
        assert "weights" not in described.document


def test_a_date_of_toml_is_a_deadline(tmp_path: Path) -> None:
    described = read(write(tmp_path, GOOD + "[stop]\ndeadline = 2040-01-02T03:04:05Z\n"))
    assert described.spec.stop.deadline == AT
    assert json.loads(json.dumps(described.document)) == described.document


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (
            'id = "No"\nclasses = []\ncolour = 1\n[plan]\nimage_size = 2\n',
            ["id", "classes", "plan.image_size", "colour"],
        ),
        (GOOD + "[stop]\ndeadline = 2040-01-02\npatience = 0\n", ["stop.patience", "stop.deadline"]),
        ('weights = 3\nid = "toy"\nclasses = ["a", "a"]\n', ["classes", "weights"]),
        ("id = \n", ["{file}"]),
    ],
)
@pytest.mark.parametrize("command", ["check", "submit"])
def test_all_mistakes_are_printed_a_line_each(
    tmp_path: Path, text: str, fields: list[str], command: str
) -> None:
    file = write(tmp_path, text)
    result = CliRunner().invoke(app, ["job", command, str(file)])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [field.format(file=file) for field in fields]


def test_a_good_description_is_said_to_be_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["job", "check", str(write(tmp_path, GOOD))])
    assert (result.exit_code, result.output) == (
        0,
        "job toy: no mistakes found; toy and first weights are looked at when it is submitted\n",
    )


def test_the_schema_is_json_schema_with_every_field() -> None:
    result = CliRunner().invoke(app, ["job", "schema"])
    found = json.loads(result.output)
    assert found["properties"].keys() == {*JobSpec.model_fields, "weights"}
    assert found["required"] == ["id", "classes"]
    assert "max_drop" in found["$defs"]["EvaluationPolicy"]["properties"]


def test_a_description_too_large_for_a_message_is_found_before_anything_is_uploaded(
    settings: Settings, store: FolderStore, tmp_path: Path
) -> None:
    (tmp_path / "first.safetensors").write_bytes(payload_of(toy_arrays()))
    spec = job_spec(classes=tuple(f"{i:060d}" for i in range(300)))
    described = Description.of(spec, str(tmp_path / "first.safetensors"))
    with pytest.raises(BadMessage, match="shorten the job description"):
        send_job(settings, store, described, 1)
    assert [*store.list("")] == []


def test_an_id_that_is_taken_is_found_before_anything_is_uploaded(
    settings: Settings, store: FolderStore, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [*store.list("")]
    file = write(tmp_path, GOOD)
    result = CliRunner().invoke(app, ["job", "submit", str(file), "--store-url", settings.store_url])
    assert result.exit_code == 1
    assert "id: there is a job 'toy' already, of site-a: choose another" in result.stderr
    assert [*store.list("")] == before


# --- looking ------------------------------------------------------------------------------------------------


def measure(
    store: FolderStore, version: int, who: str, value: float, images: int, metric: str = "mAP@0.5"
) -> None:
    save_evaluation(
        store,
        Evaluation(job="toy", version=version, who=who, num_images=images, metrics={metric: value}, at=AT),
    )


def test_the_newest_measurement_is_the_servers_or_the_mean_over_images(store: FolderStore, job: Job) -> None:
    assert newest_measured(store, job) is None
    measure(store, 2, "site-a", 0.5, 30)
    measure(store, 2, "site-b", 0.1, 10)
    assert newest_measured(store, job) == (2, pytest.approx(0.4))
    measure(store, 3, "site-b", 0.9, 10, metric="recall")
    assert newest_measured(store, job) == (2, pytest.approx(0.4))
    measure(store, 2, "server", 0.7, 5)
    assert newest_measured(store, job) == (2, 0.7)


def member(site: str, answer: str, reason: str = "") -> Member:
    return Member(job="toy", site=site, answer=answer, reason=reason, num_images=7, at=AT)  # type: ignore[arg-type]


def test_list_and_show_say_who_takes_part_and_why_not(store: FolderStore, tmp_path: Path, job: Job) -> None:
    save_member(store, member("north", "joined"))
    save_member(store, member("south", "declined", "no \x1b[31mtrucks\x1b[0m [here]"))
    measure(store, 0, "north", 0.25, 7)
    (row,) = json.loads(fedqueue(store, tmp_path, "job", "list", "--json"))
    assert row == {
        "job": "toy",
        "submitted_by": "site-a",
        "state": "open",
        "version": 0,
        "max_versions": 1000,
        "joined": 1,
        "declined": 1,
        "metric": "mAP@0.5",
        "measured": {"version": 0, "value": 0.25},
    }
    listed = fedqueue(store, tmp_path, "job", "list").splitlines()[1]
    assert listed.split() == ["toy", "site-a", "open", "0", "of", "1000", "1", "1", "0.250", "at", "0"]
    shown = fedqueue(store, tmp_path, "job", "show", "toy")
    assert "toy  of site-a, " in shown
    assert "\x1b" not in shown
    assert "no �[31mtrucks�[0m [here]" in shown
    for line in (
        "stop.max_versions",
        "release.approvals",
        "participation.mode",
        "aggregation.staleness.kind",
    ):
        assert line in shown
    everything = json.loads(fedqueue(store, tmp_path, "job", "show", "toy", "--json"))
    assert Job.from_json(json.dumps(everything["description"])) == job
    assert [m["site"] for m in everything["members"]] == ["north", "south"]


def test_a_job_that_cannot_be_read_hides_no_other(store: FolderStore, tmp_path: Path, job: Job) -> None:
    store.put("announced/broken.json", b"{}")
    rows = json.loads(fedqueue(store, tmp_path, "job", "list", "--json"))
    assert [(row["job"], "error" in row) for row in rows] == [("broken", True), ("toy", False)]
    output = fedqueue(store, tmp_path, "job", "list")
    assert "broken" in output
    assert "toy" in output
    assert "cannot be read" in output


def test_the_state_of_a_job_is_why_sites_may_not_train(store: FolderStore, tmp_path: Path, job: Job) -> None:
    log = VersionLog(store, "toy")
    record = log.head()
    for event, changes, state in (
        (Held(reason="paused by site-a: wait"), {"hold": "paused by site-a: wait"}, "paused by site-a: wait"),
        (Closed(reason="done"), {"closed": "done"}, "closed: done"),
    ):
        record = log.append(record, event, record.head.model_copy(update=changes))
        assert json.loads(fedqueue(store, tmp_path, "job", "list", "--json"))[0]["state"] == state
        assert state in fedqueue(store, tmp_path, "job", "show", "toy")


def test_history_tells_every_kind_of_event_and_by_whom(store: FolderStore, tmp_path: Path, job: Job) -> None:
    told: dict[str, Event] = {
        "held       by site-a: paused by site-a": Held(reason="paused by site-a", by="site-a"),
        "resumed    by site-a": Resumed(by="site-a"),
        "quarantine version 3: mAP@0.5 fell": Quarantined(version=3, reason="mAP@0.5 fell"),
        "cleared    version 3 is out of quarantine, by server": Cleared(version=3, by="server"),
        "promoted   version 2 is stable, by site-a": Promoted(version=2, by="site-a"),
        "rolled-back to version 1, by server: worse at night": RolledBack(to=1, reason="worse at night"),
        "closed     by site-a: stopped by site-a": Closed(reason="stopped by site-a", by="site-a"),
    }
    log = VersionLog(store, "toy")
    record = log.head()
    for event in told.values():
        record = log.append(record, event, record.head)
    lines = fedqueue(store, tmp_path, "job", "history", "toy").splitlines()
    assert lines[0].endswith("created")
    assert len(lines) == len(told) + 1
    for line, expected in zip(lines[1:], told, strict=True):
        assert line.endswith(expected)
