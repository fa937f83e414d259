"""An audit passes on what the tasks make, and names whatever is done to it afterwards."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from federation.errors import AccessDenied, NotFound, StoreUnavailable
from federation.keys import job_key, log_key, metrics_key, rejected_key, update_key
from federation.requests import SteerJob
from federation.types import (
    AbandonedLine,
    Accepted,
    Closed,
    Created,
    DeadLetter,
    Evaluation,
    Published,
    Refusal,
    Refused,
    RolledBack,
)
from storage import models
from storage.audit import Audit, Finding, audit
from storage.jobs import save_dead_letter, save_evaluation, save_refusal
from storage.log import VersionLog
from storage.memory import MemoryStore
from storage.models import save_model
from storage.readonly import ATTEMPTS, ReadOnlyStore
from storage.tensors import from_arrays
from tasks.accept import accept
from tasks.jobs import create
from tests.factories import client_update, job_spec, toy_arrays
from tests.unit.aggregator_cases import make_version
from tests.unit.audit_cases import (
    BROKEN_DECISIONS,
    POLICIES,
    Change,
    ToyJob,
    at,
    errors,
    findings,
    new_job,
    on_disk,
    play,
    seasoned_job,
    seq_of,
    steered_job,
    worker,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def toy() -> ToyJob:
    return seasoned_job()


def event_of(toy: ToyJob, kind: type, which: int = -1) -> Any:
    return [record.event for record in toy.records() if isinstance(record.event, kind)][which]


def only(found: list[Finding], subject: str) -> str:
    """The message of the only finding, which must be about `subject`."""
    assert [finding.subject for finding in found] == [subject], found
    return found[0].message


# --- what is right, passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_what_the_tasks_make_passes(policy: str) -> None:
    toy = seasoned_job(policy)
    run = Audit(toy.store, "toy")
    assert list(run.findings()) == []
    records = toy.records()
    events = [record.event for record in records]
    assert run.tally.records == len(records)
    assert run.tally.versions == 1 + sum(isinstance(e, Published) and bool(e.merged) for e in events)
    assert run.tally.merged == sum(len(e.merged) for e in events if isinstance(e, Published)) > 0
    assert run.tally.pending == len(records[-1].head.pending) == 1
    assert run.tally.rejected >= 2
    assert run.tally.bytes > 0


@pytest.mark.parametrize("policy", ["fedasync", "fedbuff", "fedavg-fedadam"])
def test_a_job_that_closed_passes(policy: str) -> None:
    toy = new_job(policy, max_versions=2)
    toy.round()
    toy.round()
    toy.accept()  # refused: the job is closed
    assert toy.log.head().head.closed is not None
    assert findings(toy.store) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["fedasync", "fedbuff", "fedavg"])
def test_random_histories_pass(policy: str, seed: int) -> None:
    toy = new_job(policy, max_versions=12, seed=seed)
    play(toy, seed, moves=60)
    assert errors(toy.store) == []


def test_a_job_whose_norm_layers_stay_with_the_sites_passes() -> None:
    store = MemoryStore()
    arrays = toy_arrays()
    initial = save_model(store, "toy", from_arrays(arrays))
    first = save_model(store, "toy", from_arrays({"conv.weight": arrays["conv.weight"]}))
    create(worker(store), job_spec(), initial, first)
    assert findings(store) == []


def test_nothing_is_written(toy: ToyJob) -> None:
    before = {key: toy.store.modified(key) for key in toy.store.list("")}
    findings(toy.store)
    assert {key: toy.store.modified(key) for key in toy.store.list("")} == before


# --- the log ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_deleted_record_is_missed(toy: ToyJob, which: int) -> None:
    key = log_key("toy", which)
    toy.store.delete(key)
    assert "missing" in only(errors(toy.store), key)


def test_several_deleted_records_are_one_finding(toy: ToyJob) -> None:
    for seq in (2, 3, 4):
        toy.store.delete(log_key("toy", seq))
    assert "2 to 4 missing" in only(errors(toy.store), log_key("toy", 2))


def test_behind_a_broken_record_the_audit_goes_on(toy: ToyJob) -> None:
    payload = toy.flip(event_of(toy, Published).merged[-1].update.payload_key)
    broken = log_key("toy", 3)
    toy.store.put(broken, b"{")
    assert {finding.subject for finding in errors(toy.store)} == {broken, payload}


def test_a_newest_record_that_cannot_be_read_is_an_error(toy: ToyJob) -> None:
    key = log_key("toy", len(toy.records()) - 1)
    toy.store.put(key, b"")
    assert "no log record" in only(errors(toy.store), key)


def test_a_log_without_any_record_that_can_be_read_is_an_error(toy: ToyJob) -> None:
    for record in toy.records():
        toy.store.delete(log_key("toy", record.seq))
    assert any("sites worked" in finding.message for finding in errors(toy.store))


def test_a_log_that_has_not_begun_is_a_note() -> None:
    toy = new_job()
    toy.store.delete(log_key("toy", 0))
    (finding,) = findings(toy.store)
    assert (finding.level, "not begun" in finding.message) == ("note", True)


@pytest.mark.parametrize(
    "name", ["notes.txt", "00000000000000000001.json.bak", "x/00000000000000000000.json", "1.json"]
)
def test_a_stray_key_in_the_log_is_an_error(toy: ToyJob, name: str) -> None:
    key = f"jobs/toy/log/{name}"
    toy.store.put(key, b"{}")
    assert "not the key of a log record" in only(errors(toy.store), key)


def test_a_record_with_an_absurd_number_costs_no_time(toy: ToyJob) -> None:
    after, far = log_key("toy", len(toy.records())), log_key("toy", 10**20 - 1)
    toy.store.put(far, b"{}")
    assert {finding.subject for finding in errors(toy.store)} == {after, far}


def test_swapped_records_are_found(toy: ToyJob) -> None:
    first, second = log_key("toy", 2), log_key("toy", 3)
    one, other = (toy.store.get(key, max_bytes=1 << 20) for key in (first, second))
    toy.store.put(first, other)
    toy.store.put(second, one)
    found = errors(toy.store)
    assert {finding.subject for finding in found} >= {first, second}
    assert "says that it is record 3" in found[0].message


def test_a_record_of_another_job_is_found(toy: ToyJob) -> None:
    key = toy.edit(2, lambda record: record.update(job="other"))
    assert "job 'other'" in only(errors(toy.store), key)


def test_a_copied_nonce_is_found(toy: ToyJob) -> None:
    nonce = toy.records()[2].nonce
    key = toy.edit(4, lambda record: record.update(nonce=nonce))
    assert "nonce" in only(errors(toy.store), key)


def test_an_update_that_is_accepted_twice_is_found(toy: ToyJob) -> None:
    """As if the check for duplicates had been forgotten."""
    newest = toy.log.head()
    first = event_of(toy, Accepted, 0)
    head = newest.head.model_copy(update={"pending": (*newest.head.pending, first.contribution)})
    appended = toy.log.append(newest, first, head)
    assert "counts twice" in only(errors(toy.store), log_key("toy", appended.seq))


def test_an_update_that_is_merged_twice_is_found(toy: ToyJob) -> None:
    newest = toy.log.head()
    event = event_of(toy, Published)
    appended = toy.log.append(newest, event, newest.head)
    key = log_key("toy", appended.seq)
    found = errors(toy.store)
    assert {finding.subject for finding in found} == {key}
    for merged in event.merged:
        assert any(merged.update.update_id in f.message and "counts twice" in f.message for f in found)


def test_an_update_that_is_merged_but_never_was_accepted_is_found(toy: ToyJob) -> None:
    seq = seq_of(toy, Published)
    stranger = client_update(b"payload")

    def replace(record: dict[str, Any]) -> None:
        record["event"]["merged"][0]["update"] = json.loads(stranger.to_json())

    key = toy.edit(seq, replace)
    assert any(
        f.subject == key and "never accepted" in f.message and stranger.update_id in f.message
        for f in errors(toy.store)
    )


def test_an_update_that_is_merged_as_another_is_found(toy: ToyJob) -> None:
    def replace(record: dict[str, Any]) -> None:
        record["event"]["merged"][0]["update"]["num_examples"] += 1

    key = toy.edit(seq_of(toy, Published), replace)
    assert "another update than was accepted" in only(errors(toy.store), key)


def test_an_update_that_ends_after_a_refusal_is_found(toy: ToyJob) -> None:
    newest = toy.log.head()
    event = event_of(toy, Refused)
    appended = toy.log.append(newest, event, newest.head)
    assert "has ended: it counts twice" in only(errors(toy.store), log_key("toy", appended.seq))


def test_an_update_of_another_job_is_found(toy: ToyJob) -> None:
    newest = toy.log.head()
    refusal = Refusal(
        update=client_update(b"x", job="other", base_version=0), reason="r", message="m", version=0
    )
    appended = toy.log.append(newest, Refused(refusal=refusal), newest.head)
    assert "job 'other'" in only(errors(toy.store), log_key("toy", appended.seq))


def test_without_compare_and_swap_the_fork_is_found(toy: ToyJob) -> None:
    """Two workers append the same number, the second over the first, and the first goes on."""
    other = VersionLog(toy.store, "toy")
    other.head()
    toy.accept()
    lost = toy.log.head()
    toy.store.delete(log_key("toy", lost.seq))
    accept(worker(toy.store), toy.upload(site="site-b"))  # writes the record of the same number
    toy.log.append(lost, Closed(reason="r"), lost.head.model_copy(update={"closed": "r"}))
    key = log_key("toy", lost.seq + 1)
    (message,) = [f.message for f in errors(toy.store) if f.subject == key and "accepted here" in f.message]
    assert lost.event.contribution.update.update_id in message  # type: ignore[union-attr]


# --- what is decided about versions ----------------------------------------------------------------------------


def test_a_job_that_was_steered_passes() -> None:
    assert findings(steered_job().store) == []


@pytest.mark.parametrize("name", BROKEN_DECISIONS)
def test_a_decision_that_the_head_does_not_show_is_found(name: str) -> None:
    toy = steered_job()
    kind, change, message = BROKEN_DECISIONS[name]
    key = toy.edit(seq_of(toy, kind), change)
    found = [finding for finding in errors(toy.store) if finding.subject == key]
    assert any(message in finding.message for finding in found), found


def test_a_version_that_is_made_in_quarantine_is_found() -> None:
    toy = steered_job()
    head = toy.log.head().head
    made = make_version(head.version + 1)
    toy.log.append(
        toy.log.head(),
        Published(merged=head.pending),
        head.model_copy(update={"current": made, "pending": ()}),
    )
    assert any("is in quarantine" in finding.message for finding in errors(toy.store))


def test_a_rollback_of_a_closed_job_is_found() -> None:
    toy = steered_job()
    toy.ask(SteerJob(job="toy", action="stop"))
    head = toy.log.head().head
    lines = (*head.abandoned, AbandonedLine(first=8, last=head.version))
    after = head.model_copy(
        update={
            "current": toy.log.version(7).model_copy(update={"version": head.version + 1}),
            "quarantine": None,
            "abandoned": lines,
        }
    )
    toy.log.append(toy.log.head(), RolledBack(to=7), after)
    assert any("although the job is closed" in finding.message for finding in errors(toy.store))


@pytest.mark.parametrize("what", ["stable", "offered"])
def test_what_is_stable_or_offered_must_not_be_given_to_retention(what: str) -> None:
    toy = steered_job()
    version = getattr(toy.log.head().head, what)
    toy.collect(version.model.key)
    assert "gives it to retention" in only(errors(toy.store), version.model.key)


STRANGER = {"update_id": "01890000-0000-7000-8000-000000000000", "base_version": 0, "reason": None}

BROKEN_HEADS: dict[str, tuple[type, Change, str]] = {
    "a pending update is lost": (Accepted, at("head.pending", lambda _: []), "are lost"),
    "pending numbers change": (
        Accepted,
        at("head.pending.0.staleness", lambda n: n + 1),
        "the order or the numbers",
    ),
    "a merged update stays pending": (
        Published,
        lambda record: record["head"]["pending"].append(record["event"]["merged"][0]),
        "were not accepted here",
    ),
    "the version jumps": (Published, at("head.current.version", lambda v: v + 1), "last merged update makes"),
    "the version falls": (Published, at("head.current.version", lambda v: 0), "last merged update makes"),
    "merged versions do not count up": (
        Published,
        at("event.merged.1.version", lambda v: v + 1),
        "count up",
    ),
    "merged versions begin late": (Published, at("event.merged.0.version", lambda v: v + 1), "count up"),
    "the version changes without a merge": (
        Accepted,
        at("head.current.version", lambda v: v + 1),
        "nothing was merged",
    ),
    "the model changes without a merge": (
        Accepted,
        at("head.current.model", lambda m: m | {"nbytes": m["nbytes"] + 1}),
        "nothing was merged",
    ),
    "it closes without a reason": (Accepted, at("head.closed", lambda _: "why"), "closes nothing"),
    "an id is forgotten by an accept": (Accepted, at("head.remembered", lambda r: r[1:]), "forgotten by"),
    "an id is forgotten by a refusal": (
        Refused,
        at("head.remembered", lambda r: r[1:]),
        "could count again",
    ),
    "an id is forgotten too early": (
        Published,
        at("head.remembered", lambda r: r[:-1]),
        "could count again",
    ),
    "the accepted id is not remembered": (
        Accepted,
        at("head.remembered", lambda r: r[:-1]),
        "could count again",
    ),
    "the refused id is not remembered": (
        Refused,
        at("head.remembered", lambda r: r[:-1]),
        "could count again",
    ),
    "an id is remembered from nowhere": (
        Accepted,
        at("head.remembered", lambda r: [STRANGER, *r]),
        "no record names",
    ),
    "a refused id is remembered as accepted": (
        Refused,
        at("head.remembered", lambda r: [*r[:-1], r[-1] | {"reason": None}]),
        "remembered as accepted",
    ),
    "what is remembered changes": (
        Accepted,
        at("head.remembered.0.base_version", lambda b: b + 1),
        "is remembered of",
    ),
    "it is created again": (Accepted, at("event", lambda _: {"type": "created"}), "by an earlier record"),
    "it closes for another reason": (
        Accepted,
        at("event", lambda _: {"type": "closed", "reason": "enough"}),
        "head says open",
    ),
    "retention changes the head": (
        Accepted,
        at("event", lambda _: {"type": "collected", "keys": ["jobs/toy/models/x"]}),
        "retention changes none",
    ),
    "the log begins with something else": (
        Created,
        at("event", lambda _: {"type": "closed", "reason": "enough"}),
        "begins with 'closed'",
    ),
    "the log begins late": (Created, at("head.current.version", lambda _: 1), "open version 0"),
}


@pytest.mark.parametrize("name", BROKEN_HEADS)
def test_a_head_that_does_not_follow_is_found(toy: ToyJob, name: str) -> None:
    kind, change, expected = BROKEN_HEADS[name]
    key = toy.edit(seq_of(toy, kind), change)
    messages = [finding.message for finding in errors(toy.store) if finding.subject == key]
    assert any(expected in message for message in messages), findings(toy.store)


def forgetful_job(monkeypatch: pytest.MonkeyPatch) -> ToyJob:
    """A head remembers few ids here: of older ones the log is searched."""
    monkeypatch.setattr("aggregator.transitions.REMEMBERED_LIMIT", 4)
    toy = new_job("fedbuff-examples")
    for _ in range(4):
        toy.round()
    toy.accept()
    assert toy.log.head().head.remembered_from > 1
    return toy


def test_ids_that_are_forgotten_because_there_are_many_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(forgetful_job(monkeypatch).store) == []


def test_a_head_that_hides_what_it_forgot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = forgetful_job(monkeypatch)
    key = toy.edit(toy.log.head().seq, at("head.remembered_from", lambda base: base - 1))
    assert "forgotten before" in only(errors(toy.store), key)


def test_a_job_that_opens_again_is_found() -> None:
    toy = new_job(max_versions=2)
    toy.round()
    newest = toy.log.head()
    opened = newest.head.model_copy(update={"closed": None})
    refusal = Refusal(update=client_update(b"x"), reason="r", message="m", version=2)
    appended = toy.log.append(newest, Refused(refusal=refusal), opened)
    assert any(
        f.subject == log_key("toy", appended.seq) and "is open" in f.message for f in errors(toy.store)
    )


def test_an_update_that_a_closed_job_accepts_is_found() -> None:
    toy = new_job()
    open_head = toy.log.head()
    closed = open_head.head.model_copy(update={"closed": "enough"})
    newest = toy.log.append(open_head, Closed(reason="enough"), closed)
    other = new_job()
    other.accept()
    accepted = event_of(other, Accepted)
    appended = toy.log.append(
        newest, accepted, closed.model_copy(update={"pending": (accepted.contribution,)})
    )
    messages = [f.message for f in errors(toy.store) if f.subject == log_key("toy", appended.seq)]
    assert any("although the job is closed" in message for message in messages)


def test_a_closed_job_with_pending_updates_is_a_note() -> None:
    toy = new_job()
    toy.accept()
    newest = toy.log.head()
    toy.log.append(newest, Closed(reason="r"), newest.head.model_copy(update={"closed": "r"}))
    (finding,) = findings(toy.store)
    assert (finding.level, "wait to be refused" in finding.message) == ("note", True)


# --- objects that the log names --------------------------------------------------------------------------------


def needed_keys(toy: ToyJob) -> dict[str, str]:
    records = toy.records()
    head = records[-1].head
    published = [record for record in records if isinstance(record.event, Published)]
    keys = {
        "initial": toy.job.initial.key,
        "an old model": published[0].head.current.model.key,
        "the newest model": head.current.model.key,
        "a merged payload": published[0].event.merged[0].update.payload_key,  # type: ignore[union-attr]
        "a pending payload": head.pending[0].update.payload_key,
    }
    if head.current.server_state is not None:
        keys["the state"] = head.current.server_state.key
    return keys


NEEDED = ["initial", "an old model", "the newest model", "a merged payload", "a pending payload", "the state"]


@pytest.mark.parametrize("what", NEEDED)
def test_a_missing_object_is_found(what: str) -> None:
    toy = seasoned_job("fedbuff-fedadam")
    key = needed_keys(toy)[what]
    toy.store.delete(key)
    found = errors(toy.store)
    assert {finding.subject for finding in found} == {key}
    assert "is missing" in found[0].message
    assert "restore" in found[0].message


@pytest.mark.parametrize("what", [what for what in NEEDED if what != "a pending payload"])
def test_one_changed_bit_is_found_unless_the_audit_is_quick(what: str) -> None:
    toy = seasoned_job("fedbuff-fedadam")
    key = toy.flip(needed_keys(toy)[what])
    assert {finding.subject for finding in errors(toy.store)} == {key}
    assert "sha256" in errors(toy.store)[0].message
    assert errors(toy.store, digests=False) == []


def test_a_pending_payload_that_will_be_refused_is_a_note(toy: ToyJob) -> None:
    """A site may declare whatever it likes: that breaks no promise of ours."""
    key = toy.flip(needed_keys(toy)["a pending payload"])
    assert "will be refused" in only(findings(toy.store), key)
    assert errors(toy.store) == []


@pytest.mark.parametrize("what", NEEDED)
def test_another_size_is_found_by_a_quick_audit_too(what: str) -> None:
    toy = seasoned_job("fedbuff-fedadam")
    key = needed_keys(toy)[what]
    toy.store.put(key, toy.store.get(key, max_bytes=1 << 20)[:-1])
    assert {finding.subject for finding in errors(toy.store, digests=False)} == {key}


def test_what_retention_removed_is_not_missed(toy: ToyJob) -> None:
    keys = needed_keys(toy)
    refused = [record.event.refusal for record in toy.records() if isinstance(record.event, Refused)]
    toy.collect(keys["an old model"], keys["a merged payload"], refused[0].update.payload_key)
    assert findings(toy.store) == []


def test_what_retention_did_not_come_to_remove_is_a_note(toy: ToyJob) -> None:
    key = needed_keys(toy)["an old model"]
    toy.collect(key, delete=False)
    (finding,) = findings(toy.store)
    assert (finding.level, finding.subject) == ("note", key)
    assert "run `fedqueue gc`" in finding.message


@pytest.mark.parametrize("what", ["initial", "the newest model", "a pending payload", "the state"])
@pytest.mark.parametrize("delete", [False, True])
def test_what_is_needed_may_not_be_collected(what: str, delete: bool) -> None:
    toy = seasoned_job("fedbuff-fedadam")
    key = needed_keys(toy)[what]
    toy.collect(key, delete=delete)
    found = errors(toy.store)
    assert {finding.subject for finding in found} == {key}
    assert any("is needed" in finding.message for finding in found)


def test_a_model_that_was_collected_before_it_was_named_must_be_there(
    toy: ToyJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No publish gives a name twice; an audit does not take that for granted."""
    monkeypatch.setattr(models, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="1" * 32)))
    twin = toy.copy()
    twin.publish()
    made = twin.log.head().head.current.model.key
    toy.collect(made)
    toy.publish()
    assert toy.log.head().head.current.model.key == made
    assert findings(toy.store) == []
    toy.store.delete(made)
    assert "is missing" in only(errors(toy.store), made)


