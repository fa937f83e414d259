"""What `fedqueue model list`, `show` and `diff` say of versions; tensors' changes by layer."""

from __future__ import annotations

from math import inf, sqrt
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aggregator.change import STATISTICS, by_group, changes
from cli.main import app
from federation.ids import new_update_id
from federation.jobs import EvaluationPolicy
from federation.requests import Request, SteerModel
from federation.types import SERVER, Evaluation
from storage.folder import FolderStore
from storage.memory import MemoryStore
from storage.models import load_model, save_model
from storage.tensors import decode, from_arrays
from tasks.accept import accept
from tasks.jobs import create
from tasks.publish import publish_pending
from tasks.report import record
from tasks.requests import handle
from tests.factories import client_update, job_spec, payload_of, toy_arrays
from tests.unit.audit_cases import NOW, worker

# --- how far two models are apart ------------------------------------------------------------------------------


def test_the_relative_change_of_a_tensor() -> None:
    before = {"a.weight": np.array([3.0, 4.0], np.float32), "a.bias": np.zeros(2, np.float32)}
    after = {"a.weight": np.array([3.0, 5.0], np.float32), "a.bias": np.array([0.0, 2.0], np.float32)}
    weight, bias = changes(before, after)
    assert (weight.name, weight.count, weight.relative) == ("a.weight", 2, 0.2)
    assert bias.relative == inf
    (group,) = by_group([weight, bias], depth=1)
    assert (group.name, group.count) == ("a", 4)
    assert group.relative == pytest.approx(sqrt(5) / 5)
    assert [change.relative for change in changes(before, before)] == [0.0, 0.0]


def test_groups_are_layers_and_statistics_are_one_of_their_own() -> None:
    names = ["backbone.body.conv1.weight", "backbone.body.bn.running_mean", "backbone.fpn.weight", "scale"]
    ones = {name: np.ones(1, np.float32) for name in names} | {"bn.num_batches_tracked": np.array(1)}
    groups = by_group(changes(ones, ones), depth=2)
    assert [group.name for group in groups] == ["backbone.body", STATISTICS, "backbone.fpn", "scale"]
    assert by_group(changes(ones, ones), 3)[0].name == "backbone.body.conv1"


def test_other_tensors_are_no_change() -> None:
    with pytest.raises(ValueError, match="same tensors"):
        changes({"a": np.ones(2)}, {"a": np.ones(3)})
    with pytest.raises(ValueError, match="same tensors"):
        changes({"a": np.ones(2)}, {"b": np.ones(2)})


# --- the commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Versions 0 to 4, of which 3 failed and was rolled back to 2, as version 5, and 6 from there."""
    store = MemoryStore()
    context = worker(store)
    policy = EvaluationPolicy(sites_every=1, max_drop=0.1)
    ref = save_model(store, "toy", from_arrays(toy_arrays()))
    job = create(context, job_spec(classes=("cart",), evaluation=policy), ref, ref)

    def publish(base: int, site: str) -> None:
        payload = payload_of(toy_arrays(float(base + 1)))
        update = client_update(payload, base_version=base, site=site)
        store.put(update.payload_key, payload)
        accept(context, update)
        publish_pending(context, job)

    def ask(action: str, version: int) -> None:
        what = SteerModel.model_validate(
            {"job": "toy", "action": action, "version": version, "reason": "rain"}
        )
        answer = handle(context, Request(request_id=new_update_id(), who=SERVER, what=what, at=NOW))
        assert answer.ok, answer.errors

    def report(version: int, value: float) -> None:
        values = {"mAP@0.5": value}
        measured = Evaluation(
            job="toy",
            version=version,
            who="site-a",
            num_images=10,
            metrics=values,
            per_class={"mAP@0.5": {"cart": value / 2}},
            at=NOW,
        )
        record(context, measured)

    for base, site in enumerate(("site-a", "site-b", "site-b", "site-a")):
        publish(base, site)
    report(2, 0.8)
    ask("promote", 2)
    report(3, 0.3)
    ask("rollback", 2)
    publish(5, "site-b")
    report(6, 0.85)
    folder = tmp_path_factory.mktemp("store")
    copied = FolderStore(folder)
    for key in store.list(""):
        copied.put(key, store.get(key, max_bytes=1 << 20))
    return f"file:{folder}"


