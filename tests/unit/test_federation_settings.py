"""Settings: documented, bounded, from environment over file, and silent about secrets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from federation.errors import BadSettings
from federation.settings import CONFIG_ENV, ENV_PREFIX, Settings, env_name


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No setting from outside: an empty folder and an environment without ours."""
    for name in [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_setting_is_described_and_has_a_default(field: str) -> None:
    info = Settings.model_fields[field]
    assert info.description
    assert not info.is_required()
    assert env_name(field) == f"FEDQUEUE_{field.upper()}"


@pytest.mark.parametrize("field", [f for f in Settings.model_fields if f.endswith("_s")])
def test_every_time_says_that_it_is_in_seconds(field: str) -> None:
    assert "seconds" in (Settings.model_fields[field].description or "")


def test_defaults_are_the_embedded_mode() -> None:
    settings = Settings.load()
    assert settings.embedded
    assert settings.store_url.startswith("file:")
    assert settings.live_url.get_secret_value().startswith("file:")
    assert settings.site is None


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("broker_url", "amqp://u:p@h:5672/v", SecretStr("amqp://u:p@h:5672/v")),
        ("broker_url", "amqps://h", SecretStr("amqps://h")),
        ("broker_url", "sqlite:q.db", SecretStr("sqlite:q.db")),
        ("store_url", "s3://h:9000/bucket?tls=true&region=eu", "s3://h:9000/bucket?tls=true&region=eu"),
        ("store_url", "file:/var/store", "file:/var/store"),
        ("live_url", "redis://[::1]:6379/0", SecretStr("redis://[::1]:6379/0")),
        ("live_url", "rediss://h", SecretStr("rediss://h")),
        ("site", "north", "north"),
        ("site_images", "/data/images", Path("/data/images")),
        ("site_format", "yolo", "yolo"),
        ("site_disk_cache_bytes", "1000000", 1_000_000),
        ("site_duty", "0.25", 0.25),
        ("threads", "4", 4),
        ("poll_s", "0.5", 0.5),
        ("max_update_bytes", "1024", 1024),
        ("store_secret_key", "s3cret", SecretStr("s3cret")),
    ],
)
def test_the_environment_is_read(
    monkeypatch: pytest.MonkeyPatch, field: str, text: str, value: object
) -> None:
    monkeypatch.setenv(env_name(field), text)
    assert getattr(Settings.load(), field) == value


WRONG = [
    ("site_format", "pascal"),
    ("site_cache_bytes", "-1"),
    ("broker_url", "http://h"),
    ("broker_url", "amqp://"),
    ("broker_url", "amqp:"),
    ("broker_url", "amqp:h"),
    ("broker_url", "amqp://:5672/"),
    ("broker_url", "amqp://h:port/"),
    ("broker_url", "amqp://h:99999/"),
    ("broker_url", "amqp://user:pass/word@h:5672/"),  # an unescaped slash: the host would be "user"
    ("broker_url", "sqlite:"),
    ("broker_url", "sqlite"),
    ("broker_url", "AMQP://h"),
    ("broker_url", ""),
    ("store_url", "http://h/bucket"),
    ("store_url", "s3:///bucket"),
    ("store_url", "s3://h:x/bucket"),
    ("store_url", "file:"),
    ("store_url", "/var/store"),
    ("live_url", "amqp://h"),
    ("live_url", "redis://"),
    ("site", "North"),
    ("site", "a.b"),
    ("site", "../x"),
    ("site", ""),
    ("site_duty", "0"),
    ("site_duty", "1.1"),
    ("site_duty", "nan"),
    ("threads", "-1"),
    ("threads", "two"),
    ("threads", "1.5"),
    ("poll_s", "0"),
    ("poll_s", "-1"),
    ("poll_s", "inf"),
    ("heartbeat_s", "86401"),
    ("heartbeat_ttl_s", ""),
    ("max_update_bytes", "1023"),
    ("max_update_bytes", "1e9"),
    ("task_time_limit_s", "1501"),
    ("delivery_limit", "0"),
    ("lease_s", "0"),
]


@pytest.mark.parametrize(("field", "text"), WRONG)
def test_a_wrong_value_names_its_field(monkeypatch: pytest.MonkeyPatch, field: str, text: str) -> None:
    monkeypatch.setenv(env_name(field), text)
    with pytest.raises(BadSettings, match=rf"settings: {field}: .*FEDQUEUE_<FIELD>"):
        Settings.load()


@pytest.mark.parametrize(
    "url",
    ["amqp:/user:hunter2@h/", "amqp://user:hunter2/x@h:5672/", "http://user:hunter2@h", "amqp://u:hunter2@"],
)
def test_a_wrong_url_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv(env_name("broker_url"), url)
    with pytest.raises(BadSettings) as info:
        Settings.load()
    assert "hunter2" not in str(info.value)


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env_name("threads"), "-1")
    monkeypatch.setenv(env_name("site"), "A")
    with pytest.raises(BadSettings, match=r"site: .*threads: "):
        Settings.load()


