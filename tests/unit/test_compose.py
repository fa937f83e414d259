"""docker/: what compose.yaml starts exists, is configured with real settings, and keeps its promises.

No Docker is needed: the file is read as compose reads it (anchors, `${VAR:-default}`, `$$`), with the passwords
of docker/.env.example. What only Docker can tell, whether images build and come up, docs/operations.md shows.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from typer.testing import CliRunner

from federation.settings import ENV_PREFIX, Settings, env_name
from storage.access import site_policy

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z0-9_]+)(?::(?P<operator>[-?])(?P<argument>[^}]*))?\}")
OUR_IMAGES = {"fedqueue-server": "server.Dockerfile", "fedqueue-site": "site.Dockerfile"}
SITES = ("north", "harbour", "market")


def example_environment(text: str) -> dict[str, str]:
    """The lines NAME=value of an env file; those behind "# " too, as `commented` defaults."""
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    return dict(line.split("=", 1) for line in lines if re.match(r"^[A-Z0-9_]+=", line))


ENV_TEXT = (DOCKER / ".env.example").read_text()
REQUIRED = example_environment("\n".join(x for x in ENV_TEXT.splitlines() if not x.startswith("#")))
DOCUMENTED = example_environment(ENV_TEXT)


def interpolate(node: Any) -> Any:
    """What compose makes of `node`: variables replaced, `$$` a dollar. KeyError for one without a value."""
    if isinstance(node, dict):
        return {key: interpolate(value) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        if match["operator"] == "-":
            return REQUIRED.get(match["name"], match["argument"])
        return REQUIRED[match["name"]]

    return "$".join(VARIABLE.sub(value, part) for part in node.split("$$"))


RAW: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
COMPOSE: dict[str, Any] = interpolate(RAW)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {
    name: service for name, service in SERVICES.items() if service["image"].partition(":")[0] in OUR_IMAGES
}


def fedqueue_commands(service: dict[str, Any]) -> list[list[str]]:
    """The arguments of every `fedqueue` that the service runs, its entrypoint or a line of its shell script."""
    if "entrypoint" not in service:
        return [service["command"]]
    assert service["entrypoint"] == ["/bin/sh", "-euc"]
    lines = [shlex.split(line) for line in service["command"][0].splitlines()]
    calls = [line[1:] for line in lines if line and line[0] == "fedqueue"]
    return [call[: call.index(">")] if ">" in call else call for call in calls]


def test_services() -> None:
    expected = {
        "accounts",
        "rabbitmq",
        "redis",
        "s3",
        "s3-accounts",
        "init",
        "ingress",
        "worker",
        "evaluator",
    }
    assert set(SERVICES) == expected | {"admin"} | {f"site-{site}" for site in SITES}
    started = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert started == {"accounts", "rabbitmq", "redis", "s3", "init", "ingress", "worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_or_built_here(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].rpartition(":")
    assert re.search(r"\d", tag)
    if image in OUR_IMAGES:
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / OUR_IMAGES[image]
    else:
        assert "build" not in service
        assert image.startswith("docker.io/")  # a short name means another place on another machine


@pytest.mark.parametrize("name", SERVICES)
def test_order_of_starting(name: str) -> None:
    """Nobody waits for a service that is not there, nor in a way that it cannot answer."""
    service = SERVICES[name]
    assert "healthcheck" in service or "depends_on" in service or name == "accounts"
    for other, how in service.get("depends_on", {}).items():
        target = SERVICES[other]
        assert set(target.get("profiles", ())) <= set(service.get("profiles", ())), "would not be started"
        if how["condition"] == "service_healthy":
            assert target["healthcheck"]["test"][0] == "CMD"
        else:
            assert how["condition"] == "service_completed_successfully"
            assert target["restart"] == "no"


@pytest.mark.parametrize("name", OURS)
def test_commands_exist(name: str) -> None:
    """Every `fedqueue …` is a command of ours with flags that it knows: so it has a help text."""
    calls = fedqueue_commands(SERVICES[name])
    assert calls
    for call in calls:
        assert has_help(call) == (True, ""), call


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    assert not has_help(["server", "initialise"])[0]
    assert not has_help(["worker", "--queues", "merge"])[0]


def has_help(call: list[str]) -> tuple[bool, str]:
    """If the command line parses up to `--help`; the complaint if not."""
    from cli.main import app

    result = CliRunner().invoke(app, [*call, "--help"])
    return result.exit_code == 0, "" if result.exit_code == 0 else result.output


@pytest.mark.parametrize("name", OURS)
def test_environment_is_valid_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings load, from exactly the names that the file gives."""
    environment: dict[str, str] = SERVICES[name].get("environment", {})
    ours = {key: value for key, value in environment.items() if key.startswith(ENV_PREFIX)}
    assert set(ours) <= {env_name(field) for field in Settings.model_fields}
    monkeypatch.chdir(tmp_path)
    for key, value in ours.items():
        monkeypatch.setenv(key, value)
    settings = Settings.load()
    if name == "accounts":
        assert not ours
        return
    assert not settings.embedded
    for url in (
        settings.broker_url.get_secret_value(),
        settings.store_url,
        settings.live_url.get_secret_value(),
    ):
        if not url.startswith("file:"):
            assert urlsplit(url).hostname in SERVICES


