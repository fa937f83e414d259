"""The canonical layout of a model: which tensors there are, and where each lies in the flat vectors.

A model travels as one safetensors file whose data block is, in this order:

    F32  parameters and other values, by name            flat[0 : W]
    F32  BatchNorm running means, by layer name          flat[W : W+S]
    F32  BatchNorm running variances, in the same order  flat[W+S : W+2S]
    I64  integers (num_batches_tracked …), by name       ints[0 : I]

So all floats are one contiguous vector `flat` of W+2S numbers, which a merge can walk without knowing any
tensor, and the statistics rule is arithmetic on two equal slices. A running mean and its variance are
recognised by their names, `<layer>.running_mean` and `<layer>.running_var`, and must come as a pair of the
same shape. Only F32 and I64 are exchanged.

Where sites share the state of their optimisers, a payload holds between the parameters and the means, for each of the
W numbers, its first moment and, for Adam, its second: tensors `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, as
torch names them, each stretch in the order of the parameters. A model holds none: they lie in a file beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import prod
from typing import Annotated, Literal

from pydantic import Field

from federation.base import Value
from federation.errors import BadPayload

DType = Literal["F32", "I64"]
ITEM_BYTES: dict[str, int] = {"F32": 4, "I64": 8}

MEAN_SUFFIX = ".running_mean"
VARIANCE_SUFFIX = ".running_var"
COUNTER_SUFFIX = ".num_batches_tracked"
MOMENT_SUFFIXES = (".exp_avg", ".exp_avg_sq")
"""Of the first and the second moment of a parameter's gradient, as torch names them."""


_FLOAT_STRETCHES = (*MOMENT_SUFFIXES, MEAN_SUFFIX, VARIANCE_SUFFIX)


class TensorSpec(Value):
    """One tensor: its name, its type and its shape (numbers of elements; () is a scalar)."""

    name: str = Field(min_length=1, max_length=512)
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


class Layout(Value):
    """The tensors of a model in canonical order. Build it with `Layout.of`."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Layout:
        """Sort `specs` into canonical order.

        Raises BadPayload for a name given twice, a running mean and variance that are no pair, or moments that are
        not those of all parameters.
        """
        by_name: dict[str, TensorSpec] = {}
        for spec in specs:
            if spec.name in by_name:
                raise BadPayload(f"tensor {spec.name!r} is there twice", "layout")
            by_name[spec.name] = spec
        for name, spec in by_name.items():
            partner = _partner(name)
            if partner is None or spec.dtype != "F32":
                continue
            other = by_name.get(partner)
            if other is None or other.shape != spec.shape or other.dtype != "F32":
                raise BadPayload(f"{name!r} needs {partner!r} of the same type and shape beside it", "layout")
        _check_moments(by_name)
        return cls(tensors=tuple(sorted(by_name.values(), key=_canonical_order)))

    def with_moments(self, count: int) -> Layout:
        """The layout of a payload that holds `count` moments, 0, 1 or 2, of every parameter besides."""
        if not count:
            return self
        moments = [
            TensorSpec(name=t.name + suffix, dtype="F32", shape=t.shape)
            for suffix in MOMENT_SUFFIXES[:count]
            for t in self.parameters
        ]
        return Layout.of([*self.tensors, *moments])

    @cached_property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """Those of the first stretch, W numbers in all."""
        return tuple(t for t in self.tensors if _is_parameter(t))

    @cached_property
    def weight_count(self) -> int:
        """W: float32 numbers that are mixed as weights."""
        return sum(t.size for t in self.parameters)

    @cached_property
    def moments(self) -> int:
        """How many moments of each parameter there are: 0, and in a payload up to 2."""
        return sum(any(t.name.endswith(suffix) for t in self.tensors) for suffix in MOMENT_SUFFIXES)

    @cached_property
    def statistic_count(self) -> int:
        """S: running means, and as many running variances."""
        return sum(t.size for t in self.tensors if t.dtype == "F32" and t.name.endswith(MEAN_SUFFIX))

    @cached_property
    def float_count(self) -> int:
        """W + 2S, and with the moments of a payload up to 3W + 2S."""
        return (1 + self.moments) * self.weight_count + 2 * self.statistic_count

    @cached_property
    def int_count(self) -> int:
        return sum(t.size for t in self.tensors if t.dtype == "I64")

    @cached_property
    def counter_slices(self) -> tuple[slice, ...]:
        """Where the `num_batches_tracked` counters lie in the integer vector."""
        slices, at = [], 0
        for tensor in self.tensors:
            if tensor.dtype == "I64":
                if tensor.name.endswith(COUNTER_SUFFIX):
                    slices.append(slice(at, at + tensor.size))
                at += tensor.size
        return tuple(slices)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the data block."""
        return sum(t.nbytes for t in self.tensors)

    def difference(self, other: Layout) -> str:
        """The first way in which `other` differs, in words; empty if it is the same."""
        mine = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        for name in mine:
            if name not in theirs:
                return f"tensor {name!r} is missing"
        for name, spec in theirs.items():
            if name not in mine:
                return f"tensor {name!r} is not part of this model"
            if spec.dtype != mine[name].dtype:
                return f"tensor {name!r} is {spec.dtype}, must be {mine[name].dtype}"
            if spec.shape != mine[name].shape:
                return f"tensor {name!r} has shape {spec.shape}, must have {mine[name].shape}"
        if self.tensors != other.tensors:
            return "the tensors are not in canonical order (docs/protocol.md)"
        return ""


def is_statistic(name: str) -> bool:
    """True for a BatchNorm running mean or variance."""
    return name.endswith((MEAN_SUFFIX, VARIANCE_SUFFIX))


def is_moment(name: str) -> bool:
    """True for a moment of an optimiser."""
    return name.endswith(MOMENT_SUFFIXES)


def _is_parameter(spec: TensorSpec) -> bool:
    return spec.dtype == "F32" and not is_statistic(spec.name) and not is_moment(spec.name)


def _check_moments(by_name: dict[str, TensorSpec]) -> None:
    """Raises BadPayload unless there are moments of all parameters or none, and second ones only beside first ones."""
    parameters = [spec for spec in by_name.values() if _is_parameter(spec)]
    earlier = True
    for suffix in MOMENT_SUFFIXES:
        found = {name: spec for name, spec in by_name.items() if name.endswith(suffix)}
        wanted = {p.name + suffix: p.model_copy(update={"name": p.name + suffix}) for p in parameters}
        if found and not (earlier and found == wanted):
            raise BadPayload(
                f"tensors {suffix!r}: a moment is of every parameter, in its shape, and a second one follows a first",
                "layout",
            )
        earlier = bool(found)


def _partner(name: str) -> str | None:
    if name.endswith(MEAN_SUFFIX):
        return name.removesuffix(MEAN_SUFFIX) + VARIANCE_SUFFIX
    if name.endswith(VARIANCE_SUFFIX):
        return name.removesuffix(VARIANCE_SUFFIX) + MEAN_SUFFIX
    return None


def _canonical_order(spec: TensorSpec) -> tuple[int, str]:
    if spec.dtype == "I64":
        return len(_FLOAT_STRETCHES) + 1, spec.name
    # by the layer's or parameter's name, so that what belongs together has the same place in each stretch
    for place, suffix in enumerate(_FLOAT_STRETCHES, 1):
        if spec.name.endswith(suffix):
            return place, spec.name.removesuffix(suffix)
    return 0, spec.name
