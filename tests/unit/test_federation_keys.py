"""Object keys: the layout of docs/protocol.md, and no value that leaves its prefix."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import keys
from federation.errors import CorruptLog
from tests.unit.federation_cases import digests, names, update_ids, versions

SEGMENT = re.compile(r"[A-Za-z0-9._-]+\Z")


def test_the_layout_of_the_protocol() -> None:
    update_id = "0190b5a0-0000-7000-8000-000000000000"
    assert keys.job_key("street") == "jobs/street/job.json"
    assert keys.log_key("street", 42) == "jobs/street/log/00000000000000000042.json"
    assert keys.model_key("street", "ab") == "jobs/street/models/ab.safetensors"
    assert (
        keys.update_key("street", "north", update_id) == f"jobs/street/updates/north/{update_id}.safetensors"
    )
    assert keys.rejected_key("street", "north", update_id) == f"jobs/street/rejected/north/{update_id}.json"
    assert keys.metrics_key("street", 7, "server") == "jobs/street/metrics/0000000007/server.json"
    assert keys.proposal_key("street", 7) == "jobs/street/releases/0000000007/proposal.json"
    assert keys.release_record_key("street", 7, 2) == "jobs/street/releases/0000000007/answers/000002.json"
    assert keys.bundle_key("street", 7, "x") == "jobs/street/releases/0000000007/bundle/x"
    assert keys.site_key("north") == "sites/north.json"
    assert keys.deadletter_key("x") == "deadletters/x.json"
    assert keys.PROBE_PREFIX == "_probe/"


@given(names, st.integers(0, 10**20 - 1))
def test_log_keys_round_trip(job: str, seq: int) -> None:
    assert keys.log_seq(keys.log_key(job, seq)) == seq


@given(names, st.integers(0, 10**20 - 1), st.integers(0, 10**20 - 1))
def test_log_keys_sort_as_their_numbers(job: str, a: int, b: int) -> None:
    assert (keys.log_key(job, a) < keys.log_key(job, b)) == (a < b)


@given(names, versions, versions, names)
def test_metrics_keys_sort_as_their_versions(job: str, a: int, b: int, who: str) -> None:
    assert (keys.metrics_key(job, a, who) < keys.metrics_key(job, b, who)) == (a < b)


@pytest.mark.parametrize(
    "key",
    [
        "jobs/a/log/42.json",
        "jobs/a/log/000000000000000000042.json",  # 21 digits
        "jobs/a/log/0000000000000000004x.json",
        "jobs/a/log/-0000000000000000042.json",
        "jobs/a/log/+0000000000000000042.json",
        "jobs/a/log/0000000000000000004٢.json",  # an Arabic digit
        "jobs/a/log/00000000000000000042",
        "jobs/a/log/00000000000000000042.json.json",
        "jobs/a/log/00000000000000000042.json.tmp",
        "jobs/a/log/",
        "",
    ],
)
def test_what_is_no_log_key(key: str) -> None:
    with pytest.raises(CorruptLog, match="not the key of a log record"):
        keys.log_seq(key)


@given(names, names, update_ids, digests, versions)
def test_every_key_of_a_job_lies_below_the_job(
    job: str, site: str, update_id: str, digest: str, version: int
) -> None:
    made = [
        keys.job_key(job),
        keys.log_key(job, version),
        keys.model_key(job, digest),
        keys.update_key(job, site, update_id),
        keys.rejected_key(job, site, update_id),
        keys.metrics_key(job, version, site),
    ]
    assert len(set(made)) == len(made)
    for key in made:
        assert key.startswith(f"jobs/{job}/")
        assert all(SEGMENT.match(part) and part not in (".", "..") for part in key.split("/"))
        assert len(key) <= 256


@given(names, names)
def test_no_job_lies_below_another(a: str, b: str) -> None:
    """A listing of one job's prefix never shows another job, even one whose name begins alike."""
    assert keys.job_key(b).startswith(keys.job_prefix(a)) == (a == b)
    assert not keys.job_key(f"{a[:50]}x").startswith(keys.job_prefix(a[:50]))


def test_prefixes_are_prefixes() -> None:
    assert keys.log_key("a", 1).startswith(keys.log_prefix("a"))
    assert keys.rejected_key("a", "b", "c").startswith(keys.rejected_prefix("a"))
    assert keys.metrics_key("a", 1, "c").startswith(keys.metrics_prefix("a"))
    assert keys.job_prefix("a").startswith(keys.JOBS_PREFIX)
    assert keys.deadletter_key("a").startswith(keys.DEADLETTERS_PREFIX)
