"""`fedqueue predict` as it is typed: pictures, COCO results, bad files, and a store that goes away."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import pickle
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from cli.main import app
from detection.evaluate import Found
from detection.frames import Frame, read_video
from detection.predict import Detector, predict
from detection.results import ResultsFile
from detection.weights import Arrays, initial_state
from federation.jobs import Job, JobSpec, TrainingPlan
from federation.types import Head, ModelVersion, Published
from storage.folder import FolderStore
from storage.jobs import save_job
from storage.log import VersionLog
from storage.models import save_model
from storage.tensors import from_arrays

CLASSES = ("cart", "chair", "table")
SPEC = JobSpec(id="test", classes=CLASSES, plan=TrainingPlan(image_size=64))


@pytest.fixture(scope="module")
def weights() -> Arrays:
    """Of a model that sees chairs everywhere."""
    arrays = initial_state(SPEC)
    arrays["head.classification_head.cls_logits.bias"][1:3] = [-9, 4]
    arrays["head.regression_head.bbox_ctrness.bias"][:] = 4.0
    return arrays


class Place:
    """A working directory with a store, a job at version 3, and images."""

    def __init__(self, folder: Path, weights: Arrays) -> None:
        self.folder, self.store = folder, folder / "store"
        store = FolderStore(self.store)
        initial = save_model(store, "test", from_arrays(initial_state(SPEC)))
        model = save_model(store, "test", from_arrays(weights))
        save_job(
            store, Job(spec=SPEC, initial=initial, max_update_bytes=1 << 24, created_at=datetime.now(UTC))
        )
        log = VersionLog(store, "test")
        first = log.create(Head(current=ModelVersion(version=0, model=initial)))
        log.append(first, Published(merged=()), Head(current=ModelVersion(version=3, model=model)))
        for name in ("a/1.jpg", "a/2.png", "b/1.jpg"):
            self.image(name)

    def image(self, name: str) -> Path:
        path = self.folder / "frames" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 255, (90, 120, 3), np.uint8)
        Image.fromarray(noise).save(path)
        return path

    def predict(self, *arguments: str, ok: bool = True) -> Result:
        fixed = ["--job", "test", "--store-url", f"file:{self.store}", "--score", "0.5"]
        result = CliRunner().invoke(app, ["predict", *arguments, *fixed], env={"COLUMNS": "300"})
        assert result.exit_code == (0 if ok else 1), result.output
        return result

    def results(self) -> dict[str, Any]:
        document = json.loads((self.folder / "predictions" / "predictions.json").read_text())
        assert isinstance(document, dict)
        return document

    @property
    def written(self) -> list[str]:
        out = self.folder / "predictions"
        return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path: Path, weights: Arrays, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, weights)


def test_images_of_the_same_name_each_get_their_picture_and_their_results(
    place: Place, weights: Arrays
) -> None:
    result = place.predict("frames")
    assert place.written == ["a/1.jpg", "a/2.png.jpg", "b/1.jpg", "predictions.json"]
    assert "test, version 3, the latest, sha256" in result.output
    assert "in 3 images" in result.output
    assert "images/s" in result.output
    document = place.results()
    assert [(i["id"], i["file_name"], i["picture"]) for i in document["images"]] == [
        (1, "a/1.jpg", "a/1.jpg"),
        (2, "a/2.png", "a/2.png.jpg"),
        (3, "b/1.jpg", "b/1.jpg"),
    ]
    assert all((i["width"], i["height"]) == (120, 90) for i in document["images"])
    assert document["categories"] == [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    info = document["info"]
    assert (info["job"], info["version"], info["complete"], info["offline"]) == ("test", 3, True, False)
    assert len(info["sha256"]) == 64
    # the same as the library says, in COCO's form
    found = predict(SPEC, weights, [place.folder / "frames" / "a" / "1.jpg"], 0.5)[0]
    mine = [row for row in document["results"] if row["image_id"] == 1]
    assert len(mine) == len(found.scores) == document["images"][0]["objects"] > 0
    for row, box, score in zip(mine, found.boxes.tolist(), found.scores.tolist(), strict=True):
        assert row["category_id"] == 2
        assert row["category"] == "chair"
        assert row["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]], abs=0.5)
        assert row["score"] == pytest.approx(score, abs=0.01)
    with Image.open(place.folder / "predictions" / "a" / "1.jpg") as picture:
        assert picture.size == (720, 540), "small frames are enlarged, to be legible"


def test_pycocotools_loads_the_results(place: Place) -> None:
    place.predict("frames", "--no-draw")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(place.folder / "predictions" / "predictions.json")
        loaded = truth.loadRes(truth.dataset["results"])
    assert sorted(loaded.getImgIds()) == [1, 2, 3]
    assert len(loaded.anns) == len(place.results()["results"]) > 0
    assert {a["category_id"] for a in loaded.anns.values()} == {2}
    assert loaded.loadCats(2)[0]["name"] == "chair"


def test_what_cannot_be_read_is_named_and_the_others_are_done(place: Place) -> None:
    (place.folder / "frames" / "a" / "bad[x].jpg").write_text("no image")
    result = place.predict("frames/a", "frames/nope.jpg", ok=False)
    assert "bad[x].jpg: cannot be read as an image" in result.output
    assert "frames/nope.jpg: there is no such image" in result.output
    assert "in 2 images" in result.output
    assert place.written == ["1.jpg", "2.png.jpg", "predictions.json"]
    info = place.results()["info"]
    assert [entry["file_name"] for entry in info["unreadable"]] == ["frames/nope.jpg", "bad[x].jpg"]
    assert info["complete"] is True, "every input was dealt with"


def test_only_the_classes_that_are_asked_for(place: Place) -> None:
    place.predict("frames/a", "--classes", "table, cart", "--no-draw")
    assert place.results()["results"] == []
    place.predict("frames/a", "--classes", "chair", "--no-draw")
    assert len(place.results()["results"]) > 0
    assert "sofa is not among the job's cart, chair, table" in (
        place.predict("frames/a", "--classes", "chair,sofa", ok=False).output
    )


def test_nothing_is_overwritten_that_is_read(place: Place) -> None:
    before = (place.folder / "frames" / "a" / "1.jpg").read_bytes()
    result = place.predict("frames/a", "--out", "frames/a/../a", ok=False)
    assert "choose another folder" in result.output
    assert (place.folder / "frames" / "a" / "1.jpg").read_bytes() == before
    place.predict("frames", "--out", "frames/out")
    assert "in 3 images" in place.predict("frames", "--out", "frames/out").output, (
        "its own output is no input"
    )


def test_two_inputs_that_would_become_one_picture_are_named(place: Place) -> None:
    image = place.folder / "frames" / "a" / "1.jpg"
    Image.open(image).save(place.folder / "frames" / "x.png")
    (place.folder / "frames" / "x.png.jpg").write_bytes(image.read_bytes())
    said = place.predict("frames", ok=False).output
    assert "x.png and x.png.jpg would both become predictions/x.png.jpg" in said
    assert "objects" in place.predict("frames", "--no-draw").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frames/*.gif"], "no images in frames/*.gif"),
        (["frames", "--version", "7"], "no stored version 7"),
        (["frames", "--version", "best"], "was measured yet"),
        (["frames", "--device", "tpu"], "device"),
        (["frames", "--device", "cuda:99"], "device is cuda:99, but"),
        (["frames", "--font", "frames/a/1.jpg"], "is no font"),
    ],
)
def test_mistakes_are_said(place: Place, arguments: list[str], message: str) -> None:
    assert message in place.predict(*arguments, ok=False).output


def test_a_version_is_a_word_or_a_number(place: Place) -> None:
    result = CliRunner().invoke(app, ["predict", "x.jpg", "--job", "test", "--version", "newest"])
    assert result.exit_code == 2
    assert "newest" in result.output


# --- without the store -----------------------------------------------------------------------------------------


def test_what_was_pulled_once_works_without_the_store_and_says_so(place: Place) -> None:
    place.predict("frames", "--no-draw")
    online = place.results()
    place.store.rename(place.folder / "elsewhere")
    result = place.predict("frames", "--no-draw")
    (line,) = [line for line in result.output.splitlines() if "version 3" in line]
    assert "the latest" in line
    assert "from the cache, as the store said on" in line
    assert "cannot be reached" in line
    assert not place.store.exists(), "looking for a store makes none"
    offline = place.results()
    assert offline["results"] == online["results"]
    assert offline["info"]["offline"] is True
    assert "best was not pulled before, only latest (3)" in (
        place.predict("frames", "--version", "best", ok=False).output
    )


def test_offline_asks_nobody(place: Place) -> None:
    assert "nothing to use without it" in place.predict("frames", "--offline", ok=False).output
    place.predict("frames", "--no-draw")
    assert "not asked (--offline)" in place.predict("frames", "--no-draw", "--offline").output


class Trap:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_a_tampered_model_is_neither_used_nor_unpickled(place: Place) -> None:
    place.predict("frames/a", "--no-draw")
    good = place.results()["results"]
    models = list((place.folder / ".fedqueue" / "predict").rglob("*.safetensors"))
    assert len(models) == 2, "the version, and the initial model that completes it"
    for model in models:
        size = model.stat().st_size
        model.write_bytes(pickle.dumps(Trap()).ljust(size, b"\0"))
    assert "is damaged" in place.predict("frames/a", "--offline", ok=False).output
    place.predict("frames/a", "--no-draw")
    assert place.results()["results"] == good, "downloaded again"
    place.predict("frames/a", "--no-draw", "--offline")
    assert not Path("sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("sprung").exists(), "the trap works"


# --- videos ----------------------------------------------------------------------------------------------------


def test_videos_are_annotated_as_videos(place: Place) -> None:
    path = place.folder / "frames" / "street.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(7):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 30 * i, np.uint8))))
        container.mux(stream.encode())
    place.predict("frames/street.mkv", "frames/a/1.jpg", "--every", "3")
    images = place.results()["images"]
    assert [(i["file_name"], i.get("frame"), i.get("time_s")) for i in images] == [
        ("street.mkv", 0, 0.0),
        ("street.mkv", 3, 0.3),
        ("street.mkv", 6, 0.6),
        ("a/1.jpg", None, None),
    ]
    assert place.written == ["a/1.jpg", "predictions.json", "street.mkv.mp4"]
    frames = list(read_video(place.folder / "predictions" / "street.mkv.mp4"))
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.3, 0.6], abs=0.01)


# --- however many ------------------------------------------------------------------------------------------------


def test_at_most_one_batch_of_pictures_is_held(weights: Arrays) -> None:
    alive: weakref.WeakSet[Frame] = weakref.WeakSet()
    most = 0

    def frames() -> Iterator[Frame]:
        nonlocal most
        for _ in range(40):
            frame = Frame(Path("x.jpg"), Image.new("RGB", (64, 64)), 64, 64)
            alive.add(frame)
            gc.collect(0)
            most = max(most, len(alive))
            yield frame
            del frame

    seen = sum(1 for _ in Detector(SPEC, weights, "cpu").detect(frames(), batch=4, score_threshold=0.99))
    assert seen == 40
    assert most <= 2 * 4, "those of the batch before, until they are replaced"


def test_results_are_written_as_they_come_and_kept_when_interrupted(tmp_path: Path) -> None:
    found = Found(np.array([[1, 2, 4, 8]], np.float32), np.array([2]), np.array([0.5], np.float32))
    path = tmp_path / "predictions.json"
    with contextlib.suppress(KeyboardInterrupt), ResultsFile(path, CLASSES, {"job": "test"}) as results:
        for i in range(2000):
            results.add(f"{i}.jpg", 10, 10, found)
        assert (tmp_path / "predictions.json.part").stat().st_size > 50_000, "not kept in memory"
        assert not path.exists()
        raise KeyboardInterrupt
    document = json.loads(path.read_text())
    assert document["info"] == {"job": "test", "complete": False, "unreadable": []}
    assert len(document["images"]) == len(document["results"]) == 2000
    assert document["results"][-1] == {
        "image_id": 2000,
        "category_id": 2,
        "category": "chair",
        "bbox": [1.0, 2.0, 3.0, 6.0],
        "score": 0.5,
    }
    assert list(tmp_path.iterdir()) == [path]
