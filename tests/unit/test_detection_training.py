"""Detectors, their weights and local training, on a few drawn rectangles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from detection.augment import batch, whole_target
from detection.dataset import Dataset, load_dataset
from detection.engine import (
    Diverged,
    OptimizerState,
    OutOfMemory,
    StepReport,
    Trained,
    add_proximal_gradient,
    freeze,
    learning_rate,
    to_device,
    train,
)
from detection.evaluate import evaluate
from detection.families import FAMILIES
from detection.registry import ARCHS, DEFAULT_ARCH, build
from detection.threads import pick_device, use_threads
from detection.weights import Arrays, exchanged_names, initial_state, load_state, module_for, state
from federation.errors import BadDataset, BadJob, BadPayload, BadSettings
from federation.jobs import AUGMENTATIONS, MAP_50, JobSpec, TrainingPlan
from storage.tensors import from_arrays

CLASSES = ("red", "blue")
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    use_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six images of 128x96 with one or two coloured boxes each, the last without any."""
    folder = tmp_path_factory.mktemp("drawn")
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
    }
    rng = np.random.default_rng(5)
    for i in range(6):
        image = Image.fromarray(rng.integers(90, 130, (96, 128, 3)).astype(np.uint8))
        for k in range(1 + i % 2) if i < 5 else ():
            x, y, w, h = (int(v) for v in (rng.integers(4, 30) + 60 * k, rng.integers(4, 40), 30, 40))
            ImageDraw.Draw(image).rectangle([x, y, x + w - 1, y + h - 1], fill=COLOURS[CLASSES[(i + k) % 2]])
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]),
                    "image_id": i,
                    "category_id": (i + k) % 2,
                    "bbox": [x, y, w, h],
                }
            )
        image.save(folder / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png", "width": 128, "height": 96})
    (folder / "site.json").write_text(json.dumps(coco))
    return load_dataset(folder / "site.json", folder, CLASSES)


def spec(arch: str = DEFAULT_ARCH, **plan: Any) -> JobSpec:
    small = {"image_size": 64, "batch_size": 2, "local_steps": 2, "warmup_steps": 0, **plan}
    return JobSpec(id="test", classes=CLASSES, arch=arch, plan=TrainingPlan(**small))


def run(job: JobSpec, weights: Mapping[str, Any], dataset: Dataset, seed: int = 1, **options: Any) -> Trained:
    return train(job, weights, dataset, seed=seed, progress=(0.0, 0.0), **options)


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


# --- detectors and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_fits_the_protocol_trains_a_step_and_is_evaluated(
    arch: str, dataset: Dataset
) -> None:
    job = spec(arch, image_size=FAMILIES[arch].min_image_size, batch_size=1 if arch == "ssd300_vgg16" else 2)
    dataset = replace(dataset, items=dataset.items[:2])  # the large ones take seconds per image
    weights = initial_state(job)
    layout = from_arrays(weights).layout
    assert (layout.statistic_count > 0) == (arch != "ssd300_vgg16"), "VGG-16 has no BatchNorm"
    assert all(a.flags.c_contiguous for a in weights.values())
    trained = run(job, weights, dataset, steps=1)
    assert trained.weights.keys() == weights.keys()
    changed = [n for n, a in weights.items() if not np.array_equal(a, trained.weights[n])]
    assert len(changed) > 0.5 * len(weights), "a step moves nearly every tensor"
    assert trained.num_examples == 2
    assert evaluate(job, trained.weights, dataset).num_images == 2


def test_default_detector_is_small() -> None:
    module = build(DEFAULT_ARCH, 7, 256)
    assert sum(p.numel() for p in module.parameters()) == 213_293
    assert module.head.regression_head.bbox_reg.bias.tolist() == [1.5] * 4