# --- objects that it does not name -----------------------------------------------------------------------------


def test_an_upload_that_no_record_names_is_a_note_with_its_age() -> None:
    toy = new_job()
    toy.store._clock = lambda: NOW
    update = toy.upload()
    run = Audit(toy.store, "toy", clock=lambda: NOW + timedelta(hours=30))
    (finding,) = run.findings()
    assert (finding.level, finding.subject) == ("note", update.payload_key)
    assert "1 day, 6:00:00 old" in finding.message
    assert run.tally.orphaned == 1


def test_an_upload_below_another_site_is_an_orphan_though_its_id_is_known(toy: ToyJob) -> None:
    """Ids are random, but a site may copy one: the log has only the other site's."""
    merged = event_of(toy, Published).merged[0].update
    copied = update_key("toy", "site-x", merged.update_id)
    toy.store.put(copied, b"x")
    assert "no record names" in only(findings(toy.store), copied)


def test_a_model_that_no_record_names_is_a_note(toy: ToyJob) -> None:
    key = save_model(toy.store, "toy", from_arrays(toy_arrays(7.0))).key
    assert "no record names" in only(findings(toy.store), key)
    assert errors(toy.store) == []


@pytest.mark.parametrize(
    "key",
    [
        "jobs/toy/readme.txt",
        "jobs/toy/releases/1.json",
        "jobs/toy/updates/site-a/model.bin",
        "jobs/toy/models/model.safetensors",
        "jobs/toy/metrics/1/server.json",
    ],
)
def test_an_unknown_key_is_a_note(toy: ToyJob, key: str) -> None:
    toy.store.put(key, b"x")
    (finding,) = findings(toy.store)
    assert (finding.level, finding.subject) == ("note", key)


