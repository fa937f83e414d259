"""The bundle of a real detector: the ONNX file is in it, and the file that was consented to has all its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from cli.release_check import check
from detection.registry import DEFAULT_ARCH
from federation.governance import Card
from federation.jobs import TrainingPlan
from federation.signatures import SigningKey
from storage.memory import MemoryStore
from storage.models import save_model
from storage.releases import ONNX, load_release
from storage.tensors import encode, from_arrays
from tasks import bundle
from tasks.accept import accept
from tasks.jobs import create
from tasks.publish import publish_pending
from tests.factories import client_update, job_spec
from tests.unit.test_detection_export import CLASSES, SIDE, lively, spec
from tests.unit.test_release import ask, consent, copied, propose, signed
from tests.unit.test_tasks import Worker


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(MemoryStore(), tmp_path)
    yield made
    made.broker.close()


def test_the_default_detector_is_released_with_its_onnx_file(worker: Worker, tmp_path: Path) -> None:
    plan = TrainingPlan(image_size=SIDE, norm="frozen")
    job = job_spec(arch=DEFAULT_ARCH, classes=CLASSES, plan=plan)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = lively(spec())
    exchanged = {
        name: array for name, array in weights.items() if "running_" not in name and "num_batches" not in name
    }
    initial = save_model(worker.store, job.id, from_arrays(weights))
    first = save_model(worker.store, job.id, from_arrays(exchanged))
    create(worker, job, initial, first)
    payload = bytes(encode(from_arrays(exchanged)))
    update = client_update(payload)
    worker.store.put_if_absent(update.payload_key, payload)
    accept(worker, update)
    publish_pending(worker, worker.job(job.id))

    assert propose(worker, 1).ok
    release = load_release(worker.store, job.id, 1)
    assert release is not None
    assert release.proposal.file_sha256 == initial.sha256 != release.proposal.model_sha256
    key = SigningKey.new()
    assert ask(worker, "site-a", signed(consent(worker, 1, site="site-a"), key)).ok
    assert bundle.write(worker, job.id, 1)
    folder = copied(worker, 1, tmp_path / "bundle")
    assert check(folder, {}).problems == ()
    card = Card.from_json((folder / "card.json").read_bytes())
    assert card.onnx_sha256 is not None
    assert card.onnx_sha256 in (folder / "MODEL_CARD.md").read_text()
    about = {
        prop.key: prop.value for prop in onnx.load_from_string((folder / ONNX).read_bytes()).metadata_props
    }
    assert (about["job"], about["version"], about["sha256"]) == (job.id, "1", card.model_sha256)
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["boxes", "labels", "scores"]
