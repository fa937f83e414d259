"""What commands say about sites and about what a job cost: for people, for programs, for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cli.exposition import Family, exposition
from cli.main import app
from cli.units import age_text, bytes_text, ratio_text
from federation.governance import Invitation, Member
from federation.types import Evaluation, Gpu, Machine, SiteStatus, Transfer
from storage.account import accounts
from storage.control import save_invitation, save_member
from storage.folder import FolderStore
from storage.jobs import save_evaluation
from storage.liveness import FolderLiveness
from storage.log import VersionLog
from tests.unit.test_account import Job

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PROBLEM = "out-of-memory: lower the plan's batch_size [16]"
BUSY = Machine(
    load=3.0,
    cores=4,
    cpu=0.5,
    memory_used_bytes=4 * 10**9,
    memory_total_bytes=16 * 10**9,
    gpu=Gpu(name="made up", memory_used_bytes=3 * 10**9, memory_total_bytes=24 * 10**9),
)

Says = Callable[..., str]


@pytest.fixture
def says(tmp_path: Path) -> Says:
    """Runs a command on the folders of this test; its output."""

    def run(*command: str, code: int = 0) -> str:
        places = {"--live-url": f"file:{tmp_path / 'live'}", "--store-url": f"file:{tmp_path / 'store'}"}
        if command[:2] in [("site", "list"), ("job", "status")]:
            del places["--store-url" if command[0] == "site" else "--live-url"]
        flags = [word for place in places.items() for word in place]
        result = CliRunner().invoke(app, [*command, *flags], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result.output

    return run


def beat(tmp_path: Path, site: str, age_s: float = 0.0, **fields: Any) -> None:
    """The last heartbeat of `site`, `age_s` seconds ago."""
    seen_at = datetime.now(UTC) - timedelta(seconds=age_s)
    liveness = FolderLiveness(tmp_path / "live", lambda: seen_at.timestamp())
    liveness.beat(SiteStatus(**({"site": site, "state": "idle", "at": AT} | fields)))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Job toy at version 2: site-b has told what it moved, site-a has not."""
    made = Job(tmp_path)
    made.send("site-b", Transfer(downloaded_bytes=2_000, image_bytes=30_000_000))
    made.send("site-a")
    made.publish()
    copy = FolderStore(tmp_path / "store")
    for key in made.store.list(""):
        copy.put(key, made.store.get(key, max_bytes=1 << 20))
    return made


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}


def test_the_list_shows_conditions_figures_and_what_went_wrong(tmp_path: Path, says: Says) -> None:
    beat(tmp_path, "north", state="training", job="street", base_version=7, step=30, steps=100, machine=BUSY)
    beat(tmp_path, "south", 12.5, state="waiting", problem=PROBLEM, problem_at=AT)
    beat(tmp_path, "east", 16.0, state="uploading", outbox=2)
    beat(tmp_path, "west", 0.5, state="stopped")
    beat(tmp_path, "old", 3 * 86_400)
    output = says("site", "list")
    found = rows(output)
    assert (
        " ".join(found["north"]) == "north connected training street 7 30/100 3.0/4 4.0/16 3.0/24 0 0 s ago"
    )
    assert found["south"][1:3] == ["silent", "waiting"]
    assert found["east"][1:3] == ["gone", "uploading"]
    assert found["east"][-4:] == ["2", "16", "s", "ago"]
    assert found["west"][1:3] == ["gone", "stopped"]
    assert found["old"][-3:] == ["3", "d", "ago"]
    assert f"south: 2026-01-02 03:04:05: {PROBLEM}\n" in output


def test_the_list_for_programs(tmp_path: Path, says: Says) -> None:
    assert json.loads(says("site", "list", "--json")) == []
    beat(tmp_path, "north", machine=BUSY)
    beat(tmp_path, "south", 14.0)
    north, south = json.loads(says("site", "list", "--json"))
    assert (north["site"], north["condition"], north["load_per_core"]) == ("north", "connected", 0.75)
    assert SiteStatus.from_json(json.dumps(north["status"])).machine == BUSY
    assert (south["condition"], south["load_per_core"]) == ("silent", None)
    assert 14 <= south["age_s"] < 60


def test_show_tells_everything_of_a_site(tmp_path: Path, job: Job, says: Says) -> None:
    beat(tmp_path, "site-b", state="training", detail="for [two] reasons", machine=BUSY, agent_version="1.2")
    store = FolderStore(tmp_path / "store")
    save_member(store, Member(job="toy", site="site-b", answer="joined", num_images=40, at=AT))
    until = AT + timedelta(hours=1)
    save_invitation(store, Invitation(job="toy", site="site-b", version=1, invited_at=AT, expires_at=until))
    output = says("site", "show", "site-b")
    for words in (
        "connected",
        "for [two] reasons",
        "3.0/24, made up",
        "50%",
        "3.0/4",
        "1.2",
    ):
        assert words in output
    row = rows(output)["toy"]
    assert row[:6] == ["toy", "joined", "40", "01-02", "04:04:05", "1"]
    assert row[7:10] == ["v1,", "τ", "0,"]
    shown = json.loads(says("site", "show", "site-b", "--json"))
    (part,) = shown["jobs"]
    assert shown["seen"]["condition"] == "connected"
    assert part["member"]["num_images"] == 40
    assert part["invitation"]["version"] == 1
    assert part["account"]["image_bytes"] == 30_000_000
    assert part["account"]["last_merged"]["version"] == 1


