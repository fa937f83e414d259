"""A version goes outside when those whose work is in it consent: by the commands, each site with its own accounts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from federation.governance import Card
from federation.ids import new_update_id
from federation.jobs import JobSpec
from federation.keys import site_key as key_of_site
from federation.requests import AnswerRelease, Consent, JoinJob, Request
from federation.settings import ENV_PREFIX, env_name
from federation.signatures import SigningKey, fingerprint
from producers.site_key import site_key
from storage.access import site_policy
from storage.audit import audit
from storage.control import load_answer
from storage.releases import is_released, load_release
from storage.s3 import S3Store
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.integration.servers import ROOT, SITES, Server, until
from tests.servers.rgw import Account, Rgw

A, B, C = SITES
PURPOSE = "a pilot in Graz, until June"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(server: Server, request: pytest.FixtureRequest) -> Run:
    """`fedqueue` with a site's accounts and state folder, or as an operator."""
    if server.settings.embedded and "evaluate" not in server.processes:
        server.commands["evaluate"] = ["cli.main", "worker", "--queue", "evaluate"]
        server.start("evaluate")
    store = server.store
    for (
        site
    ) in SITES:  # the bucket may know the keys that sites of other tests had: what an operator does then
        store.delete(key_of_site(site))
    accounts: dict[str, Account] = {}
    if isinstance(store, S3Store):
        s3: Rgw = request.getfixturevalue("s3_server")
        accounts = {
            site: s3.user(Account(f"r-{site}", f"r-{site}-key", f"r-{site}-secret")) for site in SITES
        }
        arns = {site: account.arn for site, account in accounts.items()}
        store.set_policy(json.dumps(site_policy(server.settings.store_url, arns, s3.admin.arn)))

    def call(*words: str, site: str = "", state: str = "") -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
        environment |= server.environment
        if site:
            environment[env_name("site")] = site
            environment[env_name("site_state")] = str(server.folder / (state or site))
        if site in server.site_urls:
            environment[env_name("broker_url")] = server.site_urls[site]
        if site in accounts:
            environment[env_name("store_access_key")] = accounts[site].access_key
            environment[env_name("store_secret_key")] = accounts[site].secret_key
        return subprocess.run(
            [sys.executable, "-m", "cli.main", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return call


def trained(server: Server, spec: JobSpec) -> int:
    """A job of whose newest version each site has a third."""
    server.create_job(spec)
    for number, site in enumerate(SITES, 1):
        payload = payload_of(toy_arrays(float(number)))
        update = client_update(payload, job=spec.id, site=site, base_version=number - 1)
        server.send(update, payload)
        until(f"version {number}", lambda number=number: _version(server, spec.id) == number)  # type: ignore[misc]
    return len(SITES)


def _version(server: Server, job: str) -> int:
    head = server.head(job)
    return -1 if head is None else head.version


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def failed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr


def test_a_site_first_refuses_and_later_approves(server: Server, run: Run, tmp_path: Path) -> None:
    job = "release-story"
    version = trained(server, job_spec(job))
    at = [job, str(version)]
    keys = {site: site_key(server.folder / site) for site in SITES}
    prints = {site: fingerprint(key.public_key) for site, key in keys.items()}
    assert prints[A] in succeeded(run("site", "key", site=A))

    assert "is submitted" not in failed(run("release", "propose", *at, site=A))  # not A's job
    said = succeeded(run("release", "propose", *at, "--purpose", PURPOSE))
    assert f"waiting for {A}, {B}, {C}" in said
    assert PURPOSE in succeeded(run("release", "list", site=A))

    # A refuses, B and C approve: nothing goes out, and everybody sees why
    succeeded(run("release", "refuse", *at, "--reason", "pilots are not in our contract", site=A))
    succeeded(run("release", "approve", *at, "--name-us", site=B))
    assert "refused by site-a" in succeeded(run("release", "approve", *at, "--anonymous", site=C))
    shown = succeeded(run("release", "show", *at, site=B))
    assert "refused; 2 of 3 approved" in shown
    assert "UTC: pilots are not in our contract" in shown
    assert not is_released(server.store, job, version)
    assert "is not released" in failed(run("release", "fetch", *at, "--out", str(tmp_path / "none")))

    # A thinks better of it: the rule is met, and the bundle is written
    assert "being written" in succeeded(run("release", "approve", *at, "--name-us", site=A))
    until("the bundle", lambda: is_released(server.store, job, version))
    assert "comes too late" in failed(run("release", "refuse", *at, "--reason", "no", site=A))
    assert "before: site-a refused" in succeeded(run("release", "show", *at, site=C))
    assert "nothing waits" in succeeded(run("release", "list", site=A))

    folder = tmp_path / "bundle"
    given = [word for site in SITES for word in ("--key", f"{site}={prints[site]}")]
    fetched = succeeded(run("release", "fetch", *at, "--out", str(folder), *given, site=B))
    assert "3 of 3 contributors approved" in fetched
    card = Card.from_json((folder / "card.json").read_bytes())
    assert ({site.site for site in card.named}, card.contributors, card.purpose) == ({A, B}, 3, PURPOSE)
    assert "toy" in card.onnx_problem
    log_digest = server.head(job)
    assert log_digest is not None
    assert card.model_sha256 == log_digest.current.model.sha256
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == card.file_sha256
    for path in folder.iterdir():
        assert C.encode() not in path.read_bytes(), f"{path.name} names {C}, which has not allowed it"
    assert f"{C}, not named" in succeeded(run("release", "verify", str(folder), *given))

    # what was tampered with, and what another key signed, does not verify
    stranger = ["--key", f"{A}={fingerprint(SigningKey.new().public_key)}"]
    assert "its key is" in failed(run("release", "verify", str(folder), *stranger))
    model = bytearray((folder / "model.safetensors").read_bytes())
    model[-1] ^= 1
    (folder / "model.safetensors").write_bytes(model)
    assert "model.safetensors is not the file" in failed(run("release", "verify", str(folder)))
    assert [finding for finding in audit(server.store, job) if finding.level == "error"] == []


def test_nobody_answers_for_a_site(server: Server, run: Run) -> None:
    job = "release-forgery"
    version = trained(server, job_spec(job))
    own = site_key(server.folder / A)
    assert server.answer(server.ask(JoinJob(job=job, num_images=10, public_key=own.public_key), A)).ok
    succeeded(run("release", "propose", job, str(version), "--purpose", PURPOSE))
    assert "only a site answers" in failed(run("release", "approve", job, str(version)))

    # an operator, who may send any task, in the name of A, with a key of its own
    release = load_release(server.store, job, version)
    assert release is not None
    proposal = release.proposal
    consent = Consent(
        kind="release-consent",
        job=job,
        version=version,
        model_sha256=proposal.model_sha256,
        file_sha256=proposal.file_sha256,
        purpose=PURPOSE,
        answer="approve",
        at=datetime.now(UTC),
    )
    text = consent.to_json().decode()
    forger = SigningKey.new()
    for key in (forger.public_key, own.public_key):
        what = AnswerRelease(
            job=job, version=version, signed=text, public_key=key, signature=forger.sign(text)
        )
        request = Request(request_id=new_update_id(), who=A, what=what, at=datetime.now(UTC))
        server.send_as_operator(request)
        until("an answer", lambda request=request: load_answer(server.store, A, request.request_id))  # type: ignore[misc]
        answer = load_answer(server.store, A, request.request_id)
        assert answer is not None
        assert not answer.ok

    # A itself, on a machine that has another key
    assert "told the key" in failed(run("release", "approve", job, str(version), site=A, state="new-machine"))
    release = load_release(server.store, job, version)
    assert release is not None
    assert release.records == ()
