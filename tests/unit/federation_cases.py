"""Arbitrary valid values of federation/, for properties: each strategy covers what its type allows."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta, timezone

from hypothesis import strategies as st

from federation.jobs import (
    AggregationPolicy,
    ConstantStaleness,
    HingeStaleness,
    JobSpec,
    ModelRef,
    PolynomialStaleness,
)
from federation.keys import update_key
from federation.types import (
    AbandonedLine,
    ClientUpdate,
    Contribution,
    Head,
    ModelVersion,
    Quarantine,
    Refusal,
    Remembered,
    SiteStatus,
)

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
update_ids = st.integers(0, 2**122 - 1).map(
    lambda n: str(
        uuid.UUID(int=(n >> 74) << 80 | 7 << 76 | (n >> 62 & 0xFFF) << 64 | 2 << 62 | n & (1 << 62) - 1)
    )
)
versions = st.integers(0, 10**9)
times = st.datetimes(
    datetime(2020, 1, 1),
    datetime(2100, 1, 1),
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=5.5))]),
)
metrics = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_.:@\[\]/ -]{1,64}", fullmatch=True),
    st.floats(allow_nan=False, allow_infinity=False),
    max_size=8,
)
texts = st.text(st.characters(codec="utf-8"), max_size=60)


@st.composite
def client_updates(draw: st.DrawFn) -> ClientUpdate:
    job, site, update_id = draw(names), draw(names), draw(update_ids)
    return ClientUpdate(
        update_id=update_id,
        job=job,
        site=site,
        base_version=draw(versions),
        num_examples=draw(st.integers(1, 10**12)),
        payload_kind=draw(st.sampled_from(["weights", "difference"])),
        payload_key=update_key(job, site, update_id),
        payload_sha256=draw(digests),
        payload_bytes=draw(st.integers(1, 2**40)),
        metrics=draw(metrics),
        created_at=draw(times),
    )


site_statuses = st.builds(
    SiteStatus,
    site=names,
    state=st.sampled_from(["idle", "pulling", "training", "uploading", "evaluating", "waiting", "stopped"]),
    job=st.none() | names,
    base_version=st.none() | versions,
    step=st.integers(0, 2**40),
    steps=st.integers(0, 2**40),
    epoch=st.floats(0, 1e9),
    outbox=st.integers(0, 2**40),
    updates=st.integers(0, 2**40),
    detail=texts,
    dropped=st.integers(0, 2**40),
    problem=texts,
    problem_at=st.none() | times,
    agent_version=st.text("0123456789.", max_size=32),
    at=times,
)

model_refs = st.builds(
    ModelRef, key=st.text("abc/.", min_size=1), sha256=digests, nbytes=st.integers(1, 2**40)
)

contributions = st.builds(
    Contribution,
    update=client_updates(),
    staleness=st.integers(0, 10**6),
    weight=st.floats(0, 1e12),
    version=st.integers(1, 10**9),
)

refusals = st.builds(
    Refusal,
    update=client_updates(),
    reason=st.text(st.characters(codec="utf-8"), max_size=64),
    message=texts,
    version=versions,
)

model_versions = st.builds(
    ModelVersion, version=versions, model=model_refs, server_state=st.none() | model_refs
)
version_numbers = st.integers(1, 10**9)

heads = st.builds(
    Head,
    current=model_versions,
    pending=st.lists(contributions, max_size=2).map(tuple),
    remembered=st.lists(
        st.builds(Remembered, update_id=update_ids, base_version=versions, reason=st.none() | texts),
        max_size=2,
    ).map(tuple),
    closed=st.none() | texts,
    hold=st.none() | texts,
    quarantine=st.none()
    | st.builds(Quarantine, version=version_numbers, reason=texts, offered=model_versions),
    stable=st.none() | model_versions,
    abandoned=st.lists(st.builds(AbandonedLine, first=version_numbers, last=version_numbers), max_size=2).map(
        tuple
    ),
    cleared=st.lists(version_numbers, max_size=2).map(tuple),
)

stalenesses = (
    st.just(ConstantStaleness())
    | st.builds(PolynomialStaleness, a=st.floats(0, 100))
    | st.builds(HingeStaleness, a=st.floats(0, 1e6), b=st.floats(0, 1e6))
)

aggregation_policies = st.builds(
    AggregationPolicy,
    strategy=st.sampled_from(["fedasync", "fedbuff"]),
    alpha=st.floats(0, 1, exclude_min=True),
    staleness=stalenesses,
    buffer_size=st.integers(1, 50),
    max_staleness=st.integers(0, 1_000_000),
    max_pending=st.integers(50, 10_000),
)

job_specs = st.builds(
    JobSpec,
    id=names,
    classes=st.lists(st.text(min_size=1, max_size=64), min_size=1, max_size=5, unique=True).map(tuple),
    participants=st.none() | st.lists(names, max_size=4, unique=True).map(tuple),
    aggregation=aggregation_policies,
)
