"""Invitations are used once, and an interval lies between two trainings, across restarts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from federation.governance import Invitation
from federation.jobs import Participation
from producers.turns import FILE, Turns

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
INVITED = Participation(mode="invited")
FREE = Participation()
HOURLY = Participation(min_interval_s=3600)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def invitation(invited: float = 0.0, lease_s: float = 600.0) -> Invitation:
    return Invitation(
        job="toy", site="site-a", version=0, invited_at=at(invited), expires_at=at(invited + lease_s)
    )


def test_a_free_running_job_waits_for_nothing_and_writes_nothing(tmp_path: Path) -> None:
    turns = Turns(FREE, tmp_path)
    assert turns.waits_for(None, NOON) is None
    turns.use(None, NOON)
    assert turns.waits_for(None, NOON) is None
    assert not (tmp_path / FILE).exists()


def test_an_invitation_is_needed_and_used_once(tmp_path: Path) -> None:
    turns = Turns(INVITED, tmp_path)
    assert turns.waits_for(None, NOON) == "for an invitation"
    assert turns.waits_for(invitation(), at(1)) is None
    turns.use(invitation(), at(1))
    assert turns.waits_for(invitation(), at(2)) == "for an invitation"
    assert Turns(INVITED, tmp_path).waits_for(invitation(), at(2)) == "for an invitation"
    assert Turns(INVITED, tmp_path).waits_for(invitation(3), at(4)) is None


def test_an_invitation_is_over_when_its_lease_is(tmp_path: Path) -> None:
    assert Turns(INVITED, tmp_path).waits_for(invitation(), at(599)) is None
    assert Turns(INVITED, tmp_path).waits_for(invitation(), at(600)) == "for an invitation"


def test_the_interval_is_between_the_starts(tmp_path: Path) -> None:
    turns = Turns(HOURLY, tmp_path)
    assert turns.waits_for(None, NOON) is None
    turns.use(None, NOON)
    for restarted in (turns, Turns(HOURLY, tmp_path)):
        assert restarted.waits_for(None, at(600)) == "3000 s until its next training"
        assert restarted.waits_for(None, at(3600)) is None
        assert restarted.waits_for(None, at(-600)) is None, "a clock that was put back keeps nobody waiting"


def test_both_must_be_so(tmp_path: Path) -> None:
    turns = Turns(Participation(mode="invited", min_interval_s=60), tmp_path)
    turns.use(invitation(), NOON)
    assert turns.waits_for(invitation(30), at(31)) == "29 s until its next training"
    assert turns.waits_for(invitation(30), at(60)) is None


@pytest.mark.parametrize("content", [b"", b"{}x", b'{"invited_at": 3}'])
def test_a_damaged_memory_is_begun_anew(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert Turns(INVITED, tmp_path).waits_for(invitation(), at(1)) is None
    assert "begun anew" in caplog.text
