"""`fedqueue data …` as a site engineer meets it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from detection.check import check
from federation.jobs import Job, JobSpec, ModelRef
from federation.settings import Settings
from storage.jobs import save_job
from storage.open import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images, two of each camera; chairs everywhere, one table."""
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "chair"}, {"id": 3, "name": "table"}],
    }
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (100, 80), (30 * i, 60, 90)).save(tmp_path / f"images/{i}.png")
        coco["images"].append(
            {"id": i, "file_name": f"{i}.png", "width": 100, "height": 80, "device": i // 2}
        )
        coco["annotations"].append(
            {"id": i, "image_id": i, "category_id": 3 if i == 4 else 7, "bbox": [10, 10, 20, 30.5]}
        )
    (tmp_path / "site.json").write_text(json.dumps(coco))
    return tmp_path


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_check_of_good_data(folder: Path) -> None:
    code, output = run("check", folder, "--classes", "chair, table", "--sheet", folder / "out/sheet.png")
    assert code == 0, output
    for text in ("coco", "6 images", "6 boxes", "chair", "100 x 80", "small 100%", "field device: 3 values"):
        assert text in output
    assert "no defects" in output
    with Image.open(folder / "out/sheet.png") as sheet:
        assert sheet.width > 1000


def test_check_of_bad_data_names_everything_and_fails(folder: Path) -> None:
    (folder / "images/2.png").unlink()
    code, output = run("check", folder, "--classes", "chair,lamp")
    assert code == 1
    assert "missing image" in output
    assert "2.png: there is no such file" in output
    assert "class 'table' is not one of the job's" in output
    assert "no boxes of lamp" in output
    assert "2 defects: missing image 1, unknown class 1" in " ".join(output.split())


def test_check_against_the_classes_of_a_job(folder: Path) -> None:
    spec = JobSpec(id="street", classes=("chair", "Table", "lamp"))
    ref = ModelRef(key="jobs/street/models/x", sha256="0" * 64, nbytes=1)
    job = Job(spec=spec, initial=ref, max_update_bytes=1, created_at=datetime.now(UTC))
    save_job(open_store(Settings(store_url=f"file:{folder}/store")), job)
    code, output = run("check", folder, "--job", "street", env={"FEDQUEUE_STORE_URL": f"file:{folder}/store"})
    assert code == 1
    assert "annotation 4 (4.png): class 'table' is not one of the job's (is 'Table' meant?)" in output
    assert "no boxes of Table, lamp" in output


def test_check_with_every_image_bad_draws_no_sheet(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.write_text("no image")
    code, output = run("check", folder, "--sheet", folder / "sheet.png")
    assert code == 1
    assert "no image can be drawn" in output
    assert not (folder / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "a,,b"], "different names"),
        (["--classes", "a,a"], "different names"),
        (["--classes", "a", "--job", "b"], "not both"),
        (["--sheet", "sheet.pdf"], "must end in one of"),
        (["--job", "nowhere", "--store-url", "file:{}/store"], "nowhere"),
        (["--images", "{}/nowhere"], "is not a folder"),
        (["--format", "voc"], "holds no XML files"),
    ],
)
def test_check_with_wrong_flags(folder: Path, arguments: list[str], message: str) -> None:
    code, output = run("check", folder, *(argument.format(folder) for argument in arguments))
    assert code == 1
    assert message in output


def test_a_bracket_in_a_name_is_printed_as_it_is(folder: Path) -> None:
    text = (folder / "site.json").read_text().replace('"table"', '"[bold]table"')
    (folder / "site.json").write_text(text)
    assert "[bold]table" in run("check", folder)[1]


