"""Jobs that sites submit over the queue: what the submitter is told, who sees them, and who may steer them.

Over real servers each site has its own accounts at broker and store, with the rights that a real one has.
What a worker's death in the middle costs, nothing, is in test_crash_points.py: Point.MODELS_COPIED and those after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.topology import site_queue
from federation.ids import new_update_id
from federation.keys import job_prefix, updates_prefix
from federation.requests import SteerJob, SubmitJob
from federation.settings import env_name
from federation.wire import Answered, JobAnnounced, decode_control
from storage.access import site_policy
from storage.control import load_announcement
from storage.jobs import list_refusals, load_job
from storage.models import describe_upload
from storage.s3 import S3Store
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import ROOT, SITES, Server, until
from tests.servers.rgw import Account, Rgw

TOML = """\
id = "{job}"
classes = ["thing"]
arch = "toy"
weights = "first.safetensors"      # beside this file

[aggregation]
alpha = 0.5
staleness = {{ kind = "constant" }}
"""


@dataclass(frozen=True)
class House:
    """A server, and what each site has in its environment."""

    server: Server
    accounts: dict[str, dict[str, str]]
    folder: Path

    def run(self, *command: str, site: str = "") -> subprocess.CompletedProcess[str]:
        """`fedqueue …` of a site, or of an operator."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FEDQUEUE_")}
        return subprocess.run(
            [sys.executable, "-m", "cli.main", *command],
            cwd=ROOT,
            env=inherited | self.server.environment | (self.accounts[site] if site else {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def said(self, *command: str, site: str = "") -> str:
        """What a command that succeeds prints."""
        done = self.run(*command, site=site)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def description(self, job: str) -> Path:
        (self.folder / "first.safetensors").write_bytes(payload_of(toy_arrays(2.0)))
        file = self.folder / f"{job}.toml"
        file.write_text(TOML.format(job=job))
        return file

    def heard(self, site: str) -> list[object]:
        """What the control queue of a site holds; takes it."""
        broker = self.server.as_site(site)
        try:
            return [decode_control(delivery) for delivery in broker.drain(site_queue(site).name)]
        finally:
            broker.close()


@pytest.fixture(scope="module")
def house(server: Server, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    accounts = {site: {env_name("site"): site} for site in SITES}
    if not server.settings.embedded:
        s3: Rgw = request.getfixturevalue("s3_server")
        users = {
            site: s3.user(Account(f"own-{site}", f"own-{site}-key", f"own-{site}-secret")) for site in SITES
        }
        store = server.store
        assert isinstance(store, S3Store)
        arns = {site: user.arn for site, user in users.items()}
        store.set_policy(json.dumps(site_policy(server.settings.store_url, arns, s3.admin.arn)))
        for site, user in users.items():
            accounts[site] |= {
                env_name("broker_url"): server.site_urls[site],
                env_name("store_access_key"): user.access_key,
                env_name("store_secret_key"): user.secret_key,
            }
    return House(server, accounts, tmp_path_factory.mktemp("submitters"))


def new_job() -> str:
    return f"job-{new_update_id()[-12:]}"


def test_a_site_submits_a_job_and_everybody_sees_it(house: House) -> None:
    job, server = new_job(), house.server
    file = house.description(job)
    said = house.said("job", "submit", str(file), site="site-a")
    assert f"job {job} is there" in said
    announcement = load_announcement(server.store, job)
    assert announcement is not None
    assert announcement.submitted_by == "site-a"
    assert load_job(server.store, job).submitted_by == "site-a"
    until("the uploads to be deleted", lambda: not [*server.store.list(updates_prefix(job))])

    heard: list[object] = []
    until("the announcement", lambda: heard.extend(house.heard("site-b")) or JobAnnounced(job=job) in heard)
    assert any(isinstance(control, Answered) for control in house.heard("site-a"))
    for looker in ("site-b", ""):
        rows = {row["job"]: row for row in json.loads(house.said("job", "list", "--json", site=looker))}
        assert (rows[job]["submitted_by"], rows[job]["state"], rows[job]["version"]) == ("site-a", "open", 0)
    shown = house.said("job", "show", job, site="site-b")
    assert "of site-a" in shown
    assert "aggregation.alpha" in shown

    update = client_update(payload_of(toy_arrays(4.0)), job=job, site="site-b")
    server.send(update, payload_of(toy_arrays(4.0)))
    until("the merge", lambda: (head := server.head(job)) is not None and head.version == 1)
    house.said("audit", job)


def test_an_operator_submits_the_same_way(house: House) -> None:
    job = new_job()
    house.said("job", "submit", str(house.description(job)))
    assert load_job(house.server.store, job).submitted_by == "server"
    assert f"{job}  of server" in house.said("job", "show", job, site="site-a")


def test_every_error_comes_in_one_answer(house: House) -> None:
    """From the server to whoever sends it, and from the command, a line each."""
    job, server = new_job(), house.server
    server.create_job(job_spec(job))
    data = payload_of(toy_arrays(float("nan")))
    good, broken = (describe_upload(job, "site-a", data) for _ in range(2))
    server.store.put_if_absent(broken.key, data)
    document = {"id": job, "classes": [], "colour": "blue", "stop": {"max_versions": 0, "deadline": "now"}}
    asked = server.ask(SubmitJob(document=document, initial=broken, first=good), "site-a")
    answer = server.answer(asked)
    assert not answer.ok
    fields = [error.partition(":")[0] for error in answer.errors]
    assert sorted(fields) == [
        "classes",
        "colour",
        "first",
        "id",
        "initial",
        "stop.deadline",
        "stop.max_versions",
    ]

    wrong = house.folder / "wrong.toml"
    wrong.write_text(
        'id = "Street"\nclasses = ["a", "a"]\n[plan]\nimage_size = 3\n[stop]\nmax_versions = 0\n'
    )
    for command in (["check"], ["submit"]):
        done = house.run("job", *command, str(wrong), site="site-a")
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["id", "plan.image_size", "stop.max_versions"]
    done = house.run("job", "submit", str(house.description(job)), site="site-b")
    assert done.returncode == 1
    assert "there is a job" in done.stderr


def test_a_refused_submission_leaves_nothing_behind(house: House) -> None:
    job, server = new_job(), house.server
    ref = describe_upload(job, "site-b", b"no tensors")
    server.store.put_if_absent(ref.key, b"no tensors")
    asked = server.ask(SubmitJob(document={"id": job, "classes": ["a"]}, initial=ref, first=ref), "site-b")
    assert not server.answer(asked).ok
    until("the upload to be deleted", lambda: not [*server.store.list(job_prefix(job))])
    assert load_announcement(server.store, job) is None


def test_a_submission_whose_worker_is_away_is_answered_when_it_comes(house: House) -> None:
    job, server = new_job(), house.server
    worker = "aggregator" if server.settings.embedded else "worker"
    server.kill(worker)
    done = house.run("job", "submit", str(house.description(job)), "--wait-s", "1", site="site-a")
    assert done.returncode == 1
    assert "the request stays queued" in done.stderr
    assert server.head(job) is None
    server.start(worker)
    until("the job", lambda: server.head(job) is not None)


def test_only_the_submitter_and_operators_steer_a_job_and_what_comes_late_is_refused(house: House) -> None:
    job, server = new_job(), house.server
    first = server.submit(job_spec(job), site="site-a")
    assert server.answer(first).ok
    for action in ("pause", "stop"):
        answer = server.answer(server.ask(SteerJob(job=job, action=action), "site-b"))  # type: ignore[arg-type]
        assert "only that site or an operator" in answer.errors[0]
    done = house.run("job", "pause", job, site="site-b")
    assert (done.returncode, "only that site or an operator" in done.stderr) == (1, True)

    house.said("job", "pause", job, "--reason", "new labels", site="site-a")
    assert "paused by site-a: new labels" in house.said("job", "status", job)
    house.said("job", "resume", job, site="site-a")
    assert "\nopen" in house.said("job", "show", job, site="site-b")
    house.said("job", "stop", job, "--reason", "good enough")
    listed = {row["job"]: row for row in json.loads(house.said("job", "list", "--json", site="site-b"))}
    assert "stopped by server: good enough" in listed[job]["state"]

    late = client_update(payload_of(toy_arrays(1.0)), job=job, site="site-b")
    server.send(late, payload_of(toy_arrays(1.0)))
    until("the refusal", lambda: [*list_refusals(server.store, job)])
    (refusal,) = list_refusals(server.store, job)
    assert (refusal.update.update_id, refusal.reason) == (late.update_id, "job-closed")
    history = house.said("job", "history", job)
    for line in (
        "held       by site-a: paused by site-a: new labels",
        "resumed    by site-a",
        "closed     by server: stopped by server: good enough",
    ):
        assert line in history
