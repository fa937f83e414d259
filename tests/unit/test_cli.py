"""Every command explains itself: help, an example, and each flag's environment variable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cli.main import app
from federation.settings import Settings, env_name


def commands(command: Any, path: str = "fedqueue") -> Iterator[tuple[str, Any]]:
    """Leaves of the tree. Typer brings its own copy of click's classes, so groups are known by what they have."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
    for name, child in (children or {}).items():
        yield from commands(child, f"{path} {name}")


ALL = dict(commands(typer.main.get_command(app)))


def test_the_commands_of_the_documentation_are_there() -> None:
    expected = "demo predict ingress worker settings audit replay gc"
    assert {f"fedqueue {name}" for name in expected.split()} <= ALL.keys()
    for noun, verbs in {
        "site": "run key list show",
        "job": "submit check schema list show pause resume stop status metrics history",
        "data": "check split convert",
        "model": "list metrics pull",
        "deadletter": "list show requeue",
        "release": "propose list show approve refuse fetch verify",
        "server": "init definitions bucket-policy",
    }.items():
        assert {f"fedqueue {noun} {verb}" for verb in verbs.split()} <= ALL.keys()


@pytest.mark.parametrize("path", ALL)
def test_a_command_has_help_with_an_example_and_every_flag_its_variable(path: str) -> None:
    command = ALL[path]
    assert "Example:" in (command.help or "")
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert parameter.envvar, f"{parameter.opts} of {path} has no environment variable"
            assert str(parameter.envvar).startswith("FEDQUEUE_")
            assert parameter.help


def test_settings_shows_every_setting_with_its_range_and_hides_secrets() -> None:
    secret = "amqp://user:hunter2@127.0.0.1/"
    result = CliRunner().invoke(app, ["settings"], env={"FEDQUEUE_BROKER_URL": secret, "COLUMNS": "220"})
    assert result.exit_code == 0
    for field in Settings.model_fields:
        assert env_name(field) in result.output
    assert "hunter2" not in result.output
    assert "0 < x ≤ 1" in result.output


def test_a_wrong_setting_names_itself_and_ends_the_process() -> None:
    result = CliRunner().invoke(app, ["settings"], env={"FEDQUEUE_SITE_DUTY": "2"})
    assert result.exit_code == 1
    assert "site_duty" in result.output


@pytest.mark.parametrize(
    "command", [["job", "status", "street"], ["model", "list", "street"], ["deadletter", "list"]]
)
def test_a_store_that_cannot_be_is_one_line_and_no_traceback(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--store-url", "s3://127.0.0.1:9000/B"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "must name one bucket" in result.output


def test_an_unknown_job_is_named_beside_those_there_are(tmp_path: object) -> None:
    result = CliRunner().invoke(app, ["job", "status", "nowhere", "--store-url", f"file:{tmp_path}"])
    assert result.exit_code == 1
    assert "nowhere" in result.output
