"""Proposing a version for release, answering, and the bundle: the handlers on one store, without queues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.release_check import check
from federation import keys
from federation.governance import Card, Consents, Decision, SignedConsent, SiteAnswer
from federation.ids import new_update_id
from federation.jobs import JobSpec, ModelRef, ReleaseRule
from federation.requests import (
    Answer,
    AnswerRelease,
    Consent,
    JoinJob,
    ProposeRelease,
    Request,
    SteerModel,
    What,
)
from federation.signatures import SigningKey, fingerprint
from federation.types import MAP, SERVER, Evaluation
from storage.audit import audit
from storage.control import load_key, load_member
from storage.folder import FolderStore
from storage.jobs import save_evaluation
from storage.memory import MemoryStore
from storage.models import save_model
from storage.releases import BUNDLE_FILES, ONNX, SUMS, append_record, is_released, load_release, parse_sums
from storage.tensors import from_arrays
from tasks import bundle, celery
from tasks.accept import accept
from tasks.jobs import create
from tasks.model_card import ANONYMOUS
from tasks.publish import publish_pending
from tasks.release import MAX_ANSWERS, ask_for_bundles
from tasks.requests import handle
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.unit.test_tasks import Worker

SITES = ("site-a", "site-b", "site-c")
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(MemoryStore(), tmp_path)
    yield made
    made.broker.close()


@pytest.fixture
def site_keys() -> dict[str, SigningKey]:
    return {site: SigningKey.new() for site in SITES}


def trained(worker: Worker, sites: tuple[str, ...] = SITES, **changes: Any) -> int:
    """A job to whose newest version each of `sites` contributed. Returns that version."""
    spec: JobSpec = job_spec(**changes)
    ref = save_model(worker.store, spec.id, from_arrays(toy_arrays()))
    create(worker, spec, ref, ref)
    for site in sites:
        contribute(worker, site)
    return worker.log("toy").head().head.version


def contribute(worker: Worker, site: str) -> None:
    payload = payload_of(toy_arrays(1.0))
    base = worker.log("toy").head().head.version
    update = client_update(payload, site=site, base_version=base)
    worker.store.put_if_absent(update.payload_key, payload)
    accept(worker, update)
    publish_pending(worker, worker.job("toy"))


def ask(worker: Worker, who: str, what: What) -> Answer:
    request = Request(request_id=new_update_id(), who=who, what=what, at=datetime.now(UTC))
    return handle(worker, request)


def propose(worker: Worker, version: int, purpose: str = "a pilot", who: str = SERVER) -> Answer:
    return ask(worker, who, ProposeRelease(job="toy", version=version, purpose=purpose))


def consent(worker: Worker, version: int, answer: str = "approve", **changes: Any) -> Consent:
    release = load_release(worker.store, "toy", version)
    assert release is not None
    proposal = release.proposal
    values: dict[str, Any] = {
        "kind": "release-consent",
        "job": "toy",
        "version": version,
        "model_sha256": proposal.model_sha256,
        "file_sha256": proposal.file_sha256,
        "purpose": proposal.purpose,
        "answer": answer,
        "at": datetime.now(UTC),
    }
    return Consent(**(values | changes))


def signed(consent: Consent, key: SigningKey) -> AnswerRelease:
    text = consent.to_json().decode()
    return AnswerRelease(
        job="toy", version=consent.version, signed=text, public_key=key.public_key, signature=key.sign(text)
    )


def sent(worker: Worker) -> list[dict[str, str]]:
    """What write_release was asked for."""
    return [dict(arguments) for name, arguments in worker.sent if name == celery.WRITE_RELEASE]


def copied(worker: Worker, version: int, folder: Path) -> Path:
    """The bundle as files."""
    folder.mkdir()
    for name in (SUMS, *BUNDLE_FILES):
        key = keys.bundle_key("toy", version, name)
        if key in worker.store.list(key):
            (folder / name).write_bytes(worker.store.get(key, max_bytes=1 << 26))
    return folder


def released(worker: Worker, site_keys: dict[str, SigningKey], version: int) -> None:
    """Proposed, approved by all (site-a without its name), and written."""
    assert propose(worker, version).ok
    for site, key in site_keys.items():
        name = None if site == "site-a" else site
        assert ask(worker, site, signed(consent(worker, version, site=name), key)).ok
    assert bundle.write(worker, "toy", version)


# --- proposing -----------------------------------------------------------------------------------------------


def test_a_proposal_asks_who_contributed_and_keeps_the_very_file(worker: Worker) -> None:
    version = trained(worker, ("site-b", "site-a", "site-b"))
    answer = propose(worker, version)
    assert answer.ok
    assert "waiting for site-a, site-b" in answer.message
    release = load_release(worker.store, "toy", version)
    assert release is not None
    assert release.proposal.contributors == ("site-a", "site-b")
    model = worker.store.get(keys.bundle_key("toy", version, "model.safetensors"), max_bytes=1 << 20)
    assert ModelRef(key="x", sha256=release.proposal.file_sha256, nbytes=len(model)) == ModelRef(
        key="x", sha256=bundle.sha256(model), nbytes=release.proposal.file_bytes
    )
    assert release.proposal.model_sha256 == worker.log("toy").version(version).model.sha256


def test_asking_again_is_harmless_and_another_purpose_is_another_question(worker: Worker) -> None:
    version = trained(worker)
    assert propose(worker, version).ok
    before = worker.store.get(keys.proposal_key("toy", version), max_bytes=1 << 16)
    assert propose(worker, version).ok
    refused = propose(worker, version, "something else")
    assert not refused.ok
    assert "another purpose" in refused.errors[0]
    assert worker.store.get(keys.proposal_key("toy", version), max_bytes=1 << 16) == before


def test_only_the_submitter_or_an_operator_proposes(worker: Worker) -> None:
    version = trained(worker)
    refused = propose(worker, version, who="site-a")
    assert not refused.ok
    assert "only that site or an operator" in refused.errors[0]


@pytest.mark.parametrize(("version", "words"), [(0, "nobody to ask"), (99, "no stored version 99")])
def test_what_cannot_be_proposed(worker: Worker, version: int, words: str) -> None:
    trained(worker)
    refused = propose(worker, version)
    assert not refused.ok
    assert words in refused.errors[0]
    assert list(worker.store.list(keys.releases_prefix("toy"))) == []


def test_a_version_that_was_rolled_back_cannot_be_proposed_and_its_sites_are_not_asked(
    worker: Worker,
) -> None:
    trained(worker, ("site-a", "site-b"))
    assert ask(worker, SERVER, SteerModel(job="toy", action="rollback", version=1)).ok
    refused = propose(worker, 2)
    assert "rolled back" in refused.errors[0]
    contribute(worker, "site-c")
    newest = worker.log("toy").head().head.version
    assert "waiting for site-a, site-c" in propose(worker, newest).message


def test_a_version_in_quarantine_cannot_be_proposed(worker: Worker) -> None:
    from aggregator import transitions
    from federation.types import Quarantined

    version = trained(worker)
    newest = worker.log("toy").head()
    head = transitions.quarantine(newest.head, version, "worse", worker.log("toy").version(version - 1))
    worker.log("toy").append(newest, Quarantined(version=version, reason="worse"), head)
    assert "in quarantine (worse)" in propose(worker, version).errors[0]
    assert propose(worker, version - 1).ok


# --- answering -----------------------------------------------------------------------------------------------


def test_a_refusal_is_kept_with_its_reason_and_a_later_approval_replaces_it(
    worker: Worker, site_keys: dict[str, SigningKey]
) -> None:
    version = trained(worker)
    propose(worker, version)
    no = consent(worker, version, "refuse", reason="pilots only")
    assert "refused by site-a" in ask(worker, "site-a", signed(no, site_keys["site-a"])).message
    for site in ("site-b", "site-c"):
        assert ask(worker, site, signed(consent(worker, version), site_keys[site])).ok
    assert sent(worker) == []
    assert not bundle.write(worker, "toy", version)
    yes = ask(worker, "site-a", signed(consent(worker, version), site_keys["site-a"]))
    assert "being written" in yes.message
    assert sent(worker) == [{"job": "toy", "version": str(version)}]
    release = load_release(worker.store, "toy", version)
    assert release is not None
    first = release.answers[0].consent.consent()
    assert (release.answers[0].site, first.answer, first.reason) == ("site-a", "refuse", "pilots only")
    assert release.approves == dict.fromkeys(SITES, True)


def test_an_answer_that_is_delivered_again_counts_once_and_does_not_undo_a_later_one(
    worker: Worker, site_keys: dict[str, SigningKey]
) -> None:
    version = trained(worker)
    propose(worker, version)
    yes = signed(consent(worker, version, at=START), site_keys["site-a"])
    no = signed(consent(worker, version, "refuse", at=START + timedelta(seconds=9)), site_keys["site-a"])
    for what in (yes, no, yes, no, yes):
        assert ask(worker, "site-a", what).ok
    release = load_release(worker.store, "toy", version)
    assert release is not None
    assert len(release.answers) == 2
    assert release.approves == {"site-a": False}
    late = ask(worker, "site-a", signed(consent(worker, version, at=START), site_keys["site-a"]))
    assert late.ok  # word for word what was answered first
    older = consent(worker, version, reason="x", at=START + timedelta(seconds=3))
    assert "a later answer" in ask(worker, "site-a", signed(older, site_keys["site-a"])).errors[0]


def test_an_operator_cannot_answer_nor_forge_an_answer(
    worker: Worker, site_keys: dict[str, SigningKey]
) -> None:
    version = trained(worker)
    propose(worker, version)
    assert ask(
        worker, "site-a", JoinJob(job="toy", num_images=1, public_key=site_keys["site-a"].public_key)
    ).ok
    forger = SigningKey.new()
    own = ask(worker, SERVER, signed(consent(worker, version), forger))
    assert "an operator cannot" in own.errors[0]
    as_site = ask(worker, "site-a", signed(consent(worker, version), forger))
    assert fingerprint(site_keys["site-a"].public_key) in as_site.errors[0]
    borrowed = signed(consent(worker, version), forger)
    borrowed = borrowed.model_copy(update={"public_key": site_keys["site-a"].public_key})
    assert "signature" in ask(worker, "site-a", borrowed).errors[0]
    release = load_release(worker.store, "toy", version)
    assert release is not None
    assert release.records == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "other"},
        {"model_sha256": "0" * 64},
        {"file_sha256": "0" * 64},
        {"purpose": "for everybody"},
        {"site": "site-b"},
    ],
)
def test_what_is_signed_must_be_what_was_asked(
    worker: Worker, site_keys: dict[str, SigningKey], changes: dict[str, str]
) -> None:
    version = trained(worker)
    propose(worker, version)
    what = signed(consent(worker, version, **changes), site_keys["site-a"])
    refused = ask(worker, "site-a", what)
    assert next(iter(changes)) in refused.errors[0]
    assert load_key(worker.store, "site-a") is None


def test_a_consent_to_another_version_does_not_count_for_this_one(
    worker: Worker, site_keys: dict[str, SigningKey]
) -> None:
    version = trained(worker)
    propose(worker, version)
    propose(worker, version - 1)
    other = signed(consent(worker, version - 1), site_keys["site-a"])
    refused = ask(worker, "site-a", other.model_copy(update={"version": version}))
    assert "version" in refused.errors[0]


def test_who_did_not_contribute_and_what_was_not_proposed_have_no_answer(
    worker: Worker, site_keys: dict[str, SigningKey]
) -> None:
    version = trained(worker, ("site-a",))
    propose(worker, version)
    what = signed(consent(worker, version), site_keys["site-b"])
    assert "no work of site site-b" in ask(worker, "site-b", what).errors[0]
    unasked = what.model_copy(update={"version": 0})
    assert "nobody has proposed" in ask(worker, "site-a", unasked).errors[0]


def test_a_clock_that_is_far_ahead_is_told(worker: Worker, site_keys: dict[str, SigningKey]) -> None:
    version = trained(worker)
    propose(worker, version)
    ahead = consent(worker, version, at=datetime.now(UTC) + timedelta(days=2))
    assert "set this machine's clock" in ask(worker, "site-a", signed(ahead, site_keys["site-a"])).errors[0]


def test_the_first_key_counts_and_a_site_that_joins_with_another_is_told(worker: Worker) -> None:
    trained(worker)
    first, second = SigningKey.new(), SigningKey.new()
    for _ in range(2):
        assert ask(worker, "site-a", JoinJob(job="toy", num_images=1, public_key=first.public_key)).ok
    known = load_key(worker.store, "site-a")
    assert known is not None
    assert known.public_key == first.public_key
    assert ask(worker, "site-b", JoinJob(job="toy", num_images=1, public_key=None)).ok
    assert load_key(worker.store, "site-b") is None
    told = ask(worker, "site-a", JoinJob(job="toy", num_images=7, public_key=second.public_key))
    assert told.ok
    assert "will not count" in told.message
    assert fingerprint(first.public_key) in told.message
    assert load_key(worker.store, "site-a") == known
    member = load_member(worker.store, "toy", "site-a")
    assert member is not None
    assert member.num_images == 7


# --- the bundle ----------------------------------------------------------------------------------------------


def test_the_bundle_is_whole_and_verifies(
    worker: Worker, site_keys: dict[str, SigningKey], tmp_path: Path
) -> None:
    version = trained(worker)
    for who, images in {SERVER: 50, "site-a": 30, "site-b": 20}.items():
        found = Evaluation(
            job="toy",
            version=version,
            who=who,
            num_images=images,
            metrics={"mAP@0.5": 0.5, MAP: 0.25},
            per_class={MAP: {"thing": 0.25}},
            at=START,
        )
        save_evaluation(worker.store, found)
    released(worker, site_keys, version)
    folder = copied(worker, version, tmp_path / "bundle")
    prints = {site: fingerprint(key.public_key) for site, key in site_keys.items()}
    checked = check(folder, prints)
    assert checked.problems == ()
    assert {approval.known_as for approval in checked.approvals} == set(SITES)
    card = Card.from_json((folder / "card.json").read_bytes())
    assert {site.site for site in card.named} == {"site-b", "site-c"}
    assert [site.share for site in card.named] == [pytest.approx(1 / 3)] * 2
    assert card.onnx_sha256 is None
    assert "toy" in card.onnx_problem
    assert card.spans == ((0, 3),)
    text = (folder / "MODEL_CARD.md").read_text()
    for wanted in (
        "site-b",
        "site-c",
        ANONYMOUS,
        "33.3%",
        "a pilot",
        card.file_sha256,
        "0.25",
        "3 of 3 approved",
    ):
        assert wanted in text
    assert any(found.who is None and found.num_images is None for found in card.evaluations)
    for path in folder.iterdir():
        assert b"site-a" not in path.read_bytes(), f"{path.name} names who is not to be named"
    assert [finding for finding in audit(worker.store, "toy") if finding.level == "error"] == []
    assert not [f for f in audit(worker.store, "toy") if "nothing that fedqueue writes" in f.message]


@pytest.mark.parametrize("change", ["answer", "bundle", "missing", "order", "version"])
def test_an_audit_finds_what_was_changed_in_the_store(
    worker: Worker, site_keys: dict[str, SigningKey], change: str
) -> None:
    version = trained(worker)
    released(worker, site_keys, version)
    store, prefix = worker.store, keys.release_prefix("toy", version)
    if change == "answer":
        key = keys.release_record_key("toy", version, 1)
        data = store.get(key, max_bytes=1 << 16)
        store.put(key, data.replace(b"a pilot", b"any use"))
    elif change == "bundle":
        store.put(f"{prefix}bundle/MODEL_CARD.md", b"# All is well")
    elif change == "missing":
        store.delete(f"{prefix}bundle/model.safetensors")
    elif change == "order":
        store.delete(keys.release_record_key("toy", version, 1))
    else:
        store.put(keys.proposal_key("toy", 77), store.get(f"{prefix}proposal.json", max_bytes=1 << 16))
    (finding,) = [found for found in audit(store, "toy") if found.level == "error"]
    assert "/releases/" in finding.subject


def test_after_the_bundle_an_answer_comes_too_late(worker: Worker, site_keys: dict[str, SigningKey]) -> None:
    version = trained(worker)
    released(worker, site_keys, version)
    late = ask(worker, "site-a", signed(consent(worker, version, "refuse"), site_keys["site-a"]))
    assert "too late" in late.errors[0]
    assert not bundle.write(worker, "toy", version)


def test_a_change_of_mind_while_the_bundle_is_prepared_counts(
    worker: Worker, site_keys: dict[str, SigningKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export takes minutes: an answer that comes meanwhile is before the decision."""
    version = trained(worker)
    propose(worker, version)
    for site, key in site_keys.items():
        ask(worker, site, signed(consent(worker, version), key))
    export = bundle._export

    def slow(*arguments: Any) -> tuple[bytes | None, str]:
        assert ask(worker, "site-b", signed(consent(worker, version, "refuse"), site_keys["site-b"])).ok
        return export(*arguments)

    monkeypatch.setattr(bundle, "_export", slow)
    assert not bundle.write(worker, "toy", version)
    assert not is_released(worker.store, "toy", version)
    release = load_release(worker.store, "toy", version)
    assert release is not None
    assert release.decision is None