def test_services_reach_whom_they_name() -> None:
    """The host of every URL shares a network with the service that has the URL."""
    for name, service in OURS.items():
        for value in service.get("environment", {}).values():
            host = urlsplit(value).hostname
            if host in SERVICES:
                assert set(service["networks"]) & set(SERVICES[host]["networks"]), (name, host)


def test_volumes_and_networks_are_declared_and_used() -> None:
    named: set[str] = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            if isinstance(volume, dict):
                assert volume["type"] == "bind"
                assert volume["read_only"] is True
                assert (
                    volume["bind"]["create_host_path"] is False
                )  # a typing error must not be an empty folder
            elif volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert (DOCKER / source).is_file()
                assert mode == "ro"
            else:
                named.add(volume.partition(":")[0])
    assert named == set(COMPOSE["volumes"])
    networks = {network for service in SERVICES.values() for network in service.get("networks", ())}
    assert networks == set(COMPOSE["networks"])


def test_the_store_outlives_its_container() -> None:
    assert SERVICES["s3"]["volumes"] == ["s3-data:/data"]
    assert any(v.startswith("rabbitmq-data:/var/lib/rabbitmq") for v in SERVICES["rabbitmq"]["volumes"])
    assert SERVICES["rabbitmq"]["hostname"]  # the data folder is named after it


def test_only_the_workers_hold_the_stores_credentials() -> None:
    secret = REQUIRED["S3_ROOT_PASSWORD"]
    holders = {name for name, service in SERVICES.items() if secret in json.dumps(service)}
    assert holders == {"s3", "s3-accounts", "init", "worker", "evaluator", "admin"}
    assert "ingress" not in holders


@pytest.mark.parametrize("site", SITES)
def test_a_site_has_its_own_accounts_and_nothing_of_the_server(site: str) -> None:
    service = SERVICES[f"site-{site}"]
    environment = service["environment"]
    assert service["profiles"] == ["site"]
    assert service["networks"] == ["sites"]
    broker = urlsplit(environment["FEDQUEUE_BROKER_URL"])
    assert (broker.username, broker.password) == (site, REQUIRED[f"{site.upper()}_PASSWORD"])
    assert environment["FEDQUEUE_SITE"] == environment["FEDQUEUE_STORE_ACCESS_KEY"] == site
    assert environment["FEDQUEUE_STORE_SECRET_KEY"] == REQUIRED[f"{site.upper()}_S3_SECRET"]
    text = json.dumps(service)
    others = [REQUIRED[f"{other.upper()}_PASSWORD"] for other in SITES if other != site]
    for foreign in (REQUIRED["BROKER_PASSWORD"], REQUIRED["S3_ROOT_PASSWORD"], "redis", *others):
        assert foreign not in text.replace("fedqueue-site", "")
    # its images are mounted where its settings say, and read-only (see above)
    (mount,) = [volume for volume in service["volumes"] if isinstance(volume, dict)]
    for field in ("FEDQUEUE_SITE_IMAGES", "FEDQUEUE_SITE_ANNOTATIONS"):
        assert environment[field].startswith(mount["target"] + "/")
    assert f"{site}-state:{environment['FEDQUEUE_SITE_STATE']}" in service["volumes"]