@pytest.mark.parametrize("arch", [*ARCHS[:2], "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvision_call_convention_with_images_of_any_size(arch: str) -> None:
    module = build(arch, 2, 64)
    images = [torch.rand(3, 90, 120), torch.rand(3, 50, 40)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 35, 45]]), "labels": torch.tensor([2])}] * 2
    losses = module.train()(images, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    with torch.inference_mode():
        found = module.eval()(images)
    for result, (width, height) in zip(found, ((120, 90), (40, 50)), strict=True):
        assert set(result) >= {"boxes", "labels", "scores"}
        assert (result["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()


def test_initial_state_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initial_state(spec())
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same(first, initial_state(spec()))
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's generator is left alone"
    assert not same(first, initial_state(spec(seed=1)))


def test_state_round_trip() -> None:
    arrays = initial_state(spec(seed=1))
    module = build(DEFAULT_ARCH, 2, 64)
    load_state(module, arrays)
    assert same(state(module), arrays)
    for array in arrays.values():
        array.flags.writeable = False
    load_state(module, arrays)  # memory-mapped models are read-only
    taken = state(module)
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert same(taken, arrays), "a state is a copy"


def test_load_state_names_what_does_not_fit() -> None:
    arrays = initial_state(spec())
    module = build(DEFAULT_ARCH, 2, 64)
    name = "head.classification_head.cls_logits.weight"
    with pytest.raises(BadPayload, match=f"{name}.*missing"):
        load_state(module, {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(BadPayload, match="'extra' is not part"):
        load_state(module, {**arrays, "extra": np.zeros(1, np.float32)})
    with pytest.raises(BadPayload, match=f"{name}.*shape"):
        load_state(module, initial_state(JobSpec(id="test", classes=("a",))))
    with pytest.raises(BadPayload, match=f"{name}.*float64"):
        load_state(module, {**arrays, name: arrays[name].astype(np.float64)})


def test_norm_policy_decides_what_is_exchanged() -> None:
    module = build(DEFAULT_ARCH, 2, 64)
    everything = set(module.state_dict())
    assert set(exchanged_names(module, TrainingPlan())) == everything
    exchanged = set(exchanged_names(module, TrainingPlan(norm="local")))
    assert exchanged == set(exchanged_names(module, TrainingPlan(norm="frozen")))
    kept = everything - exchanged
    assert {n.rsplit(".", 1)[1] for n in kept} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert "backbone.body.conv1.1.weight" in kept
    assert "backbone.body.conv1.0.weight" in exchanged
    assert "head.classification_head.conv.2.weight" in exchanged, "GroupNorm has no statistics to keep"
    assert not any("running" in name for name in exchanged)


# --- training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [DEFAULT_ARCH, "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_same_arguments_same_bytes(arch: str, dataset: Dataset) -> None:
    job = spec(arch)
    weights = initial_state(job)
    before = {name: array.copy() for name, array in weights.items()}
    torch.manual_seed(11)
    first = run(job, weights, dataset)
    torch.manual_seed(12)
    assert same(first.weights, run(job, weights, dataset).weights)
    assert same(weights, before), "the version it started from is not written to"
    assert not same(first.weights, run(job, weights, dataset, seed=2).weights)


def test_frozen_norm_trains_everything_else(dataset: Dataset) -> None:
    job = spec(norm="frozen")
    weights = initial_state(job)
    trained = run(job, weights, dataset).weights
    exchanged = exchanged_names(build(DEFAULT_ARCH, 2, 64), job.plan)
    for name in weights.keys() - set(exchanged):
        assert np.array_equal(weights[name], trained[name]), name
    assert not np.array_equal(
        weights["backbone.body.conv1.0.weight"], trained["backbone.body.conv1.0.weight"]
    )


def test_reports_every_step(dataset: Dataset) -> None:
    job = spec()
    reports: list[StepReport] = []
    trained = run(job, initial_state(job), dataset, steps=3, on_step=reports.append)
    assert [(r.step, r.steps, r.epoch) for r in reports] == [(1, 3, 1 / 3), (2, 3, 2 / 3), (3, 3, 1.0)]
    assert trained.metrics["loss"] == pytest.approx(np.mean([r.loss for r in reports]))
    assert trained.metrics["steps"] == 3
    assert trained.metrics["epochs"] == 1.0


def test_an_update_says_how_many_objects_its_steps_saw(dataset: Dataset) -> None:
    job = spec(batch_size=dataset.num_examples, augmentation="none")
    trained = run(job, initial_state(job), dataset, steps=2)
    assert trained.metrics["objects"] == 2 * dataset.num_boxes > 0


def test_an_exception_from_the_observer_ends_training(dataset: Dataset) -> None:
    job = spec()

    def stop(report: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, initial_state(job), dataset, on_step=stop)


def test_duty_sleeps_in_proportion(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("detection.engine.time.sleep", naps.append)
    job = spec()
    weights = initial_state(job)
    slow = run(job, weights, dataset, duty=0.25)
    assert len(naps) == 2
    assert slow.metrics["seconds"] >= sum(naps) / 3
    assert same(slow.weights, run(job, weights, dataset).weights)
    assert len(naps) == 2, "full duty never sleeps"
    with pytest.raises(ValueError, match="duty"):
        run(job, weights, dataset, duty=0)


def test_divergence_is_an_error_and_not_an_update(dataset: Dataset) -> None:
    job = spec()
    weights = initial_state(job)
    weights["backbone.body.conv1.0.weight"][0] = np.nan
    with pytest.raises(Diverged, match="step 1 of 2") as caught:
        run(job, weights, dataset)
    assert caught.value.reason == "diverged"


def test_no_steps_change_nothing(dataset: Dataset) -> None:
    job = spec()
    weights = initial_state(job)
    assert same(run(job, weights, dataset, steps=0).weights, weights)


def test_data_set_of_another_job_is_refused(dataset: Dataset) -> None:
    job = JobSpec(id="test", classes=("blue", "red"))
    with pytest.raises(BadDataset, match="read for classes"):
        run(job, {}, dataset)
    with pytest.raises(BadDataset, match="read for classes"):
        evaluate(job, {}, dataset)


def test_batch_of_one_that_an_architecture_cannot_train(dataset: Dataset) -> None:
    job = spec("ssdlite320_mobilenet_v3_large", batch_size=1)
    with pytest.raises(BadJob, match="batch_size 1"):
        run(job, initial_state(job), dataset)


def test_learning_rate() -> None:
    plan = TrainingPlan(learning_rate=1.0, warmup_steps=3, final_learning_rate_fraction=0.1)
    assert [learning_rate(plan, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(plan, 9, 0.5) == pytest.approx(0.55)
    assert learning_rate(plan, 9, 1.0) == pytest.approx(0.1)
    assert learning_rate(plan, 9, 1.7) == pytest.approx(0.1), "a late update of a job that is over its end"
    constant = plan.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 9, 0.9) == 1.0
    linear = plan.model_copy(update={"schedule": "linear"})
    assert [learning_rate(linear, 9, done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(linear, 0, 0.5) == pytest.approx(0.55 / 4)


def test_the_rate_moves_from_the_progress_at_the_start_to_that_at_the_end(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def note(plan: TrainingPlan, step: int, progress: float) -> float:
        seen.append(progress)
        return learning_rate(plan, step, progress)

    job = spec()
    monkeypatch.setattr("detection.engine.learning_rate", note)
    train(job, initial_state(job), dataset, seed=1, progress=(0.2, 0.6), steps=4)
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.5])


def test_epochs_decide_the_steps(dataset: Dataset) -> None:
    job = spec(local_epochs=1.5, batch_size=4, local_steps=7)
    trained = run(job, initial_state(job), dataset)
    assert trained.metrics["steps"] == 3  # 6 images, 1.5 times, by 4
    assert trained.metrics["epochs"] == 2.0


def test_overfitting_a_few_images_raises_map(dataset: Dataset) -> None:
    job = spec(batch_size=6, learning_rate=4e-3, warmup_steps=5, image_size=96)
    weights = initial_state(job)
    before = evaluate(job, weights, dataset).metrics[MAP_50]
    trained = train(job, weights, dataset, seed=0, progress=(0.0, 1.0), steps=60)
    after = evaluate(job, trained.weights, dataset).metrics[MAP_50]
    assert before < 0.1
    assert after > 0.5


@pytest.mark.parametrize(
    "plan",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "nesterov": True},
        {"optimizer": "sgd", "momentum": 0.0},
        {"proximal_mu": 1.0},
        {"local_steps": 3},
    ],
    ids=str,
)
def test_every_choice_of_the_plan_changes_training_and_keeps_it_deterministic(
    plan: dict[str, Any], dataset: Dataset
) -> None:
    job, plain = spec(**plan), spec()
    weights = initial_state(job)
    first = run(job, weights, dataset)
    assert same(first.weights, run(job, weights, dataset).weights)
    assert not same(first.weights, run(plain, weights, dataset).weights)


def test_mixed_precision_has_no_effect_on_the_cpu(dataset: Dataset) -> None:
    weights = initial_state(spec())
    plain = run(spec(), weights, dataset).weights
    for precision in ("bf16", "fp16"):
        assert same(run(spec(mixed_precision=precision), weights, dataset).weights, plain)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_training_in_16_bits(
    optimizer: str, precision: str, dtype: torch.dtype, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens on CUDA, with the CPU's autocast: the path through the scaler is the same."""
    job = spec(optimizer=optimizer, mixed_precision=precision, local_steps=3)
    weights = initial_state(job)
    plain = run(job, weights, dataset).weights
    scaler = torch.amp.GradScaler("cpu", 2.0**24, enabled=precision == "fp16")
    monkeypatch.setattr(
        "detection.engine._mixed_precision", lambda plan, device: (torch.autocast("cpu", dtype), scaler)
    )
    trained = run(job, weights, dataset).weights
    assert not same(plain, trained)
    if precision == "fp16":
        assert scaler.get_scale() < 2.0**24, "steps whose gradients overflowed were skipped"
        name = "backbone.body.conv1.0.weight"
        assert np.array_equal(weights[name], trained[name])
    for name in ("head.classification_head.cls_logits.weight", "backbone.body.conv1.1.running_mean"):
        assert np.isfinite(trained[name]).all()


def test_proximal_gradient_is_that_of_the_proximal_term() -> None:
    """FedProx: h(w) = F(w) + (μ/2)·|w - w_base|², against autograd."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    base = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    x = torch.randn(5, 4)
    (
        layer(x).square().sum()
        + 0.35 * sum((p - b).square().sum() for p, b in zip(layer.parameters(), base, strict=True))
    ).backward()
    expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer(x).square().sum().backward()
    add_proximal_gradient(list(layer.parameters()), base, 0.7)
    torch.testing.assert_close([p.grad for p in layer.parameters()], expected)
    assert len(expected) == 2


def test_a_strong_proximal_term_keeps_the_weights_near_their_base(dataset: Dataset) -> None:
    def moved(mu: float) -> float:
        job = spec(
            optimizer="sgd",
            momentum=0.0,
            learning_rate=1e-2,
            weight_decay=0.0,
            gradient_norm_limit=1e9,
            proximal_mu=mu,
            local_steps=4,
        )
        weights = initial_state(job)
        trained = run(job, weights, dataset).weights
        return sum(float(np.abs(trained[n] - weights[n]).sum()) for n in weights if n.endswith("weight"))

    assert moved(50.0) < 0.8 * moved(0.0)


# --- frozen layers -------------------------------------------------------------------------------------

STEM = ("backbone.body.conv1", "backbone.body.stage2")


def test_frozen_layers_are_neither_trained_nor_sent(dataset: Dataset) -> None:
    job = spec(freeze=STEM)
    weights = initial_state(job)
    trained = run(job, weights, dataset).weights
    exchanged = set(exchanged_names(module_for(job), job.plan))
    frozen = weights.keys() - exchanged
    assert frozen == {n for n in weights if n.startswith(("backbone.body.conv1.", "backbone.body.stage2."))}
    assert any(n.endswith("running_mean") for n in frozen)
    for name in frozen:
        assert np.array_equal(weights[name], trained[name]), name
    later = "backbone.body.stage3.0.branch1.0.weight"
    assert not np.array_equal(weights[later], trained[later])
    assert not np.array_equal(
        weights["backbone.body.stage3.0.branch1.1.running_mean"],
        trained["backbone.body.stage3.0.branch1.1.running_mean"],
    )


def test_no_gradient_flows_into_frozen_first_layers(dataset: Dataset) -> None:
    job = spec(freeze=STEM)
    module = module_for(job).train()
    freeze(module, job.plan)
    maps: list[torch.Tensor] = []
    module.get_submodule("backbone.body.stage2").register_forward_hook(lambda *call: maps.append(call[2]))
    images, targets = batch(dataset, [0, 1], 64, np.random.default_rng(0), job.plan.augmentation)
    module(images, targets)
    assert [m.requires_grad for m in maps] == [False]


def test_a_name_is_frozen_whole_and_not_by_its_first_letters() -> None:
    plan = TrainingPlan(freeze=("backbone.body.conv1",))
    assert plan.freezes("backbone.body.conv1.0.weight")
    assert plan.freezes("backbone.body.conv1")
    assert not plan.freezes("backbone.body.conv10.weight")
    assert not plan.freezes("backbone.body")


def test_frozen_single_tensors_and_norm_policies_go_together() -> None:
    module = build(DEFAULT_ARCH, 2, 64)
    bias = "head.regression_head.bbox_reg.bias"
    assert bias not in exchanged_names(module, TrainingPlan(freeze=(bias,)))
    both = set(exchanged_names(module, TrainingPlan(freeze=STEM, norm="local")))
    assert both == set(exchanged_names(module, TrainingPlan(freeze=STEM))) & set(
        exchanged_names(module, TrainingPlan(norm="local"))
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("backbone.body.conv2",), "backbone.body.conv1"),
        ((*STEM, "nothing"), "'nothing' is no layer"),
        (("backbone.body.conv1.1.running_mean",), "no layer with weights"),
        (("backbone", "head"), "leave nothing to train"),
    ],
)
def test_freezing_what_cannot_be_is_a_mistake_of_the_job(layers: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadJob, match=message):
        exchanged_names(build(DEFAULT_ARCH, 2, 64), TrainingPlan(freeze=layers))


# --- memory and devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["allocator", "python"])
def test_too_little_memory_is_an_error_that_says_what_to_lower(
    kind: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*call: object) -> torch.Tensor:
        return torch.empty(1 << 55) if kind == "allocator" else torch.tensor(bytearray(1 << 60))

    monkeypatch.setattr("detection.engine._forward", greedy)
    job = spec()
    with pytest.raises(OutOfMemory, match=r"batch_size \(2\) or image_size \(64\)") as caught:
        run(job, initial_state(job), dataset)
    assert caught.value.reason == "out-of-memory"
    assert caught.value.__context__ is None, "a kept traceback would keep the tensors of the step"


def test_other_errors_of_torch_are_not_taken_for_memory(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*call: object) -> torch.Tensor:
        return torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr("detection.engine._forward", wrong)
    job = spec()
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(job, initial_state(job), dataset)


def test_a_batch_goes_to_the_device_whole(dataset: Dataset) -> None:
    images, targets = batch(dataset, [0, 1], 64, np.random.default_rng(0), AUGMENTATIONS["none"])
    moved, moved_targets = to_device(images, targets, torch.device("meta"))
    assert moved.is_meta
    assert all(value.is_meta for target in moved_targets for value in target.values())


def test_the_device_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(gpus: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    machine(0)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(BadSettings, match=f"device is {name}, but torch finds no CUDA"):
            pick_device(name)
    machine(2)
    assert [pick_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda",
        "cpu",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(BadSettings, match="there are 2: take cuda:0 to cuda:1"):
        pick_device("cuda:2")


# --- augmentation --------------------------------------------------------------------------------------


def test_augmented_boxes_stay_on_their_objects(dataset: Dataset) -> None:
    """Under every scale, crop and flip, the centre of a box is of the colour of its class."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(8):
        images, targets = batch(dataset, range(5), 96, rng, AUGMENTATIONS["strong"])
        assert images.min() >= 0
        assert images.max() <= 1
        for image, target in zip(images, targets, strict=True):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                assert (box[2:] - box[:2] >= 2).all()
                assert (box >= 0).all()
                assert (box <= 96).all()
                x, y = ((box[:2] + box[2:]) / 2).long().tolist()
                red, _, blue = image[:, y, x].tolist()
                assert (red > blue) == (label == 1)
                seen += 1
    assert seen > 40


def test_without_augmentation_a_batch_is_the_images(dataset: Dataset) -> None:
    images, targets = batch(dataset, [0, 5], 64, np.random.default_rng(0), AUGMENTATIONS["none"])
    assert torch.equal(images[0], dataset.square(0, 64).float() / 255)
    np.testing.assert_allclose(targets[0]["boxes"], dataset.items[0].boxes * [0.5, 64 / 96, 0.5, 64 / 96])
    assert targets[1]["boxes"].shape == (0, 4)
    assert whole_target(dataset, 5, 64)["labels"].dtype == torch.int64


def test_the_generator_alone_decides_what_is_done_to_the_images(dataset: Dataset) -> None:
    def drawn(seed: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        return batch(dataset, range(5), 64, np.random.default_rng(seed), AUGMENTATIONS["strong"])

    torch.manual_seed(1)
    images, targets = drawn(3)
    torch.manual_seed(2)
    again, targets_again = drawn(3)
    assert torch.equal(images, again)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, targets_again, strict=True))
    assert not torch.equal(images, drawn(4)[0])


def test_each_part_of_the_augmentation_does_its_own(dataset: Dataset) -> None:
    none = AUGMENTATIONS["none"]

    def of(**changes: float) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        policy = none.model_copy(update=changes)
        return batch(dataset, range(5), 64, np.random.default_rng(0), policy)

    plain, truth = of()
    mirrored, targets = of(flip=1.0)
    assert torch.equal(mirrored, plain.flip(-1))
    for target, whole in zip(targets, truth, strict=True):
        x0, y0, x1, y1 = whole["boxes"].unbind(1)
        torch.testing.assert_close(target["boxes"], torch.stack([64 - x1, y0, 64 - x0, y1], dim=1))
    for part in ({"brightness": 0.5}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.3, "hue_share": 1.0}):
        coloured, targets = of(**part)
        assert (coloured != plain).any(dim=(1, 2, 3)).all(), part
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, truth, strict=True))
    smaller, targets = of(rescale=1.0, min_scale=0.5, max_scale=1.0)
    sides = [t["boxes"][0, 2:] - t["boxes"][0, :2] for t in targets]
    for side, whole in zip(sides, truth, strict=True):
        factor = side / (whole["boxes"][0, 2:] - whole["boxes"][0, :2])
        assert (factor < 1).all()
        assert (factor > 0.45).all()
    assert (smaller.mul(255).round() == 114).all(dim=1).any(dim=(1, 2)).all(), "grey around a smaller image"


def test_a_box_that_is_hardly_in_the_picture_is_left_out(dataset: Dataset) -> None:
    """At four times the size most boxes are cut; what stays is at least 30 % of its own."""
    policy = AUGMENTATIONS["none"].model_copy(update={"rescale": 1.0, "min_scale": 4.0, "max_scale": 4.0})
    rng = np.random.default_rng(0)
    whole = [whole_target(dataset, i, 256)["boxes"] for i in range(5)]
    dropped = 0
    for _ in range(10):
        _, targets = batch(dataset, range(5), 64, rng, policy)
        for target, boxes in zip(targets, whole, strict=True):
            assert len(target["boxes"]) == len(target["labels"])
            dropped += len(boxes) - len(target["boxes"])
            smallest = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1)).min()
            assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(dim=1) >= 0.29 * smallest).all()
    assert dropped > 10


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_kept_optimiser_goes_on_where_it_was(optimizer: str, dataset: Dataset) -> None:
    """The first step of the second update is the one that an optimiser that never ended would take."""
    job = spec(optimizer=optimizer, learning_rate=1e-3, warmup_steps=2, schedule="constant")
    first = run(job, initial_state(job), dataset)
    moments = deepcopy(first.optimizer_state)
    kept = run(job, first.weights, dataset, seed=2, optimizer_state=first.optimizer_state)
    fresh = run(job, first.weights, dataset, seed=2)
    assert not same(kept.weights, fresh.weights)
    again = run(job, first.weights, dataset, seed=2, optimizer_state=moments)
    assert same(kept.weights, again.weights), "what is given is not changed: an attempt may be dropped"
    steps = [state["step"].item() for state in kept.optimizer_state.values() if "step" in state]
    assert all(step == 4 for step in steps)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_moments_that_travelled_do_what_moments_do_that_were_kept(optimizer: str, dataset: Dataset) -> None:
    """One update after another, the state once in memory and once among the tensors."""
    job = spec(optimizer=optimizer, learning_rate=1e-3, warmup_steps=2, schedule="constant")
    shared = spec(
        optimizer=optimizer,
        learning_rate=1e-3,
        warmup_steps=2,
        schedule="constant",
        optimizer_state="shared",
    )
    first = run(job, initial_state(job), dataset)
    sent = run(shared, initial_state(job), dataset).weights
    suffixes = (".exp_avg", ".exp_avg_sq") if optimizer == "adamw" else (".exp_avg",)
    moments = {name: array for name, array in sent.items() if name.endswith(suffixes)}
    tensors = {name: array for name, array in sent.items() if name not in moments}
    assert same(tensors, first.weights)
    assert from_arrays(sent).layout == from_arrays(tensors).layout.with_moments(len(suffixes))
    assert all(np.abs(array).max() > 0 for name, array in moments.items() if "bbox_reg.weight" in name)
    kept = run(job, first.weights, dataset, seed=2, optimizer_state=first.optimizer_state)
    again = run(shared, sent, dataset, seed=2, steps_before=2).weights
    assert same({name: array for name, array in again.items() if name in tensors}, kept.weights)


