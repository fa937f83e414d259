"""A site's own policy: which jobs it joins, and when it trains."""

from __future__ import annotations

from datetime import UTC, datetime, time
from typing import Any

import pytest

from federation.errors import BadSettings
from federation.hours import Hours
from federation.jobs import Job, ModelRef
from federation.settings import Settings
from producers.policy import MAX_REASON, Policy
from tests.factories import job_spec

CLASSES = ("car", "bus")


def job(submitted_by: str = "server", nbytes: int = 1000, classes: tuple[str, ...] = CLASSES) -> Job:
    return Job(
        spec=job_spec(classes=classes),
        initial=ModelRef(key="jobs/toy/models/x", sha256="0" * 64, nbytes=nbytes),
        max_update_bytes=2000,
        submitted_by=submitted_by,
        created_at=datetime(2026, 5, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("policy", "asked", "reason"),
    [
        ({}, {}, None),
        ({"classes": {"car", "bus", "tram"}}, {}, None),
        ({"classes": {"car"}}, {}, None),
        ({"classes": {"car"}, "all_classes": True}, {}, "this site has not all of the job's classes: no bus"),
        ({"classes": {"car", "bus"}, "all_classes": True}, {}, None),
        ({"classes": {"Car"}}, {}, "this site has none of the job's classes (car, bus)"),
        ({"classes": set()}, {}, "this site has none of the job's classes (car, bus)"),
        ({"max_model_bytes": 1000}, {}, None),
        ({"max_model_bytes": 999}, {}, "the model has 1000 bytes, this site takes at most 999"),
        ({"submitters": {"server"}}, {}, None),
        ({"submitters": {"server"}}, {"submitted_by": "north"}, "this site takes part in no job of north"),
        ({"submitters": set()}, {}, "this site takes part in no job of server"),
    ],
)
def test_classes_size_and_submitters_decide(
    policy: dict[str, Any], asked: dict[str, Any], reason: str | None
) -> None:
    values = {k: frozenset(v) if isinstance(v, set) else v for k, v in policy.items()}
    assert Policy(**values).objection(job(**asked)) == reason


def test_a_reason_fits_into_a_request_however_many_classes_there_are() -> None:
    many = tuple(f"{'x' * 60}{i}" for i in range(300))
    reason = Policy(classes=frozenset({"car"})).objection(job(classes=many))
    assert reason is not None
    assert len(reason) <= MAX_REASON


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("08:00-17:30", ("08:00", "12:00", "17:29"), ("07:59", "17:30", "00:00")),
        ("22:00-06:00", ("22:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "21:59")),
        ("18:00-24:00", ("18:00", "23:59"), ("00:00", "17:59")),
        ("00:00-06:00", ("00:00", "05:59"), ("06:00", "23:59")),
    ],
)
def test_hours_may_pass_midnight(hours: str, inside: tuple[str, ...], outside: tuple[str, ...]) -> None:
    policy = Policy(hours=Hours.parse(hours))
    assert [policy.not_now(time.fromisoformat(at), None) for at in inside] == [None] * len(inside)
    for at in outside:
        assert "for its hours" in (policy.not_now(time.fromisoformat(at), None) or "")


@pytest.mark.parametrize(
    "text", ["", "22-06", "22:00", "24:00-06:00", "22:60-06:00", "06:00-06:00", "24:00-24:00", "6:00-8:00"]
)
def test_what_are_no_hours(text: str) -> None:
    with pytest.raises(ValueError, match=":"):
        Hours.parse(text)
    with pytest.raises(BadSettings, match="site_hours"):
        Settings.load(site_hours=text)


def test_load_decides_when() -> None:
    noon = time(12)
    assert Policy(max_load=0.5).not_now(noon, 0.5) is None
    assert Policy(max_load=0.5).not_now(noon, None) is None
    assert Policy(max_load=0.5).not_now(noon, 0.51) == "for a load of 0.5 per core, it is 0.51"
    assert Policy().not_now(noon, 99.0) is None


def test_settings_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SITE_CLASSES": "car, traffic light",
        "SITE_ALL_CLASSES": "true",
        "SITE_MAX_MODEL_BYTES": "1000000",
        "SITE_SUBMITTERS": "server,north",
        "SITE_HOURS": "22:00-06:00",
        "SITE_MAX_LOAD": "0.5",
    }.items():
        monkeypatch.setenv(f"FEDQUEUE_{name}", value)
    assert Policy.from_settings(Settings.load(), {"bus"}) == Policy(
        classes=frozenset({"car", "traffic light"}),
        all_classes=True,
        max_model_bytes=1_000_000,
        submitters=frozenset({"server", "north"}),
        hours=Hours(time(22), time(6)),
        max_load=0.5,
    )


def test_without_settings_the_classes_are_those_of_the_data() -> None:
    assert Policy.from_settings(Settings(), {"bus"}) == Policy(classes=frozenset({"bus"}))
    assert Policy.from_settings(Settings()) == Policy()
