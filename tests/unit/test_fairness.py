"""Start-time fair queueing over a site's jobs, simulated."""

from __future__ import annotations

import random

from producers.fairness import FairShare


def train(share: FairShare, seconds: dict[str, float], times: int) -> dict[str, float]:
    """Let the jobs take turns, each training so long; what each got in seconds."""
    got = dict.fromkeys(seconds, 0.0)
    for _ in range(times):
        job = share.pick(seconds)
        assert job is not None
        share.charge(job, seconds[job])
        got[job] += seconds[job]
    return got


def test_nobody_is_picked_from_nobody() -> None:
    assert FairShare().pick([]) is None


def test_jobs_whose_trainings_last_differently_get_equal_time() -> None:
    seconds = {"quick": 1.0, "slow": 10.0, "medium": 3.0}
    got = train(FairShare(), seconds, 1000)
    assert max(got.values()) - min(got.values()) <= 2 * max(seconds.values())


def test_time_is_equal_at_any_moment_whatever_each_training_takes() -> None:
    rng = random.Random(1)
    share, got, longest = FairShare(), {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for _ in range(2000):
        job = share.pick(["a", "b"])
        assert job is not None
        seconds = rng.expovariate(1.0) * (5 if job == "a" else 1)
        share.charge(job, seconds)
        got[job] += seconds
        longest[job] = max(longest[job], seconds)
        assert abs(got["a"] - got["b"]) <= longest["a"] + longest["b"]


def test_a_new_job_does_not_catch_up_on_the_time_before_it() -> None:
    share = FairShare()
    train(share, {"old": 10.0}, 100)
    got = train(share, {"old": 10.0, "new": 10.0}, 20)
    assert abs(got["old"] - got["new"]) <= 20


def test_a_job_that_could_not_train_for_a_while_does_not_catch_up_either() -> None:
    share = FairShare()
    train(share, {"a": 1.0, "b": 1.0}, 10)
    train(share, {"a": 1.0}, 100)
    got = train(share, {"a": 1.0, "b": 1.0}, 20)
    assert abs(got["a"] - got["b"]) <= 2


def test_a_job_that_waits_between_its_trainings_still_gets_its_turn() -> None:
    """`rare` may train every third time only; then it goes before the one that always may."""
    share, order = FairShare(), []
    for turn in range(30):
        job = share.pick(["always", "rare"] if turn % 3 == 0 else ["always"])
        assert job is not None
        share.charge(job, 1.0)
        order.append(job)
    assert order.count("rare") >= 9


def test_a_job_that_is_over_is_forgotten() -> None:
    share = FairShare()
    train(share, {"a": 1.0, "b": 1.0}, 10)
    share.forget("a")
    assert share.pick(["b"]) == "b"
    assert set(share._finish) == {"b"}