def test_show_knows_who_declined_and_who_was_never_heard(tmp_path: Path, job: Job, says: Says) -> None:
    store = FolderStore(tmp_path / "store")
    save_member(store, Member(job="toy", site="far", answer="declined", reason="no [cart] here", at=AT))
    output = says("site", "show", "far")
    assert {"declined:", "[cart]"} <= {*output.split()}
    assert "no heartbeat" in output
    assert json.loads(says("site", "show", "site-a", "--json"))["jobs"][0]["member"] is None
    assert "nothing is known of a site 'nobody'" in says("site", "show", "nobody", code=1)


def test_status_tells_what_the_job_cost(tmp_path: Path, job: Job, says: Says) -> None:
    output = says("job", "status", "toy")
    found = rows(output)
    b = accounts(VersionLog(job.store, "toy").history())["site-b"]
    assert found["site-b"][1:5] == ["1", "0", "0.00", "0.50"]
    assert " ".join(found["site-b"][5:]) == (
        f"{bytes_text(b.uploaded_bytes)} 2 kB 30 MB {ratio_text(b.ratio)}"
    )
    assert len(found["site-a"]) == 7  # nothing is claimed of what it did not tell
    assert "images stayed home: 30 MB; travelled: " in output
    assert "(not all told by site-a)" in output

    document = json.loads(says("job", "status", "toy", "--json"))
    assert (document["job"], document["version"], document["closed"]) == ("toy", 2, None)
    assert document["sites"]["site-b"]["uploaded_bytes"] == b.uploaded_bytes
    assert document["sites"]["site-b"]["ratio"] == b.ratio
    assert document["sites"]["site-a"]["image_bytes"] is None
    assert document["total"]["merged"] == 2
    assert document["total"]["downloaded_bytes"] == 2000


def test_metrics_are_what_prometheus_reads(tmp_path: Path, job: Job, says: Says) -> None:
    beat(tmp_path, "site-b", 12.5)
    beat(tmp_path, "south", job="toy")
    beat(tmp_path, "stranger", job="another")
    for version, value in ((1, 0.25), (2, 0.75)):
        save_evaluation(
            FolderStore(tmp_path / "store"),
            Evaluation(
                job="toy", version=version, who="site-a", num_images=3, metrics={"mAP@0.5": value}, at=AT
            ),
        )
    output = says("job", "metrics", "toy")
    families = {family.name: family for family in text_string_to_metric_families(output)}
    samples = {
        (
            sample.name,
            *(value for name, value in sorted(sample.labels.items()) if name != "job"),
        ): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert all(sample.labels["job"] == "toy" for family in families.values() for sample in family.samples)
    assert samples["fedqueue_job_version",] == 2
    b = accounts(VersionLog(job.store, "toy").history())["site-b"]
    assert samples["fedqueue_uploaded_bytes_total", "site-b"] == b.uploaded_bytes
    assert samples["fedqueue_downloaded_bytes_total", "site-b"] == 2000
    assert samples["fedqueue_home_image_bytes", "site-b"] == 30_000_000
    assert samples["fedqueue_updates_merged_total", "site-a"] == 1
    assert samples["fedqueue_updates_rejected_total", "site-a"] == 0
    assert samples["fedqueue_staleness_total", "site-a"] == 1
    assert samples["fedqueue_job_metric", "mAP@0.5", "site-a"] == 0.75
    assert samples["fedqueue_job_measured_version", "site-a"] == 2
    conditions = {key[1:]: value for key, value in samples.items() if key[0] == "fedqueue_site_condition"}
    assert {key for key, value in conditions.items() if value} == {
        ("silent", "site-b"),
        ("connected", "south"),
    }
    assert len(conditions) == 6
    assert families["fedqueue_uploaded_bytes"].type == "counter"
    assert families["fedqueue_job_version"].type == "gauge"


def test_metrics_of_a_job_do_not_need_the_view_of_sites(tmp_path: Path, job: Job, says: Says) -> None:
    (tmp_path / "live").touch()  # no folder
    beat_free = says("job", "metrics", "toy")
    assert "fedqueue_job_version" in beat_free
    assert "fedqueue_site_condition" not in beat_free
    assert "site-b" in says("site", "show", "site-b")


def test_labels_and_help_are_escaped_as_the_format_says() -> None:
    hostile = 'a "quoted"\\ back\nslash'
    family = Family("odd", "gauge", "first\nsecond \\ third")
    family.add(0.1, label=hostile)
    family.add(2)
    text = exposition([family, Family("empty", "gauge", "never shown")])
    (parsed,) = text_string_to_metric_families(text)
    assert parsed.documentation == "first\nsecond \\ third"
    assert [(sample.labels, sample.value) for sample in parsed.samples] == [
        ({"label": hostile}, 0.1),
        ({}, 2.0),
    ]
    assert text.endswith("odd 2\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (34e6, "34 MB"),
        (1.2e9, "1.2 GB"),
        (5e15, "5 PB"),
    ],
)
def test_bytes_are_told_in_three_digits(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-0.5, "0 s ago"),
        (-30, "30 s ahead"),
        (119, "119 s ago"),
        (120, "2 min ago"),
        (7200, "2 h ago"),
        (1e6, "11 d ago"),
    ],
)
def test_ages_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_ratios_are_told_briefly() -> None:
    assert [ratio_text(r) for r in (None, 35.6, 9.94, 0.4)] == ["", "36:1", "9.9:1", "0.4:1"]


def test_without_any_site_the_list_says_so(says: Says) -> None:
    assert "`fedqueue site run` sends them" in says("site", "list")
    assert json.loads(says("site", "list", "--json")) == []