def test_a_neighbours_objects_are_not_looked_at(toy: ToyJob) -> None:
    toy.store.put("jobs/toy-2/readme.txt", b"x")
    assert findings(toy.store) == []


def test_a_refusal_that_the_log_does_not_tell_is_an_error(toy: ToyJob) -> None:
    update = client_update(b"x")
    save_refusal(toy.store, Refusal(update=update, reason="r", message="m", version=0))
    key = rejected_key("toy", "site-a", update.update_id)
    assert "the log does not" in only(errors(toy.store), key)


def test_a_refusal_of_a_merged_update_is_an_error(toy: ToyJob) -> None:
    update = event_of(toy, Published).merged[0].update
    save_refusal(toy.store, Refusal(update=update, reason="r", message="m", version=0))
    assert "the log does not" in only(errors(toy.store), rejected_key("toy", update.site, update.update_id))


def test_a_refusal_whose_object_is_missing_is_a_note(toy: ToyJob) -> None:
    update = event_of(toy, Refused).refusal.update
    key = rejected_key("toy", update.site, update.update_id)
    toy.store.delete(key)
    (finding,) = findings(toy.store)
    assert (finding.level, finding.subject) == ("note", key)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_refusal_that_cannot_be_read_is_an_error(toy: ToyJob, content: bytes) -> None:
    update = event_of(toy, Refused).refusal.update
    key = rejected_key("toy", update.site, update.update_id)
    toy.store.put(key, content)
    assert "cannot be read" in only(errors(toy.store), key)