def run(url: str, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["model", *arguments, "--store-url", url])
    assert result.exit_code == status, result.output
    return result.output


def test_the_list_marks_what_every_version_is(url: str) -> None:
    lines = run(url, "list", "toy").splitlines()
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0].isdigit()}
    assert list(rows) == ["0", "1", "2", "3", "4", "5", "6"]
    assert "stable" in rows["2"]
    assert "rolled back" in rows["3"]
    assert "rolled back" in rows["4"]
    assert "= version 2" in rows["5"]
    assert "best, latest" in rows["6"]
    assert "best" not in "".join(line for number, line in rows.items() if number != "6")


def test_show_tells_all_of_a_version(url: str) -> None:
    shown = run(url, "show", "toy")
    assert "version 6  (best, latest)" in shown
    assert "from      version 5; updates merged: 1" in shown
    assert "site-b" in shown
    assert "0.850" in shown
    assert "lineage: versions 0 to 2, 5 to 6; 3 updates are in it" in shown
    assert "66.7%" in shown
    again = run(url, "show", "toy", "5")
    assert "from      version 2, by a rollback of server: rain" in again
    assert "the same  model is that of version 2" in again
    failed = run(url, "show", "toy", "3")
    assert "(rolled back)" in failed
    assert "failed" in failed
    assert "0.5 lower than at version 2" in failed
    assert "abandoned" in failed
    assert "promoted" in run(url, "show", "toy", "stable")


def test_diff_shows_figures_contributors_and_tensors(url: str) -> None:
    shown = run(url, "diff", "toy", "2", "6")
    assert "+0.050" in shown
    assert "mAP@0.5 of cart" in shown
    assert "+0.025" in shown
    assert "in version 6 alone: 1 updates" in shown
    assert "both come from" not in shown
    store = FolderStore(Path(url.removeprefix("file:")))
    assert "the tensors are the same" in run(url, "diff", "toy", "2", "5")
    apart = run(url, "diff", "toy", "4", "latest")
    assert "both come from version 2" in apart
    assert "in version 4 alone: 2 updates" in apart
    assert "running statistics" in apart
    assert list(store.list("jobs/toy/models/"))


def test_a_channel_can_be_pulled(url: str, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert "version 2" in run(url, "pull", "toy", "--version", "stable", "--out", str(out))
    pulled = decode(out.read_bytes()).arrays()
    assert float(pulled["conv.weight"].flat[0]) == 1.25  # (0 -> 0.5 -> 1.25) by halves
    assert "version 6" in run(url, "pull", "toy", "--out", str(out))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "toy", "newest"), "a version is latest, best, stable or a number"),
        (("show", "toy", "9"), "no stored version 9"),
        (("diff", "toy", "2", "9"), "fedqueue model list toy"),
        (("pull", "toy", "--version", "9"), "no stored version 9"),
    ],
)
def test_what_is_no_version_is_said(url: str, arguments: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(url, *arguments, status=1).split())


def test_the_list_says_what_to_do_in_quarantine(url: str, tmp_path: Path) -> None:
    store, copied = FolderStore(Path(url.removeprefix("file:"))), FolderStore(tmp_path)
    for key in store.list(""):
        copied.put(key, store.get(key, max_bytes=1 << 20))
    context = worker(copied)
    payload = payload_of(toy_arrays(9.0))
    update = client_update(payload, base_version=6)
    copied.put(update.payload_key, payload)
    accept(context, update)
    publish_pending(context, context.job("toy"))
    report = Evaluation(job="toy", version=7, who="site-a", num_images=10, metrics={"mAP@0.5": 0.1}, at=NOW)
    record(context, report)
    shown = run(f"file:{tmp_path}", "list", "toy")
    assert "version 7 is in quarantine, version 6 is offered instead" in shown
    assert "fedqueue model clear toy 7" in shown
    assert load_model(copied, context.log("toy").head().head.offered.model)