def test_split_by_device(folder: Path) -> None:
    code, output = run("split", folder, "--sites", "3", "--by", "device", "--out", folder / "sites")
    assert code == 0, output
    assert "table" in output
    parts = [check(folder / f"sites/site-{i}.json", folder / "images").require().pictures for i in (1, 2, 3)]
    assert [[picture.name for picture in part] for part in parts] == [
        ["0.png", "1.png"],
        ["2.png", "3.png"],
        ["4.png", "5.png"],
    ]
    assert [box.name for box in parts[2][0].boxes] == ["table"]
    assert parts[2][0].boxes[0].corners == (10, 10, 30, 40.5)
    # every site knows every class, by name
    assert check(folder / "sites/site-1.json", folder / "images").classes == ("chair", "table")
    again, output = run("split", folder, "--sites", "3", "--by", "device", "--out", folder / "sites")
    assert again == 1
    assert "is there already" in output


@pytest.mark.parametrize("by", ["iid", "dirichlet", "label-skew"])
def test_split_at_random_follows_the_seed(folder: Path, by: str) -> None:
    for name, seed in (("a", 1), ("b", 1)):
        flags = ["--sites", "2", "--by", by, "--seed", str(seed), "--out", str(folder / name)]
        assert run("split", folder / "site.json", *flags)[0] == 0
    files = [[(folder / name / f"site-{i}.json").read_text() for i in (1, 2)] for name in ("a", "b")]
    assert files[0] == files[1]
    names = [entry["file_name"] for text in files[0] for entry in json.loads(text)["images"]]
    assert sorted(names) == [f"{i}.png" for i in range(6)]


def test_split_that_cannot_be(folder: Path) -> None:
    code, output = run("split", folder, "--sites", "7", "--out", folder / "sites")
    assert code == 1
    assert "6 images are too few for 7 sites" in output
    assert not (folder / "sites").exists()


@pytest.mark.parametrize("to", ["coco", "voc", "yolo", "street"])
def test_convert_and_back(folder: Path, to: str) -> None:
    code, output = run("convert", folder, "--to", to, "--out", folder / "there", "--copy-images")
    assert code == 0, output
    assert "6 images, 6 boxes" in output
    code, output = run("convert", folder / "there", "--to", "coco", "--out", folder / "back", "--copy-images")
    assert code == 0, output
    before, after = check(folder / "site.json"), check(folder / "back").require()
    assert [picture.name for picture in after.pictures] == [picture.name for picture in before.pictures]
    for one, other in zip(before.pictures, after.pictures, strict=True):
        assert [box.name for box in one.boxes] == [box.name for box in other.boxes]
        assert other.boxes[0].corners == pytest.approx(one.boxes[0].corners, abs=1e-3)
    assert [file.sha256 for file in after.files] == [file.sha256 for file in before.files]


def test_convert_refuses_bad_data_and_full_folders(folder: Path) -> None:
    assert run("convert", folder, "--to", "voc", "--out", folder / "a")[0] == 0
    code, output = run("convert", folder, "--to", "voc", "--out", folder / "a")
    assert code == 1
    assert "is there already" in output
    (folder / "images/1.png").write_text("no image")
    code, output = run("convert", folder, "--to", "voc", "--out", folder / "b")
    assert code == 1
    assert "cannot be read as an image" in output
    assert not (folder / "b").exists()


def test_folders_may_have_brackets_in_their_names(folder: Path) -> None:
    night = folder.rename(folder.parent / "[night] [b]")
    for arguments in (
        ("check", night / "site.json", "--sheet", night / "sheet.png"),
        ("split", night / "site.json", "--sites", "2", "--out", night),
        ("convert", night / "site.json", "--to", "voc", "--out", night / "voc"),
    ):
        code, output = run(*arguments)
        assert code == 0, output
        assert "[night] [b]" in output.replace("\n", "")


def test_a_folder_that_cannot_be_written_is_said(folder: Path) -> None:
    (folder / "file").write_text("no folder")
    for arguments in (("split", "--sites", "2"), ("convert", "--to", "coco"), ("convert", "--to", "yolo")):
        code, output = run(arguments[0], folder / "site.json", *arguments[1:], "--out", folder / "file/new")
        assert code == 1
        assert "cannot be written" in output