def test_a_refusal_under_anothers_name_is_an_error(toy: ToyJob) -> None:
    update = event_of(toy, Refused).refusal.update
    key = rejected_key("toy", update.site, update.update_id)
    refusal = Refusal(update=client_update(b"x"), reason="r", message="m", version=0)
    toy.store.put(key, refusal.to_json())
    assert refusal.update.update_id in only(errors(toy.store), key)


def evaluation(version: int, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "job": "toy",
        "version": version,
        "who": "server",
        "num_images": 1,
        "metrics": {},
        "at": NOW,
    }
    return Evaluation(**(values | changes))


def test_measurements_of_versions_that_were_pass(toy: ToyJob) -> None:
    for record in toy.records():
        save_evaluation(toy.store, evaluation(record.head.version))
    assert findings(toy.store) == []


@pytest.mark.parametrize("version", [1, 999])
def test_a_measurement_of_a_version_that_never_was_is_an_error(toy: ToyJob, version: int) -> None:
    save_evaluation(toy.store, evaluation(version))  # 1: FedAsync's first publish led from 0 to 6
    assert "never was" in only(errors(toy.store), metrics_key("toy", version, "server"))


def test_a_measurement_that_cannot_be_read_is_an_error(toy: ToyJob) -> None:
    key = metrics_key("toy", 0, "server")
    toy.store.put(key, b"{")
    assert "cannot be read" in only(errors(toy.store), key)


