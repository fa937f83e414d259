"""Decisions about updates, and the heads that follow from them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import transitions
from aggregator.decide import Accept, Duplicate, Refuse, decide, leftovers, stranded, wants_publish
from aggregator.transitions import accept, clear, close, publish, quarantine, refuse, roll_back, still_applies
from aggregator.weighting import assign
from federation.jobs import JobSpec
from federation.types import AbandonedLine, ClientUpdate, Head, Published, Refusal
from tests.unit.aggregator_cases import make_head, make_job, make_spec, make_update, make_version, queue

SPEC = make_spec(max_staleness=10)
JOB = make_job(SPEC)


def reason_of(decision: object) -> str:
    assert isinstance(decision, Refuse)
    assert decision.refusal.message
    return decision.refusal.reason


def refusal_of(update: ClientUpdate, reason: str = "bad-payload", version: int = 0) -> Refusal:
    return Refusal(update=update, reason=reason, message="broken", version=version)


def published(spec: JobSpec, head: Head, count: int, *refused: ClientUpdate) -> Head:
    """The head after merging the first `count` pending that are not refused, renumbered."""
    good = [c.update for c in head.pending if c.update not in refused][:count]
    merged = tuple(assign(spec, update, head.version, i) for i, update in enumerate(good))
    event = Published(merged=merged, refused=tuple(refusal_of(u) for u in refused))
    return publish(spec, head, event, make_version(merged[-1].version))


# --- decide --------------------------------------------------------------------------------------------


def test_a_good_update_is_accepted_with_its_numbers() -> None:
    head = queue(SPEC, make_head(5), make_update(5), make_update(5, site="site-b"))
    update = make_update(4, site="site-c")
    decision = decide(JOB, head, update)
    assert decision == Accept(assign(SPEC, update, version=5, position=2), maybe_forgotten=False)
    assert isinstance(decision, Accept)
    assert (decision.contribution.staleness, decision.contribution.version) == (3, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": "site-x"}, "not-a-participant"),
        ({"base_version": 6}, "future-base"),
        ({"kind": "difference"}, "wrong-payload-kind"),
        ({"payload_bytes": 1001}, "too-large"),
    ],
)
def test_a_wrong_update_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    update = make_update(**{"base_version": 5, **changes})
    decision = decide(JOB, make_head(5), update)
    assert isinstance(decision, Refuse)
    assert decision.refusal.update == update
    assert (decision.refusal.reason, decision.refusal.version) == (reason, 5)


def test_limits_are_inclusive() -> None:
    assert isinstance(decide(JOB, make_head(5), make_update(5, payload_bytes=1000)), Accept)


def test_only_published_versions_can_be_a_base_even_if_later_ones_are_pending() -> None:
    head = queue(SPEC, make_head(5), make_update(5))
    assert reason_of(decide(JOB, head, make_update(6, site="site-b"))) == "future-base"


def test_without_a_list_of_participants_every_site_may_contribute() -> None:
    job = make_job(make_spec(sites=None))
    assert isinstance(decide(job, make_head(), make_update(site="anybody")), Accept)


def test_a_closed_job_refuses() -> None:
    assert reason_of(decide(JOB, make_head(5, closed="done"), make_update(5))) == "job-closed"


@pytest.mark.parametrize(("pending", "accepted"), [(0, True), (1, True), (2, False)])
def test_staleness_is_counted_against_the_version_that_the_update_would_meet(
    pending: int, accepted: bool
) -> None:
    head = queue(SPEC, make_head(14), *(make_update(14) for _ in range(pending)))
    decision = decide(JOB, head, make_update(5, site="site-b"))  # 9 behind what is published, 10 are allowed
    assert isinstance(decision, Accept) == accepted
    if not accepted:
        assert reason_of(decision) == "too-stale"


def test_fedbuff_counts_staleness_in_flushes() -> None:
    spec = make_spec("fedbuff", buffer_size=2, max_staleness=10)
    head = queue(spec, make_head(14), make_update(14), make_update(14), make_update(14))
    update = make_update(5, kind="difference")
    decision = decide(make_job(spec), head, update)
    assert isinstance(decision, Accept)
    assert decision.contribution.staleness == 10
    assert (
        reason_of(decide(make_job(spec), accept(head, decision.contribution), make_update(5))) == "too-stale"
    )


def test_too_stale_says_whether_the_id_may_have_been_forgotten() -> None:
    by_queue = decide(JOB, queue(SPEC, make_head(15), make_update(15)), make_update(5))
    by_version = decide(JOB, make_head(16), make_update(5))
    assert isinstance(by_queue, Refuse)
    assert isinstance(by_version, Refuse)
    assert (by_queue.maybe_forgotten, by_version.maybe_forgotten) == (False, True)


def test_too_stale_comes_before_every_refusal_so_that_a_forgotten_id_is_looked_up() -> None:
    ancient = make_update(0, site="site-x", kind="difference", payload_bytes=9999)
    decision = decide(JOB, make_head(50, closed="done"), ancient)
    assert isinstance(decision, Refuse)
    assert decision.maybe_forgotten


# --- duplicates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [None, "done"])
def test_a_redelivery_is_a_duplicate_whatever_has_changed_since(closed: str | None) -> None:
    update = make_update(0)
    head = queue(SPEC, make_head(0), update)
    assert decide(JOB, head, update) == Duplicate(None)  # pending
    head = published(SPEC, head, 1)
    head = close(head, closed) if closed else head
    assert decide(JOB, head, update) == Duplicate(None)  # merged


def test_a_refused_id_stays_refused_with_its_reason() -> None:
    update = make_update(9)
    head = refuse(SPEC, make_head(5), refusal_of(update, "future-base"))
    assert decide(JOB, head, update) == Duplicate("future-base")
    # by now it would be acceptable, if it were not remembered
    later = Head(current=make_version(9), remembered=head.remembered)
    assert decide(JOB, later, update) == Duplicate("future-base")


@pytest.mark.parametrize(
    ("head", "base"), [(make_head(50), 39), (make_head(5, closed="done"), 5)], ids=["too old", "closed"]
)
def test_an_id_that_would_be_refused_for_ever_is_not_remembered(head: Head, base: int) -> None:
    update = make_update(base)
    decision = decide(JOB, head, update)
    assert isinstance(decision, Refuse)
    assert decision.maybe_forgotten, "only the log's history knows it from now on"
    assert refuse(SPEC, head, decision.refusal) == head


def test_a_full_memory_forgets_the_oldest_bases_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "REMEMBERED_LIMIT", 3)
    old, new = [make_update(0) for _ in range(2)], [make_update(1) for _ in range(3)]
    head = published(SPEC, queue(SPEC, make_head(1), *old, *new), 5)
    assert [known.update_id for known in head.remembered] == [update.update_id for update in new]
    assert head.remembered_from == 1
    assert decide(JOB, head, new[0]) == Duplicate(None)
    for update, maybe_forgotten in ((old[0], True), (make_update(1), False)):
        decision = decide(JOB, head, update)
        assert isinstance(decision, Accept)
        assert decision.maybe_forgotten == maybe_forgotten
    many = [make_update(99) for _ in range(5)]
    for update in many:
        head = refuse(SPEC, head, refusal_of(update, "future-base"))
    assert len(head.remembered) <= 3, "a flood of refusals does not fill it either"


def test_a_pending_update_that_turned_out_bad_is_remembered_as_refused() -> None:
    good, bad = make_update(0), make_update(0, site="site-b")
    head = published(SPEC, queue(SPEC, make_head(), bad, good), 1, bad)
    assert decide(JOB, head, bad) == Duplicate("bad-payload")
    assert decide(JOB, head, good) == Duplicate(None)


def advance(head: Head, to: int) -> Head:
    """Publish fresh updates one by one until version `to`."""
    while head.version < to:
        head = published(SPEC, queue(SPEC, head, make_update(head.version, site="site-c")), 1)
    return head


@pytest.mark.parametrize(("version", "remembered"), [(1, True), (10, True), (11, False), (12, False)])
def test_an_id_is_forgotten_exactly_when_a_redelivery_is_certain_to_be_too_stale(
    version: int, remembered: bool
) -> None:
    update = make_update(0)
    head = advance(published(SPEC, queue(SPEC, make_head(), update), 1), version)
    assert head.version == version
    assert (update.update_id in {known.update_id for known in head.remembered}) == remembered
    decision = decide(JOB, head, update)
    if remembered:
        assert decision == Duplicate(None)
    else:
        assert isinstance(decision, Refuse)
        assert decision.maybe_forgotten


actions = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 6)),  # base so many versions behind
        st.tuples(st.just("redeliver"), st.integers(0, 100)),
        st.tuples(st.just("publish"), st.integers(0, 5)),  # bits: which of the first pending are unreadable
        st.tuples(st.just("rollback"), st.integers(1, 6)),  # by so many versions
        st.tuples(st.just("quarantine"), st.integers(0, 3)),  # so many before the newest; or clear
    ),
    max_size=40,
)


@given(actions, st.sampled_from(["fedasync", "fedbuff", "fedavg"]), st.sampled_from([0, 1, 3, 256]))
def test_no_update_ends_twice_and_memory_is_bounded(
    history: list[tuple[str, int]], strategy: str, limit: int
) -> None:
    with mock.patch.object(transitions, "REMEMBERED_LIMIT", limit):
        check_history(history, strategy, limit)


def check_history(history: list[tuple[str, int]], strategy: str, limit: int) -> None:
    spec = make_spec(strategy, max_staleness=3, buffer_size=2)
    job, head = make_job(spec), make_head()
    sent: list[ClientUpdate] = []
    accepted: dict[str, int] = {}
    refused: dict[str, int] = {}
    ended: list[str] = []  # by a rollback
    for action, number in history:
        if action == "publish":
            if not wants_publish(spec, head):
                continue
            bad = [c.update for i, c in enumerate(head.pending) if number >> i & 1]
            good = len(head.pending) - len(bad)
            size = {"fedasync": 1, "fedbuff": 2, "fedavg": 3}[strategy]
            if good >= size:
                head = published(spec, head, good - good % size, *bad)
            else:
                event = Published(merged=(), refused=tuple(refusal_of(u) for u in bad))
                head = publish(spec, head, event, head.current)
            assert all(known.base_version >= head.version - 3 for known in head.remembered)
            assert len(head.remembered) <= limit
            continue
        if action == "rollback":
            to = max(0, head.version - number)
            held = head.quarantine is not None and to >= head.quarantine.version
            if to == head.version or held:
                continue
            stranded_now = stranded(head, to)
            before, head = head, roll_back(spec, head, make_version(to), stranded_now)
            assert all(c.update.base_version <= to for c in head.pending)
            assert len(head.pending) + len(stranded_now) == len(before.pending)
            assert all(
                head.is_rolled_back(v) == (v > to or before.is_rolled_back(v)) for v in range(head.version)
            )
            assert not head.is_rolled_back(head.version)
            for refusal in stranded_now:
                ended.append(refusal.update.update_id)
            continue
        if action == "quarantine":
            failed = head.version - number
            if head.quarantine is not None:
                head = clear(head)
            elif failed > 0 and not (
                head.withdrawn(failed) or head.withdrawn(failed - 1) or failed <= max(head.cleared, default=0)
            ):
                head = quarantine(head, failed, "worse", make_version(failed - 1))
                assert not wants_publish(spec, head)
            continue
        if action == "send":
            site = ("site-a", "site-b", "site-c")[number % 3]
            base = max(0, head.version - number)
            update = make_update(base, site=site, kind=spec.aggregation.payload_kind)
            sent.append(update)
        elif sent:
            update = sent[number % len(sent)]
        else:
            continue
        decision = decide(job, head, update)
        if isinstance(decision, Duplicate):
            continue
        if decision.maybe_forgotten and update.update_id in accepted.keys() | refused.keys():
            continue  # what the caller's search of the log's history finds
        if isinstance(decision, Accept):
            head = accept(head, decision.contribution)
            accepted[update.update_id] = accepted.get(update.update_id, 0) + 1
        else:
            head = refuse(spec, head, decision.refusal)
            refused[update.update_id] = refused.get(update.update_id, 0) + 1
    assert set(accepted.values()) <= {1}
    assert set(refused.values()) <= {1}
    assert not accepted.keys() & refused.keys()
    assert len(ended) == len(set(ended))
    assert accepted.keys() >= set(ended)
    assert not set(ended) & {c.update.update_id for c in head.pending}


# --- rollbacks and quarantines ----------------------------------------------------------------------------


def test_an_update_of_the_abandoned_line_is_refused_and_an_older_one_counts() -> None:
    head = roll_back(SPEC, make_head(5), make_version(2), ())
    assert (head.version, head.current.model) == (6, make_version(2).model)
    for base, reason in {3: "abandoned-base", 5: "abandoned-base", 2: None, 6: None}.items():
        decision = decide(JOB, head, make_update(base))
        assert (decision.refusal.reason if isinstance(decision, Refuse) else None) == reason
        if isinstance(decision, Accept):
            assert decision.contribution.staleness == 6 - base


def test_pending_updates_of_the_abandoned_line_end_with_the_rollback() -> None:
    old, new = make_update(2), make_update(4)
    head = queue(SPEC, make_head(5), old, new)
    (refusal,) = stranded(head, 3)
    assert (refusal.update, refusal.reason) == (new, "abandoned-base")
    after = roll_back(SPEC, head, make_version(3), (refusal,))
    assert [c.update for c in after.pending] == [old]
    assert decide(JOB, after, new) == Duplicate("abandoned-base")


def test_lines_that_touch_are_one_and_the_others_stay() -> None:
    head = roll_back(SPEC, make_head(5), make_version(4), ())  # 5 goes
    head = published(SPEC, queue(SPEC, head, make_update(6)), 1)  # 7 from 6
    head = roll_back(SPEC, head, make_version(6), ())  # 7 goes
    assert head.abandoned == (AbandonedLine(first=5, last=5), AbandonedLine(first=7, last=7))
    head = roll_back(SPEC, head, make_version(5), ())  # back to what was abandoned: 6 to 8 go, too
    assert head.abandoned == (AbandonedLine(first=5, last=8),)
    head = roll_back(SPEC, head, make_version(2), ())
    assert head.abandoned == (AbandonedLine(first=3, last=9),)


def test_a_rollback_ends_a_quarantine_and_forgets_what_was_cleared_after_it() -> None:
    head = clear(quarantine(make_head(9), 3, "worse", make_version(2)))
    head = clear(quarantine(head, 6, "worse", make_version(5)))
    head = quarantine(head, 8, "worse", make_version(7))
    with pytest.raises(ValueError, match="in quarantine"):
        roll_back(SPEC, head, make_version(8), ())
    after = roll_back(SPEC, head, make_version(5), ())
    assert (after.quarantine, after.cleared, after.offered.version) == (None, (3,), 10)


def test_a_rollback_goes_back_and_only_in_an_open_job() -> None:
    with pytest.raises(ValueError, match="not older"):
        roll_back(SPEC, make_head(3), make_version(3), ())
    with pytest.raises(ValueError, match="closed"):
        roll_back(SPEC, make_head(3, closed="over"), make_version(2), ())


def test_in_quarantine_each_site_may_have_as_much_waiting_as_it_may_send() -> None:
    head = quarantine(make_head(5), 5, "worse", make_version(4))
    head = queue(SPEC, head, make_update(5))
    assert not wants_publish(SPEC, head)
    decision = decide(JOB, head, make_update(5))
    assert isinstance(decision, Refuse)
    assert decision.refusal.reason == "too-many-pending"
    assert isinstance(decide(JOB, head, make_update(5, site="site-b")), Accept)
    assert isinstance(decide(JOB, clear(head), make_update(5)), Accept)


def test_a_publish_is_dropped_if_its_model_was_rolled_back_or_put_in_quarantine() -> None:
    head = queue(SPEC, make_head(5), make_update(3))
    event = Published(merged=head.pending)
    assert still_applies(head, event, head.current)
    held = quarantine(head, 5, "worse", make_version(4))
    assert not still_applies(held, event, head.current)
    assert not still_applies(roll_back(SPEC, head, make_version(4), ()), event, head.current)
    assert still_applies(clear(held), event, head.current)


# --- FedAvg rounds -------------------------------------------------------------------------------------

ROUND = make_spec("fedavg")


def test_a_round_takes_one_update_of_each_site() -> None:
    job, head = make_job(ROUND), queue(ROUND, make_head(), make_update(site="site-a"))
    assert reason_of(decide(job, head, make_update(site="site-a"))) == "already-contributed"
    decision = decide(job, head, make_update(site="site-b"))
    assert isinstance(decision, Accept)
    assert (decision.contribution.staleness, decision.contribution.version) == (0, 1)


def test_a_round_takes_only_updates_of_its_own_version() -> None:
    job = make_job(ROUND)
    late = decide(job, make_head(1), make_update(0))
    assert isinstance(late, Refuse)
    assert not late.maybe_forgotten
    assert reason_of(late) == "too-stale"
    assert reason_of(decide(job, make_head(1), make_update(2))) == "future-base"
    assert isinstance(decide(job, make_head(1), make_update(1)), Accept)


def test_a_site_whose_update_was_bad_may_contribute_again() -> None:
    bad = make_update(site="site-a")
    head = refuse(ROUND, queue(ROUND, make_head(), bad), refusal_of(bad))
    assert isinstance(decide(make_job(ROUND), head, make_update(site="site-a")), Accept)


# --- wants_publish -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sites", "expected"),
    [
        (make_spec(), [], False),
        (make_spec(), ["site-a"], True),
        (make_spec("fedbuff", buffer_size=2), ["site-a"], False),
        (make_spec("fedbuff", buffer_size=2), ["site-a", "site-a"], True),
        (make_spec("fedavg"), ["site-a", "site-b"], False),
        (make_spec("fedavg"), ["site-c", "site-a", "site-b"], True),
    ],
)
def test_wants_publish(spec: JobSpec, sites: list[str], expected: bool) -> None:
    head = queue(spec, make_head(), *(make_update(site=site) for site in sites))
    assert wants_publish(spec, head) is expected
    assert not wants_publish(spec, close(head, "done"))


# --- transitions ---------------------------------------------------------------------------------------


def test_accept_appends_and_remembers() -> None:
    first, second = make_update(), make_update(site="site-b")
    head = queue(SPEC, make_head(), first, second)
    assert [c.update for c in head.pending] == [first, second]
    assert [known.update_id for known in head.remembered] == [first.update_id, second.update_id]
    assert head.current == make_version(0)


def test_publish_leaves_what_was_accepted_in_between() -> None:
    before, between = make_update(0), make_update(0, site="site-b")
    start = queue(SPEC, make_head(), before)
    event = Published(merged=start.pending)
    head = queue(SPEC, start, between)
    assert still_applies(head, event, start.current)
    head = publish(SPEC, head, event, make_version(1))
    assert [c.update for c in head.pending] == [between]
    assert (head.version, head.closed) == (1, None)
    assert len(head.remembered) == 2


def test_the_numbers_of_those_left_are_still_right_after_a_publish() -> None:
    head = queue(SPEC, make_head(), *(make_update(0) for _ in range(4)))
    left = published(SPEC, head, 3).pending
    assert left == (assign(SPEC, left[0].update, version=3, position=0),)


def test_publish_may_close_the_job() -> None:
    head = queue(SPEC, make_head(), make_update(0))
    head = publish(SPEC, head, Published(merged=head.pending), make_version(1), "max_versions is reached")
    assert head.closed == "max_versions is reached"
    assert head.pending == ()


def test_work_is_dropped_if_another_publish_won_or_the_job_was_closed() -> None:
    start = queue(SPEC, make_head(), make_update(0))
    event = Published(merged=start.pending)
    won = published(SPEC, start, 1)
    assert not still_applies(won, event, start.current)
    assert not still_applies(close(start, "stopped"), event, start.current)
    assert not still_applies(start, event, make_version(1))
    for head in (won, close(start, "stopped")):
        with pytest.raises(ValueError, match="moved on"):
            publish(SPEC, head, event, make_version(2))


def test_publish_refuses_a_version_that_its_contributions_do_not_make() -> None:
    head = queue(SPEC, make_head(), make_update(0), make_update(0))
    with pytest.raises(ValueError, match="not what the last"):
        publish(SPEC, head, Published(merged=head.pending), make_version(1))
    with pytest.raises(ValueError, match="nothing was merged"):
        publish(SPEC, head, Published(merged=()), make_version(1))


def test_a_publish_that_found_only_bad_updates_keeps_the_version() -> None:
    bad = make_update(0)
    head = queue(SPEC, make_head(), bad)
    after = publish(SPEC, head, Published(merged=(), refused=(refusal_of(bad),)), head.current)
    assert (after.version, after.pending) == (0, ())
    assert decide(JOB, after, bad) == Duplicate("bad-payload")


def test_an_id_is_recorded_once() -> None:
    update = make_update(0)
    head = queue(SPEC, make_head(), update)
    with pytest.raises(ValueError, match="in the log already"):
        queue(SPEC, head, update)
    with pytest.raises(ValueError, match="merged or refused before"):
        refuse(SPEC, published(SPEC, head, 1), refusal_of(update))
    with pytest.raises(ValueError, match="merged or refused before"):
        refuse(SPEC, refuse(SPEC, head, refusal_of(update)), refusal_of(update))
    with pytest.raises(ValueError, match="cannot be accepted"):
        queue(SPEC, close(head, "done"), make_update(0))


def test_closing_keeps_the_first_reason() -> None:
    assert close(close(make_head(), "first"), "second").closed == "first"


def test_what_is_pending_when_a_job_closes_is_refused() -> None:
    updates = [make_update(0), make_update(0, site="site-b")]
    head = queue(SPEC, make_head(), *updates)
    assert leftovers(head) == ()
    head = close(head, "stopped by its owner")
    assert [(r.update, r.reason) for r in leftovers(head)] == [(u, "job-closed") for u in updates]
    for refusal in leftovers(head):
        head = refuse(SPEC, head, refusal)
    assert (head.pending, leftovers(head), head.closed) == ((), (), "stopped by its owner")
    assert decide(JOB, head, updates[0]) == Duplicate("job-closed")
