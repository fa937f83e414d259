"""Architectures by name, and where their first weights come from."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, get_model
from typer.testing import CliRunner

from cli.initial import first_weights
from cli.main import app
from detection.convention import check
from detection.families import DEFAULT_ARCH, FAMILIES
from detection.initial import Match, download, fill, read_state_dict, torchvision_weights
from detection.registry import ARCHS, build, known
from detection.speed import measure
from detection.square import SquareTransform
from detection.weights import initial_state, initial_weights
from federation import plugins
from federation.errors import BadJob, BadSettings, Transient
from federation.jobs import EvaluationPolicy, JobSpec, TrainingPlan
from federation.settings import Settings
from storage.tensors import encode, from_arrays

KERNEL = "backbone.body.conv1.0.weight"  # [24, 3, 3, 3]
CLASSIFIERS = {
    "ShuffleNet_V2_X0_5_Weights": "shufflenet_v2_x0_5",
    "MobileNet_V3_Large_Weights": "mobilenet_v3_large",
    "VGG16_Weights": "vgg16",
    "ResNet50_Weights": "resnet50",
}


def spec(arch: str = DEFAULT_ARCH, classes: tuple[str, ...] = ("red", "blue"), **more: Any) -> JobSpec:
    return JobSpec(id="test", classes=classes, arch=arch, plan=TrainingPlan(image_size=64), **more)


# --- names ---------------------------------------------------------------------------------------------


def test_the_families_are_there_and_none_of_them_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("nothing is downloaded that was not named")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", forbidden)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", forbidden)
    assert {name.split("_")[0] for name in ARCHS} == {
        "fcos",
        "ssdlite320",
        "ssd300",
        "retinanet",
        "fasterrcnn",
    }
    for arch in ARCHS:
        assert known(arch)
        with torch.device("meta"):
            module = build(arch, 3, 320)
        kinds = {type(layer).__name__ for layer in module.modules()}
        assert "FrozenBatchNorm2d" not in kinds, "the job's norm policy decides"
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert isinstance(module.transform, SquareTransform)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    assert not known("yolo")
    with pytest.raises(BadJob, match=DEFAULT_ARCH):
        build("yolo", 2, 64)


def test_ssd300_works_at_its_smallest_size_and_says_so_below() -> None:
    size = FAMILIES["ssd300_vgg16"].min_image_size
    with torch.device("meta"):
        maps = build("ssd300_vgg16", 2, size).backbone(torch.empty(1, 3, size, size))
    assert [m.shape[-1] for m in maps.values()][-2:] == [3, 1]
    with pytest.raises(BadJob, match=f"at least {size}"):
        build("ssd300_vgg16", 2, size - 1)


# --- pretrained weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_classifiers_trunk_fills_the_backbone(arch: str) -> None:
    """The classifier that torchvision cuts the backbone from, in an initial state of its own."""
    family = FAMILIES[arch]
    with torch.device("meta"):
        detector = build(arch, 2, 320).state_dict()
        classifier = get_model(CLASSIFIERS[family.backbone_weights.__name__], weights=None).state_dict()
    found = {
        name: family.from_classifier(name)
        for name, tensor in classifier.items()
        if (own := detector.get(family.from_classifier(name))) is not None and own.shape == tensor.shape
    }
    assert len(set(found.values())) == len(found)
    lost = {name.split(".")[0] for name in classifier.keys() - found.keys()}
    if arch == "ssdlite320_mobilenet_v3_large":
        lost.remove("features")  # torchvision's SSDlite halves the last three blocks' channels
        assert len(found) > 0.75 * len(classifier)
    assert lost <= {"classifier", "fc", "conv5"}


def test_a_backbone_is_loaded_by_name_and_shape(tmp_path: Path) -> None:
    kernel = torch.full((24, 3, 3, 3), 0.25)
    file = tmp_path / "backbone.pth"
    torch.save({"conv1.0.weight": kernel, "conv1.1.weight": torch.ones(7), "fc.weight": torch.ones(2)}, file)
    arrays, match = initial_weights(spec(), read_state_dict(file))
    assert match is not None
    assert match.loaded == (KERNEL,)
    assert match.used == ("conv1.0.weight",)
    assert match.unused == ("conv1.1.weight", "fc.weight")
    assert match.other_shape == ("conv1.1.weight",)
    assert "backbone.body.conv1.1.weight" in match.missing
    assert (arrays[KERNEL] == 0.25).all()
    random = initial_state(spec())
    assert all(np.array_equal(random[name], arrays[name]) for name in random if name != KERNEL)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.body.", "body."])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_names_and_wrappings_that_are_common(tmp_path: Path, prefix: str, wrap: str | None) -> None:
    state: dict[str, Any] = {f"{prefix}conv1.0.weight": torch.full((24, 3, 3, 3), 0.5)}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "file.pth")
    match = fill(build(DEFAULT_ARCH, 2, 64), read_state_dict(tmp_path / "file.pth"))
    assert match.loaded == (KERNEL,)


def test_a_whole_detector_of_other_classes_leaves_its_class_layer_behind() -> None:
    coco = initial_state(
        spec(classes=tuple(f"class {i}" for i in range(90))).model_copy(update={"id": "coco"})
    )
    coco = {name: array + np.ones((), array.dtype) for name, array in coco.items()}
    arrays, match = initial_weights(spec(), coco)
    assert match is not None
    head = "head.classification_head.cls_logits"
    assert match.missing == match.unused == match.other_shape == (f"{head}.weight", f"{head}.bias")
    assert len(match.loaded) == len(coco) - 2
    assert all(np.array_equal(arrays[name], coco[name]) for name in match.loaded)
    report = match.report()
    assert report[0].startswith(f"{len(coco) - 2} tensors loaded: backbone.* (")
    assert report[1] == f"2 missing, so random: {head}.* (2)"
    assert "other classes" in report[3]


def test_a_report_names_everything_and_shortens_what_has_one_fate() -> None:
    match = Match(("a.b.x", "a.b.y", "a.c"), ("a.d",), ("a.b.x", "a.b.y", "a.c"), ("z.x", "z.y"), ())
    assert match.report() == [
        "3 tensors loaded: a.b.* (2), a.c",
        "1 missing, so random: a.d",
        "2 of the file unused: z.* (2)",
    ]


def test_files_of_torchs_older_format_are_read_too(tmp_path: Path) -> None:
    state = {"conv1.0.weight": torch.ones(24, 3, 3, 3)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "old.pth")["conv1.0.weight"], state["conv1.0.weight"])


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("never", "w"))


def test_bad_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    with pytest.raises(BadJob, match="not a weights file"):
        read_state_dict(file)
    for content in (b"", b"hello", b"PK\3\4 and nothing more", b"\x80\x02}q\x00."):
        file.write_bytes(content)
        with pytest.raises(BadJob, match=r"not a weights file|state dict"):
            read_state_dict(file)
    for old in (True, False):
        torch.save({"a": Hostile()}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(BadJob, match="safely"):
            read_state_dict(file)
    assert not (tmp_path / "never").exists()
    torch.save([1, 2], file)
    with pytest.raises(BadJob, match="state dict"):
        read_state_dict(file)
    torch.save({"nothing": torch.ones(1)}, file)
    with pytest.raises(BadJob, match=r"weights.pth: no tensor fits"):
        first_weights(spec(), str(file))


# --- torchvision's own ---------------------------------------------------------------------------------


def test_names_of_torchvisions_weights() -> None:
    assert torchvision_weights("fcos_resnet50_fpn", "COCO_V1").url.endswith(
        "fcos_resnet50_fpn_coco-99b0c9b7.pth"
    )
    assert torchvision_weights("fcos_resnet50_fpn", "IMAGENET1K_V2") is ResNet50_Weights.IMAGENET1K_V2
    assert (
        torchvision_weights(DEFAULT_ARCH, "ResNet50_Weights.IMAGENET1K_V1") is ResNet50_Weights.IMAGENET1K_V1
    )
    for wrong in ("COCO_V9", "ResNet50_Weights.COCO_V1", "Nothing_Weights.DEFAULT", "os.path"):
        with pytest.raises(BadJob, match=r"no file.*FCOS_ResNet50_FPN_Weights.COCO_V1"):
            torchvision_weights("fcos_resnet50_fpn", wrong)


def test_torchvisions_weights_come_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file as torchvision names it, with the digest in its name, in the folder that TORCH_HOME says."""
    import hashlib

    state = get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "made.pth")
    digest = hashlib.sha256((folder / "made.pth").read_bytes()).hexdigest()[:10]
    (folder / "made.pth").rename(folder / f"shufflenet-{digest}.pth")
    weights = torchvision_weights(DEFAULT_ARCH, "IMAGENET1K_V1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(type(weights), "url", f"https://127.0.0.1:9/shufflenet-{digest}.pth", raising=False)
    first = first_weights(spec(), "IMAGENET1K_V1")
    assert np.array_equal(first.arrays[KERNEL], state["conv1.0.weight"].numpy())
    assert (
        first.report[0].startswith("IMAGENET1K_V1: 274 tensors loaded: backbone.body.* (274)") or first.report
    )
    assert capsys.readouterr() == ("", "")


def test_a_download_that_fails_says_what_to_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_route(url: str, *args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_route)
    weights = torchvision_weights("fcos_resnet50_fpn", "COCO_V1")
    with pytest.raises(Transient, match=r"no route to host.*fetch https://.*fcos_resnet50.*--weights FILE"):
        download(weights)


def test_our_own_safetensors_files(tmp_path: Path) -> None:
    trained = {name: array + np.ones((), array.dtype) for name, array in initial_state(spec()).items()}
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode(from_arrays(trained)))
    first = first_weights(spec(), str(file))
    assert all(np.array_equal(first.arrays[name], trained[name]) for name in trained)
    assert first.exchanged == sorted(trained)
    assert "0 missing" in first.report[1]
    file.write_bytes(b"hello")
    with pytest.raises(BadJob, match=r"model.safetensors"):
        first_weights(spec(), str(file))
    with pytest.raises(BadJob, match="cannot be read"):
        first_weights(spec(), str(tmp_path / "none.safetensors"))