class Crash(BaseException):
    pass


def test_a_worker_may_die_after_any_write_and_the_next_one_makes_the_same_bundle(
    tmp_path: Path, site_keys: dict[str, SigningKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(MemoryStore):
        left = 10**9

        def put_if_absent(self, key: str, data: bytes | bytearray | memoryview) -> bool:
            if self.left == 0:
                raise Crash
            self.left -= 1
            return super().put_if_absent(key, data)

    # another machine's export need not give the same bytes: then the first one's count
    exports = iter(range(100))
    monkeypatch.setattr(bundle, "_export", lambda *_: (f"onnx {next(exports)}".encode(), ""))
    steps = 0
    while True:
        folder = tmp_path / str(steps)
        folder.mkdir()
        store = Dying()
        worker = Worker(store, folder)
        version = trained(worker)
        propose(worker, version)
        for site, key in site_keys.items():
            ask(worker, site, signed(consent(worker, version), key))
        store.left = steps
        try:
            bundle.write(worker, "toy", version)
            died = False
        except Crash:
            died = True
            assert not is_released(store, "toy", version)
        store.left = 10**9
        worker.sent.clear()
        ask_for_bundles(worker, worker.job("toy"))
        assert bool(sent(worker)) == died
        bundle.write(worker, "toy", version)
        copy = copied(worker, version, folder / "bundle")
        assert check(copy, {}).problems == ()
        assert set(parse_sums((copy / SUMS).read_bytes())) == set(BUNDLE_FILES)
        ask_for_bundles(worker, worker.job("toy"))
        assert bool(sent(worker)) == died
        worker.broker.close()
        if not died:
            break
        steps += 1
    assert steps == 6  # decision, ONNX, card, its text, consents, sums


def test_a_worker_whose_export_fails_goes_by_the_card_that_is_there(
    worker: Worker, site_keys: dict[str, SigningKey], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = trained(worker)
    propose(worker, version)
    for site, key in site_keys.items():
        ask(worker, site, signed(consent(worker, version), key))

    def two_at_once(*_: Any) -> tuple[bytes | None, str]:
        monkeypatch.setattr(bundle, "_export", lambda *_: (b"onnx", ""))
        assert bundle.write(worker, "toy", version)
        return None, "no memory"

    monkeypatch.setattr(bundle, "_export", two_at_once)
    bundle.write(worker, "toy", version)
    copy = copied(worker, version, tmp_path / "bundle")
    assert check(copy, {}).problems == ()
    assert (copy / ONNX).read_bytes() == b"onnx"


def test_a_version_that_is_withdrawn_after_its_approval_is_not_released(
    worker: Worker, site_keys: dict[str, SigningKey]
) -> None:
    from aggregator import transitions
    from federation.types import Cleared, Quarantined

    version = trained(worker)
    propose(worker, version)
    for site, key in site_keys.items():
        assert ask(worker, site, signed(consent(worker, version), key)).ok
    log = worker.log("toy")
    newest = log.head()
    head = transitions.quarantine(newest.head, version, "worse", log.version(version - 1))
    newest = log.append(newest, Quarantined(version=version, reason="worse"), head)
    assert not bundle.write(worker, "toy", version)
    release = load_release(worker.store, "toy", version)
    assert release is not None
    assert release.decision is None
    log.append(newest, Cleared(version=version), transitions.clear(newest.head))
    assert bundle.write(worker, "toy", version)


def test_a_site_answers_a_bounded_number_of_times(worker: Worker, site_keys: dict[str, SigningKey]) -> None:
    version, key, now = trained(worker), site_keys["site-a"], datetime.now(UTC)
    propose(worker, version)

    def again(number: int) -> Answer:
        at = now + timedelta(milliseconds=number)
        return ask(worker, "site-a", signed(consent(worker, version, "refuse", at=at), key))

    assert all(again(number).ok for number in range(MAX_ANSWERS))
    assert "the last answer stays" in again(MAX_ANSWERS).errors[0]


def test_a_majority_suffices_where_the_rule_says_so(
    worker: Worker, site_keys: dict[str, SigningKey], tmp_path: Path
) -> None:
    version = trained(worker, release=ReleaseRule(approvals="majority"))
    propose(worker, version)
    ask(worker, "site-c", signed(consent(worker, version, "refuse", reason="no"), site_keys["site-c"]))
    ask(worker, "site-a", signed(consent(worker, version, site="site-a"), site_keys["site-a"]))
    assert not bundle.write(worker, "toy", version)
    ask(worker, "site-b", signed(consent(worker, version), site_keys["site-b"]))
    assert bundle.write(worker, "toy", version)
    copy = copied(worker, version, tmp_path / "bundle")
    assert check(copy, {}).problems == ()
    text = (copy / "MODEL_CARD.md").read_text()
    assert "more than half of them: 2 of 3 approved" in text
    assert text.count(f"| {ANONYMOUS} |") == 2
    absent = check(copy, {"site-c": fingerprint(site_keys["site-c"].public_key)})
    assert "no approval by the key" in absent.problems[0]


def _rewrite(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file as a forger would who also mends SHA256SUMS."""
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    if name != SUMS:
        digests = parse_sums((folder / SUMS).read_bytes())
        digests[name] = bundle.sha256((folder / name).read_bytes())
        (folder / SUMS).write_bytes(bundle.sums(digests))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "model.safetensors",
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            "name different files model.safetensors",
        ),
        ("card.json", lambda b: b.replace(b"a pilot", b"any use"), "is of something else: purpose"),
        ("card.json", lambda b: b.replace(b'"version":3', b'"version":2'), "is of something else: version"),
        ("consents.json", lambda b: b.replace(b"a pilot", b"any use"), "forged or damaged"),
        (
            "card.json",
            lambda b: b.replace(b'"contributors":3', b'"contributors":2'),
            "do not tell of the same",
        ),
        ("card.json", lambda b: b.replace(b'"site":"site-b"', b'"site":"site-x"'), "has not allowed it"),
        (SUMS, lambda b: b.replace(b"card.json", b"../../../x"), "not that of a release"),
        (SUMS, lambda b: b[:80], "not that of a release"),
        ("consents.json", lambda b: b"{}", "Consents"),
    ],
)
def test_a_bundle_that_was_tampered_with_does_not_verify(
    worker: Worker,
    site_keys: dict[str, SigningKey],
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes],
    words: str,
) -> None:
    version = trained(worker)
    released(worker, site_keys, version)
    folder = copied(worker, version, tmp_path / "bundle")
    before = (folder / name).read_bytes()
    assert change(before) != before
    _rewrite(folder, name, change)
    assert any(words in problem for problem in check(folder, {}).problems), check(folder, {}).problems


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "model.safetensors", "consents.json"])
def test_a_damaged_or_missing_file_does_not_verify(
    worker: Worker, site_keys: dict[str, SigningKey], tmp_path: Path, name: str
) -> None:
    version = trained(worker)
    released(worker, site_keys, version)
    folder = copied(worker, version, tmp_path / "bundle")
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert any(name in problem for problem in check(folder, {}).problems)
    (folder / name).unlink()
    assert check(folder, {}).problems


def test_a_key_that_an_operator_exchanged_shows_by_its_fingerprint(
    worker: Worker, site_keys: dict[str, SigningKey], tmp_path: Path
) -> None:
    """The forger controls the store: it signs for site-b itself. All fits, but the fingerprint."""
    version = trained(worker)
    released(worker, site_keys, version)
    folder = copied(worker, version, tmp_path / "bundle")
    forger = SigningKey.new()

    def forge(data: bytes) -> bytes:
        consents = Consents.from_json(data)
        approvals = [
            SignedConsent(signed=a.signed, public_key=forger.public_key, signature=forger.sign(a.signed))
            if a.consent().site == "site-b"
            else a
            for a in consents.approvals
        ]
        return consents.model_copy(update={"approvals": tuple(approvals)}).to_json()

    _rewrite(folder, "consents.json", forge)
    assert check(folder, {}).problems == ()
    told = fingerprint(site_keys["site-b"].public_key)
    result = CliRunner().invoke(app, ["release", "verify", str(folder), "--key", f"site-b={told}"])
    assert result.exit_code == 1
    assert "is said to have signed with the key" in result.output
    bad = CliRunner().invoke(app, ["release", "verify", str(folder), "--key", "site-b=1234"])
    assert bad.exit_code == 1
    assert "SITE=FINGERPRINT" in bad.output


def test_one_key_counts_once(worker: Worker, site_keys: dict[str, SigningKey], tmp_path: Path) -> None:
    version = trained(worker)
    released(worker, site_keys, version)
    folder = copied(worker, version, tmp_path / "bundle")

    def repeat(data: bytes) -> bytes:
        consents = Consents.from_json(data)
        return consents.model_copy(update={"approvals": (consents.approvals[0],) * 3}).to_json()

    _rewrite(folder, "consents.json", repeat)
    problems = check(folder, {}).problems
    assert any("more than once" in problem for problem in problems)
    assert any("1 of 3 contributors approved" in problem for problem in problems)


def test_answers_and_the_decision_have_one_order(worker: Worker, site_keys: dict[str, SigningKey]) -> None:
    """Of an answer and the decision that both saw the same records, one is too late and decides again."""
    version = trained(worker)
    propose(worker, version)
    release = load_release(worker.store, "toy", version)
    assert release is not None
    what = signed(consent(worker, version), site_keys["site-a"])
    proof = SignedConsent(signed=what.signed, public_key=what.public_key, signature=what.signature)
    assert append_record(worker.store, release, Decision(at=START))
    assert not append_record(
        worker.store, release, SiteAnswer(site="site-a", consent=proof, received_at=START)
    )


# --- commands ------------------------------------------------------------------------------------------------


def test_the_commands_that_only_read(site_keys: dict[str, SigningKey], tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    worker = Worker(store, tmp_path)  # type: ignore[arg-type]
    version = trained(worker)
    propose(worker, version)
    at = ["--store-url", f"file:{tmp_path / 'store'}"]
    environment = {"COLUMNS": "200"}

    def run(*words: str, site: str | None = None) -> str:
        result = CliRunner().invoke(
            app, ["release", *words, *at, *(["--site", site] if site else [])], env=environment
        )
        return f"{result.exit_code} {result.output}"

    assert "a pilot" in run("list", site="site-a")
    assert "nothing waits" in run("list", site="site-x")
    no = signed(consent(worker, version, "refuse", reason="pilots only"), site_keys["site-a"])
    assert ask(worker, "site-a", no).ok
    assert "nothing waits" in run("list", site="site-a")
    assert "refuse" in run("list", "--all", site="site-a")
    assert "refused" in run("list")
    assert "pilots only" in run("show", "toy", "latest")
    assert "is not released" in run("fetch", "toy", str(version), "--out", str(tmp_path / "out"))
    assert "nobody has proposed" in run("show", "toy", "1")
    for site, key in site_keys.items():
        assert ask(worker, site, signed(consent(worker, version), key)).ok
    assert "evaluation worker" in run("show", "toy", str(version))
    assert bundle.write(worker, "toy", version)
    shown = run("show", "toy", str(version))
    assert f"version {version}: released" in shown
    assert "before: site-a refused" in shown
    assert "nothing waits" in run("list")
    fetched = run("fetch", "toy", str(version), "--out", str(tmp_path / "out"))
    assert fetched.startswith("0"), fetched
    assert "no ONNX file" in fetched
    assert "for the purpose: a pilot" in fetched
    assert "not an empty folder" in run("fetch", "toy", str(version), "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "card.json").read_text())["version"] == version
    worker.broker.close()


def test_a_site_shows_its_key(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["site", "key", "--state", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    again = CliRunner().invoke(app, ["site", "key", "--state", str(tmp_path)], env={"COLUMNS": "200"})
    assert again.output == result.output
    assert "PRIVATE" not in result.output


def test_an_operator_is_told_that_a_site_answers(tmp_path: Path) -> None:
    command = ["release", "approve", "toy", "3", "--store-url", f"file:{tmp_path}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "only a site answers" in result.output


def test_what_others_wrote_is_shown_as_text(site_keys: dict[str, SigningKey], tmp_path: Path) -> None:
    worker = Worker(FolderStore(tmp_path / "store"), tmp_path)  # type: ignore[arg-type]
    version = trained(worker)
    propose(worker, version, "[/x] \x1b[2J[red]for all")
    lines = "contract\nsite-b approved at 2026-03-01 12:00 UTC"
    refused = signed(consent(worker, version, "refuse", reason=lines), site_keys["site-a"])
    assert ask(worker, "site-a", refused).ok
    at = ["--store-url", f"file:{tmp_path / 'store'}"]
    for words in (["list"], ["show", "toy", str(version)]):
        shown = CliRunner().invoke(app, ["release", *words, *at], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        assert "[/x] \N{REPLACEMENT CHARACTER}[2J[red]for all" in shown.output
        assert "\x1b" not in shown.output
        assert "\nsite-b approved" not in shown.output
    worker.broker.close()


def test_a_purpose_is_never_cut(tmp_path: Path) -> None:
    command = ["release", "propose", "toy", "3", "--purpose", "x" * 201, "--store-url", f"file:{tmp_path}"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "201 characters, at most 200" in result.output