def test_a_measurement_under_anothers_name_is_an_error(toy: ToyJob) -> None:
    key = metrics_key("toy", 0, "server")
    toy.store.put(key, evaluation(0, who="other").to_json())
    assert "delete it" in only(errors(toy.store), key)


def letter(body: bytes) -> DeadLetter:
    return DeadLetter(
        id="0" * 32 + "-abc",
        reason="r",
        message="m",
        queue="fed.updates",
        routing_key="updates.site-a",
        body_base64=base64.b64encode(body).decode(),
        at=NOW,
    )


def celery_body(update: bytes) -> bytes:
    return json.dumps([[], {"update": update.decode()}, {"callbacks": None}]).encode()


@pytest.mark.parametrize("wrap", [bytes, celery_body])
def test_a_dead_letter_about_an_update_of_the_log_is_a_note(
    toy: ToyJob, wrap: Callable[[bytes], bytes]
) -> None:
    update = event_of(toy, Published).merged[0].update
    save_dead_letter(toy.store, letter(wrap(update.to_json())))
    (finding,) = findings(toy.store)
    assert (finding.level, finding.subject) == ("note", f"deadletters/{'0' * 32}-abc.json")
    assert update.update_id in finding.message
    assert f"record {seq_of(toy, Published)}" in finding.message