def test_accounts_are_made_for_every_site() -> None:
    (call,) = fedqueue_commands(SERVICES["accounts"])
    assert call[:2] == ["server", "definitions"]
    for site in SITES:
        assert f"{site}:${site.upper()}_PASSWORD" in call
        assert f'enrol {site} "${site.upper()}_S3_SECRET"' in SERVICES["s3-accounts"]["command"][0]
    target = [v for v in SERVICES["rabbitmq"]["volumes"] if v.startswith("definitions:")]
    folder = target[0].split(":")[1]
    assert f"load_definitions = {folder}/definitions.json" in (DOCKER / "rabbitmq.conf").read_text()
    assert f"{folder}/definitions.json" in SERVICES["accounts"]["command"][0]


def test_the_sites_policy_is_the_one_that_storage_describes() -> None:
    """One policy for all site accounts: the store puts each account's name where this says ${aws:username}."""
    url = SERVICES["worker"]["environment"]["FEDQUEUE_STORE_URL"]
    text = (DOCKER / "site-policy.json").read_text()
    for site in SITES:
        assert json.loads(text.replace("${aws:username}", site)) == site_policy(url, {site: ""})


def test_no_secret_is_written_into_the_file() -> None:
    """What is called password, secret or user comes from a variable without a default."""
    for name, service in RAW["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|ROOT_USER|MC_HOST", key):
                assert re.search(r"\$\{[A-Z0-9_]+:\?[^}]*\}", value), (name, key)


def test_every_variable_is_in_the_example_with_its_default() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    found = {match["name"]: match for match in VARIABLE.finditer(text)}
    assert set(found) == set(DOCUMENTED)
    for name, match in found.items():
        if match["operator"] == "-":
            assert DOCUMENTED[name] == match["argument"]
            assert name not in REQUIRED
        else:
            assert name in REQUIRED
    for name, value in REQUIRED.items():
        assert value == "fedqueue" if name.endswith("_USER") else value.startswith("change-me")
        assert re.fullmatch(r"[A-Za-z0-9-]{8,}", value)  # fit for a URL
    assert len(set(REQUIRED.values()) - {"change-me-north", "change-me-harbour", "change-me-market"}) == 3


def test_the_real_env_file_is_ignored() -> None:
    assert ".env" in (DOCKER / ".gitignore").read_text().split()


def test_published_ports_stay_on_this_machine() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
    assert "ports" not in SERVICES["redis"]


# --- images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", OUR_IMAGES.values())
def test_dockerfile_is_pinned_and_not_root(file: str) -> None:
    lines = (DOCKER / file).read_text().splitlines()
    bases = [line.split("=", 1)[1] for line in lines if line.startswith("ARG PYTHON_IMAGE=")]
    assert re.fullmatch(r"docker\.io/library/python:3\.12\.\d+-slim-\w+", bases[0])
    assert all(line.split()[1] == "${PYTHON_IMAGE}" for line in lines if line.startswith("FROM "))
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["fedqueue"]
    assert not any(line.startswith(("RUN", "COPY")) for line in lines[lines.index("USER fedqueue") :])
    assert 'ENTRYPOINT ["fedqueue"]' in lines


def test_both_images_are_of_one_python() -> None:
    bases = {re.search(r"ARG PYTHON_IMAGE=(\S+)", (DOCKER / f).read_text())[1] for f in OUR_IMAGES.values()}  # type: ignore[index]
    assert len(bases) == 1


def test_only_the_site_image_has_torch() -> None:
    assert "optional-dependencies" not in (DOCKER / "server.Dockerfile").read_text()
    assert "['optional-dependencies']['site']" in (DOCKER / "site.Dockerfile").read_text()
    torch_users = {name for name, service in OURS.items() if service["image"].startswith("fedqueue-site")}
    assert torch_users == {"evaluator", "admin"} | {f"site-{site}" for site in SITES}


def test_the_build_context_is_what_ships() -> None:
    """.dockerignore lets in what pyproject.toml installs, and nothing else: no secrets, images, tests."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]
    packages = {package.partition(".")[0] for package in shipped["packages"]}
    modules = {f"{module}.py" for module in shipped["py-modules"]}
    assert allowed == packages | modules | {"pyproject.toml", project["project"]["readme"]}
    assert lines[[line.startswith("#") for line in lines].count(True)] == "*"
    for name in allowed:
        assert (ROOT / name).exists()