# --- bring your own ------------------------------------------------------------------------------------


class TinyDetector(nn.Module):
    """The smallest thing with torchvision's convention of calling: one box per image."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.side = image_size
        self.norm = nn.BatchNorm2d(3)
        self.classes = nn.Linear(3, num_classes + 1)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        scores = self.classes(self.norm(torch.stack(list(images))).mean((2, 3)))
        if targets is not None:
            return {
                "loss": nn.functional.cross_entropy(scores, torch.stack([t["labels"][0] for t in targets]))
            }
        box = torch.tensor([[0.0, 0.0, self.side, self.side]])
        best = scores.softmax(1)[:, 1:].max(1)
        return [
            {"boxes": box, "labels": label[None] + 1, "scores": score[None]}
            for score, label in zip(best.values, best.indices, strict=True)
        ]


@pytest.fixture
def company() -> Iterator[types.ModuleType]:
    """A module of somebody else's, importable, and nothing allowed before or after."""
    module = types.ModuleType("company_models")
    vars(module).update(
        tiny=TinyDetector, number=3, broken=lambda classes, size: 1 / 0, no_module=lambda c, s: "x"
    )
    sys.modules[module.__name__] = module
    plugins.allow(())
    yield module
    plugins.allow(())
    del sys.modules[module.__name__]