def test_an_orphan_whose_message_is_a_dead_letter_says_so(toy: ToyJob) -> None:
    update = toy.upload()
    save_dead_letter(toy.store, letter(celery_body(update.to_json())))
    assert "deadletters/" in only(findings(toy.store), update.payload_key)


@pytest.mark.parametrize("body", ["", "!!!", "/w==", "A"])
def test_a_dead_letter_of_any_kind_is_no_error(toy: ToyJob, body: str) -> None:
    save_dead_letter(toy.store, letter(b"").model_copy(update={"body_base64": body}))
    assert findings(toy.store) == []


def test_a_dead_letter_that_cannot_be_read_is_an_error(toy: ToyJob) -> None:
    toy.store.put(f"deadletters/{'0' * 32}-abc.json", b"{")
    assert "abc.json" in only(errors(toy.store), "deadletters/")


# --- job.json --------------------------------------------------------------------------------------------------


def test_a_job_without_its_description_is_an_error_and_the_rest_is_checked(toy: ToyJob) -> None:
    toy.store.delete(job_key("toy"))
    payload = toy.flip(event_of(toy, Published).merged[0].update.payload_key)
    assert {finding.subject for finding in errors(toy.store)} == {job_key("toy"), payload}


@pytest.mark.parametrize("content", [b"", b"{}"])
def test_a_description_that_cannot_be_read_is_an_error(toy: ToyJob, content: bytes) -> None:
    toy.store.put(job_key("toy"), content)
    assert "cannot be read" in only(errors(toy.store), job_key("toy"))


