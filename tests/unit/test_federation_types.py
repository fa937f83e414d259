"""The nouns: JSON round trips, rules that span fields, and no silence about mistakes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from federation.base import Value
from federation.errors import BadJob, Rejected
from federation.jobs import (
    AggregationPolicy,
    Augmentation,
    HingeStaleness,
    Job,
    JobSpec,
    ModelRef,
    PolynomialStaleness,
    ServerOptimizer,
    TrainingPlan,
)
from federation.types import (
    Accepted,
    Cleared,
    ClientUpdate,
    Closed,
    Collected,
    Contribution,
    Created,
    DeadLetter,
    Evaluation,
    Head,
    Held,
    LogRecord,
    Promoted,
    Published,
    Quarantined,
    Refusal,
    Refused,
    Resumed,
    RolledBack,
    SiteStatus,
)
from tests.unit.federation_cases import (
    aggregation_policies,
    client_updates,
    contributions,
    heads,
    job_specs,
    metrics,
    model_refs,
    names,
    refusals,
    site_statuses,
    texts,
    times,
    update_ids,
    version_numbers,
    versions,
)

events = st.one_of(
    st.just(Created()),
    st.builds(Accepted, contribution=contributions),
    st.builds(Refused, refusal=refusals),
    st.builds(
        Published,
        merged=st.lists(contributions, max_size=2).map(tuple),
        refused=st.lists(refusals, max_size=1).map(tuple),
    ),
    st.builds(Closed, reason=texts, by=names),
    st.builds(Held, reason=texts, by=names),
    st.builds(Resumed, by=names),
    st.builds(Quarantined, version=version_numbers, reason=texts),
    st.builds(Cleared, version=version_numbers, by=names),
    st.builds(Promoted, version=versions, by=names),
    st.builds(
        RolledBack,
        to=versions,
        reason=texts,
        by=names,
        refused=st.lists(refusals, max_size=1).map(tuple),
        request_id=st.none() | update_ids,
    ),
    st.builds(Collected, keys=st.lists(texts, min_size=1, max_size=3).map(tuple)),
)
records = st.builds(
    LogRecord,
    job=names,
    seq=st.integers(0, 10**12),
    nonce=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    at=times,
    event=events,
    head=heads,
)
jobs = st.builds(
    Job, spec=job_specs, initial=model_refs, max_update_bytes=st.integers(1, 2**40), created_at=times
)
evaluations = st.builds(
    Evaluation,
    job=names,
    version=versions,
    who=names,
    num_images=st.integers(0, 10**6),
    metrics=metrics,
    per_class=st.dictionaries(
        st.text("abcmAP@0.5:[] ", min_size=1, max_size=64),
        st.dictionaries(st.text(min_size=1, max_size=64), st.floats(0, 1), max_size=3),
        max_size=3,
    ),
    at=times,
)
dead_letters = st.builds(
    DeadLetter,
    id=st.uuids().map(str),
    reason=texts,
    message=texts,
    queue=texts,
    routing_key=texts,
    user_id=st.none() | texts,
    content_type=st.none() | texts,
    headers=texts,
    body_base64=st.text("abcABC+/=", max_size=40),
    at=times,
)


@given(
    st.one_of(
        client_updates(),
        site_statuses,
        job_specs,
        jobs,
        aggregation_policies,
        contributions,
        refusals,
        heads,
        records,
        evaluations,
        dead_letters,
    )
)
def test_json_round_trip(value: Value) -> None:
    raw = value.to_json()
    assert type(value).from_json(raw) == value
    assert type(value).from_json(raw).to_json() == raw  # one value, one spelling: digests of it are stable
    assert json.loads(raw) == json.loads(value.model_dump_json(indent=1))


@given(records)
@settings(max_examples=25)
def test_a_record_says_which_event_it_holds(record: LogRecord) -> None:
    assert type(LogRecord.from_json(record.to_json()).event) is type(record.event)


@given(client_updates())
@settings(max_examples=25)
def test_values_are_frozen_and_comparable(update: ClientUpdate) -> None:
    with pytest.raises(ValidationError):
        update.base_version = 0  # type: ignore[misc]
    assert update == ClientUpdate.from_json(update.to_json())
    assert update != update.model_copy(update={"base_version": update.base_version + 1})


# --- mistakes ------------------------------------------------------------------------------------------

SPEC: dict[str, Any] = {"id": "street", "classes": ["car", "person"]}


def spec(**changes: Any) -> JobSpec:
    return JobSpec.from_json(json.dumps(SPEC | changes), BadJob)


def test_a_job_needs_only_its_id_and_classes() -> None:
    job = spec()
    assert job.classes == ("car", "person")
    assert job.aggregation.strategy == "fedasync"
    assert job.aggregation.alpha == 0.6
    assert job.aggregation.staleness == PolynomialStaleness(a=0.5)
    assert job.participants is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "Street"}, "id: "),
        ({"classes": []}, "classes: "),
        ({"classes": ["car", "car"]}, "classes: a name is there twice"),
        ({"classes": [""]}, r"classes\.0: "),
        ({"clases": ["car"]}, "clases: "),
        ({"participants": ["a", "a"]}, "participants: a name is there twice"),
        ({"participants": ["A"]}, r"participants\.0: "),
        ({"plan": {"image_size": 63}}, r"plan\.image_size: "),
        ({"plan": {"learning_rate": 0}}, r"plan\.learning_rate: "),
        ({"plan": {"local_steps": 0}}, r"plan\.local_steps: "),
        ({"plan": {"epochs": 3}}, r"plan\.epochs: "),
        ({"plan": {"norm": "none"}}, r"plan\.norm: "),
        ({"plan": {"augmentation": "mild"}}, r"plan\.augmentation: .*none, light, strong"),
        ({"plan": {"augmentation": {"flip": 2.0}}}, r"plan\.augmentation\.flip: "),
        ({"plan": {"augment": "yes"}}, r"plan\.augment: "),
        ({"plan": {"local_epochs": 0}}, r"plan\.local_epochs: "),
        ({"plan": {"optimizer": "adam"}}, r"plan\.optimizer: "),
        ({"plan": {"nesterov": True}}, r"plan: .*optimizer = 'sgd'"),
        ({"plan": {"nesterov": True, "optimizer": "sgd", "momentum": 0}}, r"plan: .*momentum above 0"),
        (
            {"plan": {"optimizer_state": "shared", "optimizer": "sgd", "momentum": 0}},
            r"plan: .*no state to share: set momentum above 0",
        ),
        ({"plan": {"norm_fixed_from": 1.1}}, r"plan\.norm_fixed_from: "),
        (
            {
                "plan": {"optimizer_state": "shared"},
                "aggregation": {"strategy": "fedbuff", "server_optimizer": {"kind": "fedadam"}},
            },
            "two optimisers for one model",
        ),
        (
            {
                "participation": {"mode": "invited", "max_in_flight": 4},
                "aggregation": {"strategy": "fedbuff", "buffer_size": 4},
            },
            r"participation\.max_in_flight: 4 is no more than aggregation\.buffer_size \(4\)",
        ),
        ({"plan": {"proximal_mu": -0.1}}, r"plan\.proximal_mu: "),
        ({"plan": {"mixed_precision": True}}, r"plan\.mixed_precision: "),
        ({"plan": {"freeze": ["backbone."]}}, r"plan\.freeze\.0: "),
        ({"plan": {"seed": 2**31}}, r"plan\.seed: "),
        ({"aggregation": {"strategy": "fedprox"}}, r"aggregation\.strategy: "),
        ({"aggregation": {"alpha": 0}}, r"aggregation\.alpha: "),
        ({"aggregation": {"alpha": 1.5}}, r"aggregation\.alpha: "),
        ({"aggregation": {"staleness": {"kind": "linear"}}}, r"aggregation\.staleness: "),
        ({"aggregation": {"staleness": {"kind": "hinge", "a": -1}}}, r"aggregation\.staleness\.hinge\.a: "),
        ({"aggregation": {"staleness": {"kind": "constant", "a": 1}}}, r"staleness\.constant\.a: "),
        (
            {
                "max_inflight": 1,
                "aggregation": {"strategy": "fedbuff", "staleness": {"kind": "participation", "limit": 0.5}},
            },
            r"staleness\.participation\.limit: ",
        ),
        ({"aggregation": {"staleness": {"kind": "participation"}}}, "only strategy fedbuff merges"),
        (
            {"aggregation": {"strategy": "fedbuff", "staleness": {"kind": "participation"}}},
            "max_inflight: staleness participation",
        ),
        ({"aggregation": {"server_optimizer": {"kind": "fedadam"}}}, "use strategy fedbuff or fedavg"),
        ({"aggregation": {"weight_by_examples": True}}, "are switches of fedbuff"),
        ({"aggregation": {"weight_by_objects": True}}, "are switches of fedbuff"),
        (
            {"aggregation": {"strategy": "fedbuff", "weight_by_examples": True, "weight_by_objects": True}},
            "by examples or by objects",
        ),
        ({"aggregation": {"strategy": "fedbuff", "max_pending": 9}}, "at least buffer_size"),
        ({"aggregation": {"strategy": "fedavg"}}, "it must name them"),
        ({"aggregation": {"strategy": "fedavg"}, "participants": []}, "it must name them"),
        ({"stop": {"max_versions": 0}}, r"stop\.max_versions: "),
        ({"max_inflight": 0}, "max_inflight: "),
    ],
)
def test_a_mistake_in_a_job_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadJob, match=message) as info:
        spec(**changes)
    assert info.value.reason == "bad-job"


def test_augmentation_has_a_name_or_numbers_and_is_stored_as_numbers() -> None:
    def augmentation(**plan: Any) -> Augmentation:
        return spec(plan=plan).plan.augmentation

    assert augmentation() == augmentation(augmentation="light") == Augmentation()
    assert augmentation(augmentation={"flip": 0.0}) == Augmentation(flip=0)
    none, strong = augmentation(augmentation="none"), augmentation(augmentation="strong")
    assert not none.moves
    assert not none.colours
    assert strong.max_scale > Augmentation().max_scale
    assert b'"augmentation":{"flip":0.5' in spec(plan={"augmentation": "strong"}).to_json()
    assert augmentation(augment=True) == Augmentation(), "the former name, in jobs that are stored"
    assert augmentation(augment=False) == none


def test_steps_of_an_update() -> None:
    plan = TrainingPlan(local_steps=20, batch_size=16)
    assert plan.steps_for(1) == plan.steps_for(10_000) == 20
    passes = plan.model_copy(update={"local_epochs": 2.0})
    assert [passes.steps_for(n) for n in (1, 16, 17, 160)] == [1, 2, 3, 20]


def test_progress_of_a_job_is_its_share_of_versions() -> None:
    job = spec(stop={"max_versions": 4})
    assert [job.progress(v) for v in (0, 3, 4, 9)] == [(0, 0.25), (0.75, 1), (1, 1), (1, 1)]


def test_a_job_of_the_first_release_is_still_read() -> None:
    """As job.json was written before the plan had more choices."""
    raw = (
        '{"id":"street","classes":["car"],"arch":"fcos_shufflenet_v2_x0_5","participants":null,"plan":{"image_size":256,'
        '"batch_size":16,"local_steps":20,"learning_rate":0.003,"weight_decay":0.02,"warmup_steps":3,"schedule":"cosine",'
        '"final_learning_rate_fraction":0.02,"gradient_norm_limit":10.0,"augment":true,"norm":"average","seed":0},'
        '"aggregation":{"strategy":"fedasync","alpha":0.8,"staleness":{"kind":"polynomial","a":0.5},"buffer_size":10,'
        '"server_learning_rate":1.0,"server_optimizer":null,"weight_by_examples":false,"max_staleness":100,'
        '"max_pending":64},"stop":{"max_versions":75},"evaluation":{"every":0},"max_inflight":null}'
    )
    old = JobSpec.from_json(raw)
    assert old.plan == TrainingPlan(local_steps=20, learning_rate=0.003, warmup_steps=3)
    assert JobSpec.from_json(old.to_json()) == old


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(BadJob, match=r"id: .*; classes: .*; plan\.seed: "):
        spec(id="-", classes=[], plan={"seed": -1})


@pytest.mark.parametrize(
    ("strategy", "kind"), [("fedasync", "weights"), ("fedavg", "weights"), ("fedbuff", "difference")]
)
def test_what_a_site_sends_follows_from_the_strategy(strategy: str, kind: str) -> None:
    policy = spec(aggregation={"strategy": strategy}, participants=["a"]).aggregation
    assert policy.payload_kind == kind


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 1),
        ({"aggregation": {"strategy": "fedbuff", "buffer_size": 7}}, 7),
        ({"aggregation": {"strategy": "fedavg"}, "participants": ["a", "b"]}, 1),
        ({"max_inflight": 3}, 3),
        ({"aggregation": {"strategy": "fedbuff", "buffer_size": 7}, "max_inflight": 3}, 3),
    ],
)
def test_how_many_updates_of_a_site_may_wait(changes: dict[str, Any], limit: int) -> None:
    assert spec(**changes).inflight_limit == limit


def test_server_optimiser_with_a_buffer_is_allowed() -> None:
    policy = AggregationPolicy(strategy="fedbuff", server_optimizer=ServerOptimizer(kind="fedadam"))
    assert AggregationPolicy.from_json(policy.to_json()) == policy
    assert AggregationPolicy(strategy="fedbuff", weight_by_examples=True).weight_by_examples


def test_the_kinds_of_staleness_have_the_papers_defaults() -> None:
    hinge = HingeStaleness()
    assert (hinge.a, hinge.b) == (10, 4)
    assert PolynomialStaleness().a == 0.5
    assert AggregationPolicy(strategy="fedbuff").buffer_size == 10


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_is_infinite(number: str) -> None:
    with pytest.raises(Rejected, match="alpha: "):
        AggregationPolicy.from_json(f'{{"alpha": {number}}}')


@pytest.mark.parametrize("wrong", [{"alpha": "0.5"}, {"buffer_size": 3.0}, {"buffer_size": True}])
def test_types_are_not_guessed(wrong: dict[str, Any]) -> None:
    with pytest.raises(Rejected):
        AggregationPolicy.from_json(json.dumps(wrong))


def test_a_whole_number_is_a_float_too() -> None:
    """JSON writers of other languages write 1 for 1.0."""
    assert AggregationPolicy.from_json('{"alpha": 1}').alpha == 1.0


def test_a_payload_key_must_be_the_updates_own() -> None:
    with pytest.raises(ValidationError, match="payload_key must be"):
        ClientUpdate(
            update_id="0190b5a0-0000-7000-8000-000000000000",
            job="a",
            site="b",
            base_version=0,
            num_examples=1,
            payload_kind="weights",
            payload_key="jobs/a/job.json",
            payload_sha256="0" * 64,
            payload_bytes=1,
            created_at=datetime.now(UTC),
        )


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (ModelRef, '{"key": "", "sha256": "' + "0" * 64 + '", "nbytes": 1}'),
        (ModelRef, '{"key": "k", "sha256": "' + "0" * 64 + '", "nbytes": 0}'),
        (TrainingPlan, '{"batch_size": 0}'),
        (SiteStatus, '{"site": "a", "state": "sleeping", "at": "2026-01-01T00:00:00Z"}'),
        (SiteStatus, '{"site": "a", "state": "idle", "at": "2026-01-01T00:00:00"}'),
        (SiteStatus, '{"site": "a", "state": "idle", "at": "2026-01-01T00:00:00Z", "epoch": -1}'),
        (Contribution, "{}"),
        (Refusal, "{}"),
        (Head, '{"current": {"version": -1}}'),
        (LogRecord, '{"event": {"type": "unknown"}}'),
        (DeadLetter, '{"id": "../x"}'),
    ],
)
def test_what_is_none_is_refused(kind: type[Value], raw: str) -> None:
    with pytest.raises(Rejected, match=f"^{kind.__name__}: "):
        kind.from_json(raw)


def test_the_callers_error_is_raised() -> None:
    with pytest.raises(BadJob):
        JobSpec.from_json("{}", BadJob)
    with pytest.raises(Rejected) as info:
        JobSpec.from_json("{}")
    assert type(info.value) is Rejected


@pytest.mark.parametrize("model", [TrainingPlan, AggregationPolicy])
def test_every_number_of_a_job_says_its_range(model: type[Value]) -> None:
    """A number without a lower bound would let a typing error through."""
    for name, field in model.model_fields.items():
        if field.annotation in (int, float):
            assert field.metadata, name


def test_head_knows_its_version() -> None:
    ref = ModelRef(key="k", sha256="0" * 64, nbytes=1)
    head = Head.model_validate({"current": {"version": 7, "model": ref}})
    assert head.version == 7
    job = Job(spec=spec(), initial=ref, max_update_bytes=1, created_at=datetime.now(UTC))
    assert job.id == "street"
