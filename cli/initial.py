"""The first weights of a job, from what `fedqueue job submit` is given, and what to tell about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from federation.errors import BadJob, BadPayload
from federation.jobs import JobSpec
from federation.layout import MEAN_SUFFIX
from storage.tensors import decode, from_arrays

Arrays = Mapping[str, NDArray[Any]]
FILES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True, eq=False)
class FirstWeights:
    """All tensors of a job's model, the names of those that sites exchange, and lines for the submitter."""

    arrays: Arrays
    exchanged: list[str]
    report: list[str]


def first_weights(spec: JobSpec, source: str | None) -> FirstWeights:
    """`source`: a file (.pth, .safetensors), a name of torchvision's weights, or None for random ones.

    A detector takes of it what fits. Of a model that is no detector nothing is known here, so a file must bring
    all of it. Raises BadJob, Transient if a download fails, BadSettings.
    """
    from detection.registry import ARCHS, known, unknown

    if known(spec.arch):
        return _detector(spec, source)
    if source is None or Path(source).suffix not in FILES:
        raise BadJob(
            f"{unknown(spec.arch)}. A job for a trainer of your own needs all its first weights: "
            "--weights FILE.safetensors or FILE.pth"
        )
    if close := get_close_matches(spec.arch, ARCHS, n=1, cutoff=0.8):
        raise BadJob(f"unknown architecture {spec.arch!r}: is {close[0]} meant?")
    if spec.evaluation.every:
        raise BadJob(
            f"{spec.arch!r} is no detector that is known here, and the server measures detectors only: set "
            "evaluation.every to 0; sites measure with their own trainers (evaluation.sites_every)"
        )
    arrays = _whole(Path(source))
    report = [
        f"{source}: {len(arrays)} tensors, {sum(a.size for a in arrays.values()):,} numbers",
        f"{spec.arch!r} is no detector that is known here: sites need a trainer for it, "
        "`fedqueue site run --trainer NAME` (docs/custom-models.md)",
    ]
    if spec.evaluation.sites_every:
        report.append(
            f"the best version is the one with most {spec.evaluation.metric!r}: evaluate(weights) of these trainers "
            "must return it"
        )
    return FirstWeights(arrays, _exchanged(spec, arrays), report)


def _detector(spec: JobSpec, source: str | None) -> FirstWeights:
    from detection.convention import check
    from detection.registry import ARCHS
    from detection.weights import exchanged_names, initial_weights, module_for

    module = module_for(spec)
    exchanged = exchanged_names(module, spec.plan)
    if spec.arch not in ARCHS:
        check(module, len(spec.classes), spec.plan.image_size)
    if source is None:
        return FirstWeights(initial_weights(spec, None)[0], exchanged, [])
    stored = _stored(spec.arch, source)
    try:
        arrays, match = initial_weights(spec, stored)
    except BadJob as exc:
        raise BadJob(f"{source}: {exc}") from exc
    assert match is not None
    return FirstWeights(arrays, exchanged, [f"{source}: {line}" for line in match.report()])


def _stored(arch: str, source: str) -> Mapping[str, Any]:
    """Tensors or arrays by name."""
    from detection.initial import download, read_state_dict, torchvision_weights

    path = Path(source)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.is_file() or path.suffix in FILES:
        return read_state_dict(path)
    return download(torchvision_weights(arch, source))


def _safetensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return dict(decode(path.read_bytes()).arrays())
    except OSError as exc:
        raise BadJob(f"{path} cannot be read: {exc}") from exc
    except BadPayload as exc:
        raise BadJob(f"{path}: {exc}") from exc


def _whole(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix == ".safetensors":
        return _safetensors(path)
    from detection.initial import read_state_dict

    try:
        return dict(from_arrays({name: t.numpy() for name, t in read_state_dict(path).items()}).arrays())
    except (BadPayload, TypeError) as exc:  # numpy knows no bfloat16
        raise BadJob(f"{path}: {exc}") from exc


def _exchanged(spec: JobSpec, arrays: Arrays) -> list[str]:
    """As `detection.weights.exchanged_names`, with BatchNorm layers known by their running statistics."""
    plan = spec.plan
    layers = {name.removesuffix(MEAN_SUFFIX) for name in arrays if name.endswith(MEAN_SUFFIX)}
    kept_home = set() if plan.norm == "average" else layers
    for layer in plan.freeze:
        if not any(plan.model_copy(update={"freeze": (layer,)}).freezes(name) for name in arrays):
            raise BadJob(f"plan.freeze: the file has no tensor of layer {layer!r}")
    exchanged = [n for n in arrays if n.rpartition(".")[0] not in kept_home and not plan.freezes(n)]
    if not exchanged:
        raise BadJob("plan.freeze and plan.norm leave nothing to train together: freeze fewer layers")
    return sorted(exchanged)