def test_the_description_of_another_job_is_an_error(toy: ToyJob) -> None:
    description = json.loads(toy.store.get(job_key("toy"), max_bytes=1 << 20))
    description["spec"]["id"] = "other"
    toy.store.put(job_key("toy"), json.dumps(description).encode())
    assert "describes job 'other'" in only(errors(toy.store), job_key("toy"))


def test_there_must_be_a_job() -> None:
    with pytest.raises(NotFound, match="nowhere"):
        list(audit(MemoryStore(), "nowhere"))


# --- beside running workers, over a store that fails -----------------------------------------------------------


class Watched(MemoryStore):
    """Calls `meanwhile` once, just before the first reading of which `when` is true."""

    def __init__(
        self, inner: MemoryStore, when: Callable[[str], bool], meanwhile: Callable[[], object]
    ) -> None:
        super().__init__()
        self._inner, self._when, self._meanwhile = inner, when, [meanwhile]

    def size(self, key: str) -> int:
        self._reached(f"size {key}")
        return self._inner.size(key)

    def modified(self, key: str) -> datetime:
        return self._inner.modified(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self._reached(f"get {key}")
        return self._inner.get(key, max_bytes=max_bytes)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        self._reached(f"list {prefix}")
        return self._inner.list(prefix, start_after=start_after)

    def _reached(self, what: str) -> None:
        if self._meanwhile and self._when(what):
            self._meanwhile.pop()()


def moments(toy: ToyJob) -> list[str]:
    """Every reading of an audit, in order."""
    seen: list[str] = []

    def note(what: str) -> bool:
        seen.append(what)
        return False

    findings(Watched(toy.store, note, lambda: None))
    return seen


def busy(toy: ToyJob) -> None:
    """All that workers do while somebody audits: update, publish, refusal, measurement, retention, closing."""
    old = [record.head.current for record in toy.records()]
    pending = toy.log.head().head.pending
    toy.publish()
    toy.accept(base_version=toy.log.head().head.version + 9)
    bad = toy.upload()
    toy.flip(bad.payload_key)
    accept(toy.context, bad)
    toy.publish()
    toy.collect(
        *{v.model.key for v in old[1:]} - {old[0].model.key}, *(c.update.payload_key for c in pending)
    )
    save_evaluation(toy.store, evaluation(toy.log.head().head.version))
    toy.round()
    toy.upload()


def test_whatever_happens_at_whatever_moment_is_no_error() -> None:
    """The worker does all its work between any two readings of the audit."""
    total = len(moments(small_job()))
    assert total > 10
    for number in range(total):
        toy, reading = small_job(), iter(range(total * 10))
        store = Watched(
            toy.store,
            lambda what, n=number, reading=reading: next(reading) == n,  # type: ignore[misc]
            lambda toy=toy: busy(toy),  # type: ignore[misc]
        )
        assert errors(store) == [], f"before reading {number}"


def small_job() -> ToyJob:
    toy = new_job()
    toy.accept()
    toy.publish()
    toy.accept()
    return toy


def removed_meanwhile(toy: ToyJob, key: str, reading: str) -> list[Finding]:
    """Findings if `key` is deleted just before this reading."""
    return findings(Watched(toy.store, lambda what: what == reading, lambda: toy.store.delete(key)))


def test_what_an_operator_deletes_meanwhile_is_not_missed(toy: ToyJob) -> None:
    save_evaluation(toy.store, evaluation(0))
    measured = metrics_key("toy", 0, "server")
    assert removed_meanwhile(toy, measured, f"get {measured}") == []
    orphan = toy.upload().payload_key
    assert removed_meanwhile(toy, orphan, "list deadletters/") == []
    update = event_of(toy, Refused).refusal.update
    refusal = rejected_key("toy", update.site, update.update_id)
    assert removed_meanwhile(toy, refusal, f"get {refusal}") == []


def test_a_record_that_disappears_is_an_error(toy: ToyJob) -> None:
    key = log_key("toy", 3)
    found = removed_meanwhile(toy, key, f"get {key}")
    assert "not any more" in only(found, key)


def test_a_payload_that_grows_is_an_error(toy: ToyJob) -> None:
    key = needed_keys(toy)["a merged payload"]
    grown = toy.store.get(key, max_bytes=1 << 20) + b"x"
    store = Watched(toy.store, lambda what: what == f"get {key}", lambda: toy.store.put(key, grown))
    assert f"has {len(grown)} bytes, at most {len(grown) - 1} are read" in only(errors(store), key)


def test_a_listing_that_misses_a_record_which_is_there_is_no_gap(toy: ToyJob) -> None:
    hidden = log_key("toy", 3)

    class Hiding(Watched):
        def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
            return (key for key in super().list(prefix, start_after=start_after) if key != hidden)

    run = Audit(Hiding(toy.store, lambda what: False, lambda: None), "toy")
    assert list(run.findings()) == []
    assert run.tally.records == len(toy.records())


class Cutting(Watched):
    """The first reading of each object ends early."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner, lambda what: False, lambda: None)
        self._cut: set[str] = set()

    def get(self, key: str, *, max_bytes: int) -> bytes:
        data = super().get(key, max_bytes=max_bytes)
        first = key not in self._cut and not key.endswith("job.json")
        self._cut.add(key)
        return data[: len(data) // 2] if first else data


def test_what_was_read_incompletely_once_is_no_error() -> None:
    toy = new_job()  # without a refusal, which is read once
    toy.round()
    toy.accept()
    assert findings(Cutting(toy.store)) == []


class Failing(Watched):
    """Each reading fails `times` times, a listing after its first keys."""

    def __init__(self, inner: MemoryStore, times: int) -> None:
        super().__init__(inner, lambda what: False, lambda: None)
        self._times, self._failed = times, 0

    def _reached(self, what: str) -> None:
        if self._failed < self._times:
            self._failed += 1
            raise StoreUnavailable("not now")
        self._failed = 0

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        for number, key in enumerate(self._inner.list(prefix, start_after=start_after)):
            if number == 3:
                raise StoreUnavailable("not now")
            yield key


def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.readonly.FIRST_WAIT_S", 0.0)


def test_a_store_that_fails_now_and_then_is_asked_again(toy: ToyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pause(monkeypatch)
    run = Audit(Failing(toy.store, ATTEMPTS - 1), "toy")
    assert list(run.findings()) == []
    assert run.tally.records == len(toy.records())


def test_a_store_that_does_not_answer_ends_the_audit(toy: ToyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pause(monkeypatch)
    with pytest.raises(StoreUnavailable, match="not now"):
        list(audit(Failing(toy.store, ATTEMPTS), "toy"))


def test_a_listing_that_always_breaks_off_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pause(monkeypatch)

    class Dead(MemoryStore):
        def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
            raise StoreUnavailable("not now")

    with pytest.raises(StoreUnavailable, match="not now"):
        list(ReadOnlyStore(Dead()).list("x"))


def test_waits_grow_and_are_bounded() -> None:
    waits: list[float] = []
    with pytest.raises(StoreUnavailable):
        ReadOnlyStore(Failing(MemoryStore(), 100), sleep=waits.append).size("x")
    assert len(waits) == ATTEMPTS - 1
    assert waits == sorted(waits)
    assert 3 < sum(waits) < 8


def test_a_store_for_reading_is_not_written(tmp_path: Path) -> None:
    inner = MemoryStore()
    inner.put("x", b"data")
    store = ReadOnlyStore(inner)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(AccessDenied, match="reading"):
            write("y", b"")
    with pytest.raises(AccessDenied, match="reading"):
        store.delete("x")
    assert list(inner.list("")) == ["x"]
    digest = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    store.get_to_file("x", tmp_path / "x", nbytes=4, sha256=digest)
    assert (tmp_path / "x").read_bytes() == b"data"


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_passes(toy: ToyJob, tmp_path: Path) -> None:
    orphan = toy.upload()
    result = CliRunner().invoke(app, ["audit", "toy", "--store-url", on_disk(toy, tmp_path)])
    assert result.exit_code == 0, result.output
    first, last = result.output.splitlines()
    assert first.startswith(f"note   {orphan.payload_key}: an upload, ")
    assert last.startswith(f"pass  toy: {len(toy.records())} records, 4 versions; updates: 18 merged, ")
    assert "1 pending, 1 orphaned" in last
    assert last.endswith("0 errors, 1 notes")


def test_the_command_fails_with_a_line_for_each_error(toy: ToyJob, tmp_path: Path) -> None:
    key = toy.flip(event_of(toy, Published).merged[0].update.payload_key)
    url = on_disk(toy, tmp_path)
    result = CliRunner().invoke(app, ["audit", "toy", "--store-url", url])
    assert result.exit_code == 1
    first, last = result.output.splitlines()
    assert first.startswith(f"error  {key}: ")
    assert last.startswith("FAIL  toy: ")
    assert CliRunner().invoke(app, ["audit", "toy", "--quick", "--store-url", url]).exit_code == 0


def test_the_command_names_the_jobs_there_are(toy: ToyJob, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", "nowhere", "--store-url", on_disk(toy, tmp_path)])
    assert result.exit_code == 1
    assert "nowhere" in result.output
    assert "toy" in result.output