@pytest.mark.usefixtures("company")
def test_an_import_path_is_used_only_if_the_settings_list_it() -> None:
    path = "company_models:tiny"
    assert not known(path)
    with pytest.raises(BadJob, match="settings do not list"):
        build(path, 2, 64)
    plugins.allow([path])
    assert known(path)
    module = build(path, 2, 64, seed=3)
    assert isinstance(module, TinyDetector)
    assert torch.equal(module.classes.weight, build(path, 2, 64, seed=3).classes.weight), "the seed decides"
    with pytest.raises(BadJob, match="settings do not list"):
        build("company_models:number", 2, 64)


def test_a_jobs_name_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("trap:anything", "trap", "trap.anything"):
        with pytest.raises(BadJob):
            first_weights(spec(name), None)
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


@pytest.mark.usefixtures("company")
def test_code_that_fails_is_named() -> None:
    plugins.allow(
        ["company_models:broken", "company_models:no_module", "company_models:missing", "nowhere:x"]
    )
    for path, error in {
        "company_models:broken": "ZeroDivisionError",
        "company_models:no_module": "torch.nn.Module",
        "company_models:missing": "cannot be imported.*missing",
        "nowhere:x": "cannot be imported.*nowhere",
    }.items():
        with pytest.raises(BadSettings, match=error):
            build(path, 2, 64)


