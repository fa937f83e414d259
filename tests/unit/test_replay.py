"""A replay makes every version of a real job again, bit for bit, and stops at the first thing that was changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from federation.errors import CorruptLog, NotFound, StoreUnavailable
from federation.keys import log_key, models_prefix
from federation.requests import SteerModel
from federation.types import Accepted, Closed, Created, Published, Refused, RolledBack
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.tensors import encode, from_arrays
from tasks.accept import accept
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.replay import Replay, Replayed, replay
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.unit.audit_cases import (
    BROKEN_DECISIONS,
    POLICIES,
    Change,
    ToyJob,
    at,
    new_job,
    on_disk,
    play,
    seasoned_job,
    seq_of,
    steered_job,
    worker,
)


@pytest.fixture
def toy() -> ToyJob:
    return seasoned_job()


def versions(toy: ToyJob) -> list[tuple[int, int, str]]:
    """(seq, version, digest) of every version in the log."""
    made = [
        r
        for r in toy.records()
        if isinstance(r.event, Created | RolledBack) or (isinstance(r.event, Published) and r.event.merged)
    ]
    return [(r.seq, r.head.version, r.head.current.model.sha256) for r in made]


def last(toy: ToyJob) -> Replayed:
    """The last step, before which all were equal."""
    *before, step = replay(toy.store, "toy")
    assert all(earlier.equal for earlier in before)
    return step


# --- what is right, is equal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_version_is_made_again(policy: str) -> None:
    toy = seasoned_job(policy)
    steps = list(replay(toy.store, "toy"))
    assert len(steps) >= 3
    assert [(s.seq, s.version, s.recomputed) for s in steps] == versions(toy)
    assert all(s.equal and s.expected == s.recomputed for s in steps)
    merged = [len(r.event.merged) for r in toy.records() if isinstance(r.event, Published) and r.event.merged]
    assert [s.updates for s in steps] == [0, *merged]


@pytest.mark.parametrize("policy", ["fedasync", "fedbuff-fedyogi", "fedavg"])
def test_a_closed_job_is_made_again(policy: str) -> None:
    toy = new_job(policy, max_versions=2)
    toy.round()
    toy.round()
    assert toy.log.head().head.closed is not None
    step = last(toy)
    assert (step.version, step.equal) == (2, True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "policy",
    ["fedasync-hinge", "fedbuff-fedadam", "fedbuff-participation", "fedbuff-shared", "fedavg-fedadam"],
)
def test_random_histories_are_made_again(policy: str, seed: int) -> None:
    toy = new_job(policy, max_versions=12, seed=seed)
    play(toy, seed, moves=60)
    assert last(toy).equal
    assert len(list(replay(toy.store, "toy"))) == len(versions(toy)) > 1


def test_a_log_that_forgets_many_ids_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aggregator.transitions.REMEMBERED_LIMIT", 4)
    toy = new_job("fedasync")
    play(toy, seed=3, moves=60)
    assert toy.log.head().head.remembered_from > 0
    assert last(toy).equal


def test_one_publish_of_many_and_many_publishes_are_both_made_again() -> None:
    """The log says which updates each publish had; how many there were is no matter."""
    one, many = new_job("fedbuff"), new_job("fedbuff")
    one.round()
    for site in ("site-a", "site-b", "site-a", "site-b", "site-a", "site-b"):
        many.accept(site=site)
        many.publish()
    assert [s.version for s in replay(one.store, "toy")] == [0, 3]
    assert [s.version for s in replay(many.store, "toy")] == [0, 1, 2, 3]
    assert last(one).equal
    assert last(many).equal


@pytest.mark.parametrize("kept", [("conv.weight",), ("conv.weight", "norm.weight", "norm.bias")])
def test_versions_without_the_norm_layers_are_made_again(kept: tuple[str, ...]) -> None:
    def part(value: float) -> dict[str, Any]:
        return {name: array for name, array in toy_arrays(value).items() if name in kept}

    store = MemoryStore()
    context, spec = worker(store), job_spec()
    initial = save_model(store, "toy", from_arrays(toy_arrays()))
    job = create(context, spec, initial, save_model(store, "toy", from_arrays(part(0.0))))
    for value in (1.0, 2.5):
        payload = payload_of(part(value))
        update = client_update(payload)
        store.put_if_absent(update.payload_key, payload)
        accept(context, update)
        publish_pending(context, job)
    steps = list(replay(store, "toy"))
    assert [(s.version, s.equal) for s in steps] == [(0, True), (1, True), (2, True)]


def test_a_version_whose_file_is_gone_is_compared_by_its_digest(toy: ToyJob) -> None:
    first = toy.records()[0].head.current.model.key
    gone = [key for key in toy.store.list(models_prefix("toy")) if key != first]
    toy.collect(*gone)
    assert len(gone) >= 3
    step = last(toy)
    assert (step.version, step.equal) == (18, True)


def test_another_machines_power_function_may_round_differently(toy: ToyJob) -> None:
    """A weight that differs by less than one part in a million millions is used as the log has it."""
    rounded = new_job("fedbuff")
    rounded.round()
    seq, accepted = seq_of(rounded, Published), seq_of(rounded, Accepted)
    weight = rounded.records()[seq].event.merged[5].weight  # type: ignore[union-attr]
    assert weight not in (0.0, 1.0)
    near = weight * (1 + 1e-14)
    assert near != weight
    rounded.edit(accepted, at("event.contribution.weight", lambda _: near))
    for record in range(accepted, seq):
        rounded.edit(record, at("head.pending.5.weight", lambda _: near))
    assert last(rounded).equal
    far = weight * (1 + 1e-9)
    rounded.edit(accepted, at("event.contribution.weight", lambda _: far))
    assert f"weight {far!r} is recorded" in last(rounded).difference


def test_nothing_is_written(toy: ToyJob) -> None:
    before = {key: toy.store.modified(key) for key in toy.store.list("")}
    assert last(toy).equal
    assert {key: toy.store.modified(key) for key in toy.store.list("")} == before


# --- up to a version -------------------------------------------------------------------------------------------


def test_it_stops_at_the_version_that_was_asked_for(toy: ToyJob) -> None:
    assert [s.version for s in replay(toy.store, "toy", 0)] == [0]
    assert [s.version for s in replay(toy.store, "toy", 12)] == [0, 6, 12]
    toy.flip(toy.records()[-2].event.merged[0].update.payload_key)  # type: ignore[union-attr]
    assert [s.equal for s in replay(toy.store, "toy", 12)] == [True] * 3


@pytest.mark.parametrize("policy", ["fedasync", "fedbuff-fedadam", "fedbuff-shared", "fedavg"])
def test_its_model_is_that_version(policy: str) -> None:
    toy = seasoned_job(policy)
    for record in toy.records():
        run = Replay(toy.store, "toy")
        *_, step = run.steps(record.head.version)
        current = record.head.current
        assert step.recomputed == hashlib.sha256(encode(run.model)).hexdigest() == current.model.sha256
        assert encode(run.model) == encode(load_model(toy.store, current.model))


def test_a_version_that_was_never_stored_is_named_with_its_neighbours(toy: ToyJob) -> None:
    with pytest.raises(NotFound, match=r"version 7 was never stored: .* from 6 to 12"):
        list(replay(toy.store, "toy", 7))
    with pytest.raises(NotFound, match=r"version 19 is not made yet: the newest is 18"):
        list(replay(toy.store, "toy", 19))


def test_there_must_be_a_job() -> None:
    with pytest.raises(NotFound, match="nowhere"):
        list(replay(MemoryStore(), "nowhere"))


# --- what was changed, is named --------------------------------------------------------------------------------


def merged_payload(toy: ToyJob, which: int) -> str:
    published = [r.event for r in toy.records() if isinstance(r.event, Published) and r.event.merged]
    return published[which].merged[0].update.payload_key


def test_one_changed_bit_of_a_payload_ends_it_there(toy: ToyJob) -> None:
    key = toy.flip(merged_payload(toy, 1))
    step = last(toy)
    assert (step.seq, step.version) == versions(toy)[2][:2]
    assert key in step.difference
    assert "sha256" in step.difference


def test_a_missing_payload_ends_it_there(toy: ToyJob) -> None:
    key = merged_payload(toy, 1)
    toy.store.delete(key)
    step = last(toy)
    assert step.version == 12
    assert key in step.difference
    assert "restore it" in step.difference


def test_a_payload_that_retention_took_is_told_with_the_record(toy: ToyJob) -> None:
    key = merged_payload(toy, 1)
    toy.collect(key)
    assert f"retention removed it with record {toy.log.head().seq}" in last(toy).difference


@pytest.mark.parametrize("harm", ["delete", "flip"])
def test_without_version_0_nothing_begins(toy: ToyJob, harm: str) -> None:
    key = toy.records()[0].head.current.model.key
    if harm == "delete":
        toy.store.delete(key)
    else:
        toy.flip(key)
    (step,) = replay(toy.store, "toy")
    assert not step.equal
    assert key in step.difference


def republish(toy: ToyJob, change: Change) -> Replayed:
    """Falsify the newest publish, and return what a replay says of it."""
    seq = seq_of(toy, Published)
    toy.edit(seq, change)
    step = last(toy)
    assert (step.seq, step.equal) == (seq, False)
    return step


@pytest.mark.parametrize("policy", POLICIES)
def test_another_model_in_the_log_is_found(policy: str) -> None:
    step = republish(seasoned_job(policy), at("head.current.model.sha256", lambda _: "0" * 64))
    assert "the model is recorded as" in step.difference
    assert step.expected == "0" * 64 != step.recomputed
    assert step.recomputed in step.difference


@pytest.mark.parametrize("policy", ["fedbuff-fedavgm", "fedbuff-shared", "fedavg-fedadam"])
@pytest.mark.parametrize(
    "change",
    [
        at("head.current.server_state.sha256", lambda _: "0" * 64),
        at("head.current.server_state", lambda _: None),
    ],
)
def test_another_optimiser_state_in_the_log_is_found(policy: str, change: Any) -> None:
    step = republish(seasoned_job(policy), change)
    assert "the optimiser's state is recorded as" in step.difference
    assert step.expected == step.recomputed


def test_a_state_without_an_optimiser_is_found(toy: ToyJob) -> None:
    model = json.loads(toy.log.head().head.current.model.to_json())
    step = republish(toy, at("head.current.server_state", lambda _: model))
    assert "and made again it is none" in step.difference


def test_a_model_that_was_folded_in_another_order_is_found() -> None:
    """The digests fit the payloads, and each update is there once; but FedAsync depends on the order."""
    toy = new_job()
    toy.accept()
    toy.accept(site="site-b")
    toy.publish()
    step = republish(toy, at("event.merged", lambda merged: merged[::-1]))
    assert "in the order of the log" in step.difference


FALSE_NUMBERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "staleness": ("staleness", lambda n: n + 1, "staleness 1 is recorded, 0 is right"),
    "weight": ("weight", lambda w: w * 1.001, "weight"),
    "version": ("version", lambda v: v + 1, "version 2 is recorded, 1 is right"),
}


@pytest.mark.parametrize("name", FALSE_NUMBERS)
@pytest.mark.parametrize("policy", ["fedasync", "fedbuff", "fedavg"])
def test_false_numbers_of_an_accepted_update_are_found(policy: str, name: str) -> None:
    toy = new_job(policy)
    update = toy.accept()
    field, change, expected = FALSE_NUMBERS[name]
    toy.edit(1, at(f"event.contribution.{field}", change))
    toy.edit(1, at(f"head.pending.0.{field}", change))
    step = last(toy)
    assert step.seq == 1
    assert update.update_id in step.difference
    assert expected in step.difference


@pytest.mark.parametrize("name", FALSE_NUMBERS)
@pytest.mark.parametrize("policy", ["fedasync", "fedbuff", "fedavg"])
def test_false_numbers_of_a_merged_update_are_found(policy: str, name: str) -> None:
    toy = new_job(policy)
    toy.accept()
    toy.accept(site="site-b")
    toy.publish()
    field, change, expected = FALSE_NUMBERS[name]
    assert expected in republish(toy, at(f"event.merged.0.{field}", change)).difference


def test_a_merge_of_what_was_not_pending_is_found(toy: ToyJob) -> None:
    stranger = toy.upload()
    step = republish(toy, at("event.merged.0.update", lambda _: json.loads(stranger.to_json())))
    assert "not the first that were pending" in step.difference


def test_a_merge_that_leaves_one_out_is_found(toy: ToyJob) -> None:
    assert "not the first that were pending" in republish(toy, at("event.merged", lambda m: m[1:])).difference


def test_an_incomplete_group_is_found() -> None:
    toy = new_job("fedbuff")
    toy.accept()
    toy.accept()
    toy.publish()
    assert "do not complete a version" in republish(toy, at("event.merged", lambda m: m[:1])).difference


WRONG_HEADS: dict[str, tuple[type, str, Callable[[Any], Any], str]] = {
    "pending": (Accepted, "head.pending", lambda p: p[1:], "pending"),
    "remembered": (Accepted, "head.remembered", lambda r: r[1:], "remembered"),
    "closed": (Refused, "head.closed", lambda _: "why", "closed"),
    "version": (Accepted, "head.current.version", lambda v: v + 1, "current"),
    "published version": (Published, "head.current.version", lambda v: v - 1, "current"),
    "forgotten": (Published, "head.remembered", lambda r: r[:-1], "remembered"),
    "twice created": (Refused, "event", lambda _: {"type": "created"}, "not created twice"),
    "begun late": (Created, "head.current.version", lambda _: 1, "version 1"),
    "not created": (Created, "event", lambda _: {"type": "closed", "reason": "r"}, "begins with 'closed'"),
    "begun with ids": (
        Created,
        "head.remembered",
        lambda _: [{"update_id": "01890000-0000-7000-8000-000000000000", "base_version": 0}],
        "remembered",
    ),
}


@pytest.mark.parametrize("name", WRONG_HEADS)
def test_a_head_that_is_not_what_the_event_makes_is_found(toy: ToyJob, name: str) -> None:
    kind, path, change, expected = WRONG_HEADS[name]
    seq = seq_of(toy, kind)
    toy.edit(seq, at(path, change))
    step = last(toy)
    assert step.seq == seq
    assert expected in step.difference


def test_a_job_that_was_steered_is_made_again() -> None:
    toy = steered_job()
    assert last(toy).equal
    assert [(s.seq, s.version, s.recomputed) for s in replay(toy.store, "toy")] == versions(toy)


@pytest.mark.parametrize("name", BROKEN_DECISIONS)
def test_a_decision_that_the_head_does_not_show_is_found(name: str) -> None:
    toy = steered_job()
    kind, change, _ = BROKEN_DECISIONS[name]
    seq = seq_of(toy, kind)
    toy.edit(seq, change)
    step = last(toy)
    assert (step.seq, step.equal) == (seq, False)


def test_a_rollback_that_refuses_others_than_it_strands_is_found() -> None:
    toy = new_job("fedbuff")
    toy.round()
    toy.accept(base_version=3)
    toy.ask(SteerModel(job="toy", action="rollback", version=0))
    toy.edit(seq_of(toy, RolledBack), at("event.refused", lambda _: []))
    assert "refused updates are not those" in last(toy).difference


def test_an_update_that_counts_twice_is_found(toy: ToyJob) -> None:
    newest = toy.log.head()
    event = toy.records()[seq_of(toy, Accepted, 0)].event
    toy.log.append(newest, event, newest.head)
    step = last(toy)
    assert step.seq == newest.seq + 1
    assert not step.equal


def test_a_job_that_does_not_close_with_its_last_version_is_found() -> None:
    toy = new_job(max_versions=1)
    toy.accept()
    toy.publish()
    assert "closed" in republish(toy, at("head.closed", lambda _: None)).difference


def test_a_version_after_the_last_is_found() -> None:
    toy = new_job()
    toy.round()
    shorter = json.loads(toy.store.get("jobs/toy/job.json", max_bytes=1 << 20))
    shorter["spec"]["stop"]["max_versions"] = 3
    toy.store.put("jobs/toy/job.json", json.dumps(shorter).encode())
    assert "ends with version 3" in last(toy).difference


def test_another_policy_in_the_description_is_found(toy: ToyJob) -> None:
    description = json.loads(toy.store.get("jobs/toy/job.json", max_bytes=1 << 20))
    description["spec"]["aggregation"]["alpha"] = 0.7
    toy.store.put("jobs/toy/job.json", json.dumps(description).encode())
    step = last(toy)
    assert (step.seq, "weight" in step.difference) == (1, True)


def test_a_job_that_was_closed_by_hand_is_made_again(toy: ToyJob) -> None:
    newest = toy.log.head()
    toy.log.append(newest, Closed(reason="enough"), newest.head.model_copy(update={"closed": "enough"}))
    assert last(toy).equal


def test_a_missing_record_is_a_corrupt_log(toy: ToyJob) -> None:
    toy.store.delete(log_key("toy", 3))
    with pytest.raises(CorruptLog, match="3 is missing"):
        list(replay(toy.store, "toy"))


def test_swapped_records_are_a_corrupt_log(toy: ToyJob) -> None:
    one, other = (toy.store.get(log_key("toy", seq), max_bytes=1 << 20) for seq in (2, 3))
    toy.store.put(log_key("toy", 2), other)
    toy.store.put(log_key("toy", 3), one)
    with pytest.raises(CorruptLog, match="record 3"):
        list(replay(toy.store, "toy"))


def test_swapped_events_are_found(toy: ToyJob) -> None:
    """Two updates of one base whose records change places, numbers and all."""
    two, three = toy.records()[2], toy.records()[3]
    toy.edit(2, at("event", lambda _: json.loads(three.event.model_dump_json())))
    toy.edit(3, at("event", lambda _: json.loads(two.event.model_dump_json())))
    step = last(toy)
    assert step.seq == 2
    assert "staleness 2 is recorded, 1 is right" in step.difference


def test_a_store_that_does_not_answer_ends_it(toy: ToyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.readonly.FIRST_WAIT_S", 0.0)

    class Dead(MemoryStore):
        def get(self, key: str, *, max_bytes: int) -> bytes:
            raise StoreUnavailable("not now")

    with pytest.raises(StoreUnavailable, match="not now"):
        list(replay(Dead(), "toy"))


# --- the command -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["replay", *arguments], env={"COLUMNS": "200"})


def test_the_command_passes(toy: ToyJob, tmp_path: Path) -> None:
    result = command("toy", "--store-url", on_disk(toy, tmp_path))
    assert result.exit_code == 0
    assert result.output == "3 versions from 18 updates, all equal\n"


def test_the_command_names_the_first_version_that_differs(toy: ToyJob, tmp_path: Path) -> None:
    key = toy.flip(merged_payload(toy, 1))
    result = command("toy", "--store-url", on_disk(toy, tmp_path))
    assert result.exit_code == 1
    assert f"record {versions(toy)[2][0]}, version 12: {key}" in result.output
    assert "equal" not in result.output


def test_the_command_writes_a_version_that_retention_removed(toy: ToyJob, tmp_path: Path) -> None:
    _, version, digest = versions(toy)[2]
    model = next(r.head.current.model for r in toy.records() if r.head.version == version)
    content = toy.store.get(model.key, max_bytes=1 << 20)
    toy.collect(model.key)
    out = tmp_path / "out.safetensors"
    url = on_disk(toy, tmp_path / "store")
    result = command("toy", "--to", str(version), "--out", str(out), "--store-url", url)
    assert result.exit_code == 0
    assert "2 versions from 12 updates, all equal" in result.output
    assert out.read_bytes() == content
    assert hashlib.sha256(content).hexdigest() == digest
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", "store"}


def test_the_command_writes_nothing_that_differs(toy: ToyJob, tmp_path: Path) -> None:
    toy.flip(merged_payload(toy, 0))
    out = tmp_path / "out.safetensors"
    result = command("toy", "--out", str(out), "--store-url", on_disk(toy, tmp_path / "store"))
    assert result.exit_code == 1
    assert not out.exists()


def test_the_command_names_neighbours_and_jobs(toy: ToyJob, tmp_path: Path) -> None:
    url = on_disk(toy, tmp_path)
    result = command("toy", "--to", "7", "--store-url", url)
    assert result.exit_code == 1
    assert "from 6 to 12" in result.output
    result = command("nowhere", "--store-url", url)
    assert result.exit_code == 1
    assert "toy" in result.output