@pytest.mark.parametrize("name", ["FEDQUEUE_BROKER", "FEDQUEUE_", "FEDQUEUE_SITES", "FEDQUEUE_Threads_"])
def test_an_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(BadSettings, match=f"unknown settings in the environment: {name}$"):
        Settings.load()


def test_flags_of_commands_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """cli/ reads FEDQUEUE_CLI_…, which must not be taken for misspelt settings."""
    monkeypatch.setenv("FEDQUEUE_CLI_JOB", "street")
    assert Settings.load() == Settings()


def test_names_of_others_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQUEUED", "x")
    monkeypatch.setenv("THREADS", "99")
    assert Settings.load().threads == 0


def test_the_file_in_the_working_directory_is_read(clean: Path) -> None:
    (clean / "fedqueue.toml").write_text('site = "north"\nthreads = 3\npoll_s = 4\n')
    settings = Settings.load()
    assert (settings.site, settings.threads, settings.poll_s) == ("north", 3, 4.0)


def test_flags_win_over_environment_over_file_over_defaults(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clean / "fedqueue.toml").write_text('site = "file"\nthreads = 1\npoll_s = 1.0\n')
    monkeypatch.setenv(env_name("site"), "environment")
    monkeypatch.setenv(env_name("threads"), "2")
    settings = Settings.load(site="flag", threads=None)
    assert settings.site == "flag"
    assert settings.threads == 2  # a flag that was not given is no value
    assert settings.poll_s == 1.0
    assert settings.heartbeat_s == Settings.model_fields["heartbeat_s"].default


def test_another_file_can_be_named(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clean / "fedqueue.toml").write_text('site = "here"\n')
    other = clean / "elsewhere.toml"
    other.write_text('site = "there"\n')
    monkeypatch.setenv(CONFIG_ENV, str(other))
    assert Settings.load().site == "there"


def test_a_named_file_must_exist(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, str(clean / "missing.toml"))
    with pytest.raises(BadSettings, match=r"FEDQUEUE_CONFIG names .*missing\.toml, which is not a file"):
        Settings.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"site = north\n", "settings file"),
        (b"site = 'north'\nsite = 'south'\n", "settings file"),
        (b"\xff\xfe", "settings file"),
        (b"sites = 'north'\n", "sites: "),
        (b"site = 7\n", "site: "),
        (b"[site]\nname = 'north'\n", "site: "),
        (b"threads = -1\n", "threads: "),
    ],
)
def test_mistakes_in_the_file(clean: Path, text: bytes, message: str) -> None:
    (clean / "fedqueue.toml").write_bytes(text)
    with pytest.raises(BadSettings, match=message):
        Settings.load()


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(BadSettings, match="brokerurl: "):
        Settings.load(brokerurl="sqlite:x")


SECRETS: dict[str, str] = {
    "broker_url": "amqp://user:hunter2@h:5672/",
    "live_url": "redis://:hunter2@h:6379/0",
    "store_secret_key": "hunter2",
}


def test_every_setting_that_can_hold_a_secret_is_masked() -> None:
    """A new setting whose name or description speaks of passwords must be a SecretStr."""
    secret = {name for name, info in Settings.model_fields.items() if info.annotation is SecretStr}
    assert secret == set(SECRETS)
    for name, info in Settings.model_fields.items():
        if "password" in f"{name} {info.description}".lower() or "secret" in name:
            assert info.annotation is SecretStr, name


def test_secrets_do_not_show() -> None:
    settings = Settings.load(**SECRETS)
    for text in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert "hunter2" not in text
        assert "****" in text
    assert "hunter2" in settings.broker_url.get_secret_value()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings.load().threads = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("url", "embedded"), [("sqlite:q.db", True), ("amqp://h/", False), ("amqps://h/", False)]
)
def test_embedded_is_said_by_the_broker(url: str, embedded: bool) -> None:
    assert Settings.load(broker_url=url).embedded is embedded


def test_empty_values_do_not_mean_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`FEDQUEUE_STORE_ACCESS_KEY=` is the empty key, not silence about a broken deployment of another field."""
    monkeypatch.setenv(env_name("store_access_key"), "")
    assert Settings.load().store_access_key == ""


def test_settings_know_nothing_but_their_own_names() -> None:
    """Every environment name maps back to one field: no two fields share one."""
    names: dict[str, Any] = {}
    for field in Settings.model_fields:
        names.setdefault(env_name(field), field)
    assert len(names) == len(Settings.model_fields)
    assert CONFIG_ENV not in names


def test_lists_in_the_environment_are_names_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQUEUE_SITE_CLASSES", "car, traffic light,")
    assert Settings.load().site_classes == ("car", "traffic light")
    monkeypatch.setenv(
        "FEDQUEUE_SITE_CLASSES", '["car", "traffic light"]'
    )  # would be other classes, silently
    with pytest.raises(BadSettings, match="without brackets"):
        Settings.load()
