"""How a task ends: outages are waited out, then the message goes back; anything else is a failure."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import Reject

from federation.errors import BadJob, StoreUnavailable
from tasks import celery


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes only by sleeping."""
    now = [0.0]
    monkeypatch.setattr(celery.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(celery.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def run(outcomes: list[Exception | None], name: str) -> Any:
    calls = iter(outcomes)

    def work(self: Any) -> None:
        error = next(calls)
        if error is not None:
            raise error

    task: Any = celery.task(name)(work)
    try:
        return task.apply(throw=False)
    finally:
        celery.app.tasks.unregister(name)


def test_a_short_outage_is_waited_out(clock: list[float]) -> None:
    result = run([StoreUnavailable("down")] * 5 + [None], "test.short_outage")
    assert result.state == "SUCCESS"
    assert clock[0] > 1


def test_a_long_outage_gives_the_message_back(clock: list[float]) -> None:
    result = run([StoreUnavailable("down")] * 10_000, "test.long_outage")
    assert result.state == "REJECTED"
    assert isinstance(result.result, Reject)
    assert result.result.requeue
    assert 0.3 < clock[0] / celery.app.conf.task_soft_time_limit <= celery.RETRY_SHARE


def test_what_stays_wrong_fails_at_once(clock: list[float]) -> None:
    result = run([BadJob("wrong for good")], "test.wrong")
    assert result.state == "FAILURE"
    assert clock[0] == 0