def test_an_installed_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "one", "company-one", "fedqueue.architectures", "tiny", "company_pack:make")
    (tmp_path / "one" / "company_pack.py").write_text(
        "from tests.unit.test_detection_registry import TinyDetector as make\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "one")
    assert known("tiny")
    assert type(build("tiny", 2, 64)).__name__ == "TinyDetector"
    assert plugins.find(plugins.TRAINERS, "tiny") is None, "another group"
    package(tmp_path / "two", "company-two", "fedqueue.architectures", "tiny", "company_pack:make")
    monkeypatch.syspath_prepend(tmp_path / "two")
    with pytest.raises(BadSettings, match="company-one, company-two"):
        build("tiny", 2, 64)


def package(folder: Path, name: str, group: str, entry: str, value: str) -> None:
    """What pip writes when it installs a package with one entry point."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {value}\n")


def test_settings_list_import_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQUEUE_PLUGINS", "a.b:c, d:e.f ,")
    assert Settings.load().plugins == ("a.b:c", "d:e.f")
    for wrong in ("a.b", "a:b:c", "a b:c", "a/b:c", ":c"):
        monkeypatch.setenv("FEDQUEUE_PLUGINS", wrong)
        with pytest.raises(BadSettings, match="plugins"):
            Settings.load()


def test_the_convention_of_calling_is_tried_before_a_job_is_made() -> None:
    module = TinyDetector(2, 64)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    check(module, 2, 64)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())

    def broken(train: Any, use: Any) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, images: Tensor, targets: Any = None) -> Any:
                return train if targets is not None else use

        return Broken()

    found = [
        {"boxes": torch.zeros(1, 4), "labels": torch.ones(1, dtype=torch.int64), "scores": torch.ones(1)}
    ] * 2
    loss = {"loss": torch.tensor(1.0)}
    check(broken(loss, found), 2, 64)
    for train, use, error in (
        (torch.tensor(1.0), found, "dict of losses"),
        ({"loss": torch.tensor(float("nan"))}, found, "finite scalar"),
        ({"loss": torch.ones(2)}, found, "finite scalar"),
        (loss, found[0], "list with one dict"),
        (loss, [torch.ones(1)] * 2, "dict with boxes"),
        (loss, [{**found[0], "boxes": torch.zeros(3, 4)}] * 2, "must be"),
        (loss, [{**found[0], "labels": torch.ones(1)}] * 2, "must be"),
    ):
        with pytest.raises(BadJob, match=error):
            check(broken(train, use), 2, 64)
    with pytest.raises(BadJob, match="IndexError"):
        check(TinyDetector(0, 64), 1, 64)


# --- a model that is no detector -----------------------------------------------------------------------


def test_a_model_of_unknown_kind_needs_all_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "first.safetensors"
    arrays = {
        "conv.weight": np.ones((2, 2), np.float32),
        "norm.weight": np.ones(2, np.float32),
        "norm.running_mean": np.zeros(2, np.float32),
        "norm.running_var": np.ones(2, np.float32),
        "norm.num_batches_tracked": np.array(0, np.int64),
    }
    file.write_bytes(encode(from_arrays(arrays)))
    job = spec("classifier")
    with pytest.raises(BadJob, match=r"unknown architecture.*--weights FILE.safetensors"):
        first_weights(job, None)
    with pytest.raises(BadJob, match="the server measures detectors only"):
        first_weights(spec("classifier", evaluation=EvaluationPolicy(every=1)), str(file))
    with pytest.raises(BadJob, match=f"is {DEFAULT_ARCH} meant"):
        first_weights(spec(DEFAULT_ARCH[:-1]), str(file))
    first = first_weights(job, str(file))
    assert first.exchanged == sorted(arrays)
    assert any("--trainer" in line for line in first.report)
    local = job.model_copy(update={"plan": TrainingPlan(norm="local")})
    assert first_weights(local, str(file)).exchanged == ["conv.weight"]


# --- model archs ---------------------------------------------------------------------------------------


def test_model_archs_lists_and_measures() -> None:
    result = CliRunner().invoke(app, ["model", "archs"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert lines.keys() >= set(ARCHS)
    nbytes = len(encode(from_arrays(initial_state(spec(classes=tuple("abcdefg"))))))
    assert f"213,293     {nbytes:,}" in lines[DEFAULT_ARCH]
    assert "COCO_V1, IMAGENET1K_V1, IMAGENET1K_V2" in lines["fasterrcnn_resnet50_fpn_v2"]
    options = [
        "--arch",
        DEFAULT_ARCH,
        "--measure",
        "--seconds",
        "0",
        "--batch-size",
        "2",
        "--image-size",
        "64",
    ]
    result = CliRunner().invoke(app, ["model", "archs", *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    *_, side, training, inference = result.output.split()
    assert side == "64"
    assert float(training) > 0
    assert float(inference) > 0
    result = CliRunner().invoke(app, ["model", "archs", "--arch", "yolo"])
    assert result.exit_code == 1
    assert DEFAULT_ARCH in result.output


@pytest.mark.usefixtures("company")
def test_model_archs_shows_ones_own_and_names_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQUEUE_PLUGINS", "company_models:tiny,company_models:broken")
    options = ["--arch", "company_models:tiny", "--arch", "company_models:broken"]
    result = CliRunner().invoke(app, ["model", "archs", *options])
    assert result.exit_code == 0, result.output
    assert "company_models:tiny" in result.output
    assert "ZeroDivisionError" in result.output


def test_too_little_memory_to_measure_is_said() -> None:
    with pytest.raises(BadJob, match="memory is not enough for batches of 1000000000 images"):
        measure(DEFAULT_ARCH, 7, 64, 10**9, 0)
