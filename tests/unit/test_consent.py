"""The rule of a release: who must approve, and where a proposal stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.consent import judge, needed
from federation.jobs import ReleaseRule

ALL, MAJORITY = ReleaseRule(approvals="all"), ReleaseRule(approvals="majority")


@pytest.mark.parametrize(
    ("contributors", "by_all", "by_majority"), [(1, 1, 1), (2, 2, 2), (3, 3, 2), (4, 4, 3), (5, 5, 3)]
)
def test_how_many_must_approve(contributors: int, by_all: int, by_majority: int) -> None:
    assert (needed(ALL, contributors), needed(MAJORITY, contributors)) == (by_all, by_majority)


def test_all_means_all() -> None:
    sites = ("a", "b", "c")
    assert not judge(ALL, sites, {"a": True, "b": True}).met
    assert judge(ALL, sites, {"a": True, "b": True}).waiting == ("c",)
    assert judge(ALL, sites, dict.fromkeys(sites, True)).met
    refused = judge(ALL, sites, {"a": False, "b": True})
    assert refused.blocked
    assert not refused.met
    assert refused.describe() == "1 of 3 approved, 3 needed; refused by a; waiting for c"


def test_a_majority_is_more_than_half() -> None:
    sites = ("a", "b", "c", "d")
    assert not judge(MAJORITY, sites, {"a": True, "b": True}).met
    assert judge(MAJORITY, sites, {"a": True, "b": True, "c": True, "d": False}).met
    assert judge(MAJORITY, sites, {"a": False, "b": False}).blocked
    assert not judge(MAJORITY, sites, {"a": False}).blocked


def test_who_is_no_contributor_does_not_count() -> None:
    assert not judge(ALL, ("a", "b"), {"a": True, "x": True, "y": True}).met
    assert judge(ALL, ("a",), {"a": True, "x": False}).met


@given(
    st.sampled_from([ALL, MAJORITY]),
    st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from([True, False, None]), min_size=1),
)
def test_never_met_and_blocked_at_once_and_approvals_only_help(
    rule: ReleaseRule, answers: dict[str, bool | None]
) -> None:
    sites = sorted(answers)
    said = {site: answer for site, answer in answers.items() if answer is not None}
    standing = judge(rule, sites, said)
    assert not (standing.met and standing.blocked)
    assert sorted(standing.approved + standing.refused + standing.waiting) == sites
    if standing.met:
        assert all(judge(rule, sites, {**said, site: True}).met for site in sites)
    if not standing.waiting:
        assert standing.met != standing.blocked
