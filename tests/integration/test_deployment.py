"""`fedqueue site deploy` with a site's store account alone: promoted, swapped, rolled back, cut off, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.initial import first_weights
from cli.main import app
from federation.ids import new_update_id
from federation.jobs import JobSpec, TrainingPlan
from federation.requests import SteerModel
from federation.settings import env_name
from producers.deployed import read_note
from storage.access import site_policy
from storage.s3 import S3Store
from tests.chaos.network import Network
from tests.factories import Arrays, client_update, payload_of
from tests.integration.servers import ROOT, Server, until
from tests.servers.rgw import Account, Rgw

CAMERA = Account("camera", "camera-key", "camera-secret")


@dataclass
class Site:
    """A site that only uses models. Its way to the store can be cut; the broker it does not know."""

    server: Server
    environment: dict[str, str]
    folder: Path
    cut: Callable[[], None]
    repair: Callable[[], None]

    @property
    def out(self) -> Path:
        return self.folder / "deployed"

    def arguments(self, job: str, *more: str) -> list[str]:
        return ["site", "deploy", "--job", job, "--out", str(self.out), *more]

    def once(self, job: str, *more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, self.arguments(job, "--once", *more), env=self.environment)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    @contextmanager
    def service(self, job: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        log = self.folder / "service.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *self.arguments(job, "--every-s", "0.2", *more)],
                cwd=ROOT,
                env={**os.environ, **self.environment, "OMP_NUM_THREADS": "1"},
                stderr=file,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            print(log.read_text())

    def said(self, words: str) -> bool:
        return words in (self.folder / "service.log").read_text()

    def served(self, link: str = "current") -> int | None:
        """The version that a program finds which reads as docs/deploy.md says; its files are whole."""
        folder = Path(os.path.realpath(self.out / link))
        if not folder.is_dir():
            return None
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert (folder / "model.safetensors").stat().st_size == manifest["files"]["model.safetensors"][
            "nbytes"
        ]
        return int(manifest["version"])


@pytest.fixture
def site(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    environment = {
        name: value for name, value in server.environment.items() if name.startswith("FEDQUEUE_STORE")
    }
    environment |= {
        env_name("predict_cache"): str(tmp_path / "cache"),
        env_name("site_state"): str(tmp_path / "state"),
        env_name("backoff_limit_s"): "0.5",
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if server.settings.embedded:
            store = Path(server.settings.store_url.removeprefix("file:"))
            way = tmp_path / "way"
            way.symlink_to(store)
            environment[env_name("store_url")] = f"file:{way}"
            yield Site(server, environment, tmp_path, way.unlink, lambda: way.symlink_to(store))
            return
        s3: Rgw = request.getfixturevalue("s3_server")
        camera = s3.user(CAMERA)
        bucket = server.store
        assert isinstance(bucket, S3Store)
        policy = site_policy(server.settings.store_url, {camera.name: camera.arn}, s3.admin.arn)
        bucket.set_policy(json.dumps(policy))
        with Network() as network:
            line = network.line(s3.port)
            environment |= {
                env_name("store_url"): f"s3://127.0.0.1:{line.ports[0]}/fedqueue",
                env_name("store_access_key"): camera.access_key,
                env_name("store_secret_key"): camera.secret_key,
            }
            yield Site(server, environment, tmp_path, lambda: line.cut(hang=False), line.repair)
    finally:
        for number, handler in handlers.items():  # commands that ran in this process have set their own
            signal.signal(number, handler)


SPEC = JobSpec(id="street", classes=("car", "dog"), plan=TrainingPlan(image_size=64))


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return dict(first_weights(SPEC, None).arrays)


class Job:
    """A job for the default detector, whose versions follow each other as fast as updates are sent."""

    def __init__(self, server: Server, weights: Arrays) -> None:
        self.server, self.weights = server, weights
        self.id = f"street-{new_update_id()[-12:]}"
        server.create_job(SPEC.model_copy(update={"id": self.id}), weights)

    def publish(self) -> int:
        """One more version; returns its number."""
        before = self.version
        change = np.float32(1 + 0.01 * (before + 1))
        payload = payload_of({n: (a * change).astype(a.dtype) for n, a in self.weights.items()})
        self.server.send(client_update(payload, job=self.id, base_version=before), payload)
        until("the next version", lambda: self.version > before)
        return self.version

    @property
    def version(self) -> int:
        head = self.server.head(self.id)
        assert head is not None
        return head.version

    def promote(self, version: int) -> None:
        answer = self.server.answer(
            self.server.ask(SteerModel(job=self.id, action="promote", version=version))
        )
        assert answer.ok, answer.errors


@pytest.fixture
def job(server: Server, weights: Arrays) -> Job:
    return Job(server, weights)


def test_a_service_follows_what_is_promoted_forth_and_back(site: Site, job: Job) -> None:
    for _ in range(2):
        job.publish()
    seen: list[int | None] = []
    ended = threading.Event()

    def read_all_the_time() -> None:
        while not ended.is_set():
            seen.append(site.served())

    reader = threading.Thread(target=read_all_the_time)
    reader.start()
    try:
        with site.service(job.id) as process:
            until("it to wait for a stable version", lambda: site.said("fedqueue model promote"))
            for version, before in ((1, None), (2, 1), (1, 2)):
                job.promote(version)
                until(f"version {version}", lambda version=version: site.served() == version)  # type: ignore[misc]
                assert site.served("previous") == before
            site.cut()
            until(
                "it to see that the store is away", lambda: site.said("stays as it is") or site.said("no log")
            )
            job.promote(2)
            assert site.served() == 1
            site.repair()
            until("the version that was promoted meanwhile", lambda: site.served() == 2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        ended.set()
        reader.join()
    assert [version for i, version in enumerate(seen) if not i or version != seen[i - 1]] == [
        None,
        1,
        2,
        1,
        2,
    ]


def test_a_check_that_says_no_brings_the_one_before_back_and_is_remembered(site: Site, job: Job) -> None:
    status, output = site.once(job.id)
    assert status == 1
    assert f"fedqueue model promote {job.id}" in output
    job.promote(job.publish())
    status, output = site.once(job.id)
    assert status == 0, output
    assert "version 1 (stable) is deployed" in output
    assert site.once(job.id)[0] == 0, "up to date"
    job.promote(job.publish())
    no = ("--check", "sh -c 'echo all pictures are black; exit 2' {model}")
    status, output = site.once(job.id, *no)
    assert status == 1
    assert "exit status 2: all pictures are black" in output
    assert (site.served(), site.served("previous")) == (1, None)
    status, output = site.once(job.id)
    assert status == 1, "it is remembered, whatever check there is now"
    assert "--retry" in output
    shown = CliRunner().invoke(app, ["site", "deployed", "--out", str(site.out)])
    assert shown.exit_code == 0
    assert "exit status 2: all pictures are black; not tried again before --retry" in shown.output
    assert site.once(job.id, "--retry")[0] == 0
    assert (site.served(), site.served("previous")) == (2, 1)


def test_it_works_without_the_store_on_what_is_there(site: Site, job: Job) -> None:
    job.promote(job.publish())
    assert site.once(job.id)[0] == 0
    site.cut()
    try:
        status, output = site.once(job.id)
        assert status == 3
        assert "version 1 stays" in output
        assert site.served() == 1
    finally:
        site.repair()


def test_killed_in_the_middle_of_a_check_the_next_process_ends_it(site: Site, job: Job) -> None:
    job.promote(job.publish())
    assert site.once(job.id)[0] == 0
    job.promote(job.publish())
    with site.service(job.id, "--check", "sh -c 'kill -9 $PPID'") as process:
        assert process.wait(60) == -signal.SIGKILL
    note = read_note(site.out)
    assert note is not None
    assert note.trial is not None
    assert (site.served(), site.served("previous")) == (2, 1)
    assert site.once(job.id, "--check", "false")[0] == 1
    assert (site.served(), site.served("previous")) == (1, None)
    assert site.once(job.id, "--retry", "--check", "test -s {manifest}")[0] == 0
    assert (site.served(), site.served("previous")) == (2, 1)


def test_an_onnx_file_is_deployed_beside_the_model(site: Site, job: Job) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    job.promote(0)
    status, output = site.once(job.id, "--onnx")
    assert status == 0, output
    session = onnxruntime.InferenceSession((site.out / "current" / "model.onnx").read_bytes())
    assert session.get_modelmeta().custom_metadata_map["version"] == "0"
    assert (site.served(), site.served("previous")) == (0, None)