def test_from_its_share_of_the_job_on_batch_norm_keeps_its_statistics_and_trains_its_parameters(
    dataset: Dataset,
) -> None:
    job = spec(norm_fixed_from=0.5)
    weights = initial_state(job)

    def changed(start: float) -> set[str]:
        trained = train(job, weights, dataset, seed=1, progress=(start, 1.0)).weights
        return {name for name in trained if trained[name].tobytes() != weights[name].tobytes()}

    before, after = changed(0.4), changed(0.5)
    layer = "backbone.body.conv1.1."
    counted = {layer + name for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert counted <= before
    assert not counted & after
    assert layer + "weight" in before & after
    assert not any(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in after)


def test_layers_that_are_not_trained_have_moments_of_zero(dataset: Dataset) -> None:
    job = spec(norm="frozen", optimizer_state="shared")
    weights = run(job, initial_state(job), dataset).weights
    assert not weights["backbone.body.conv1.1.weight.exp_avg"].any()
    assert weights["backbone.body.conv1.0.weight.exp_avg"].any()


def test_a_kept_optimiser_is_not_warmed_up_again(dataset: Dataset) -> None:
    """SGD without momentum keeps nothing, so the rate alone is different."""
    job = spec(
        optimizer="sgd", momentum=0.0, learning_rate=0.1, warmup_steps=9, weight_decay=0.0, local_steps=1
    )
    weights = initial_state(job)
    name = "head.classification_head.cls_logits.bias"

    def moved(state: OptimizerState | None) -> float:
        return float(
            np.abs(run(job, weights, dataset, optimizer_state=state).weights[name] - weights[name]).max()
        )

    assert moved({}) == pytest.approx(10 * moved(None), rel=1e-2)
