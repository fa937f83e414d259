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

        Raises BadPayload for a name given twice, or a running mean and variance that are no pair.
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
        return cls(tensors=tuple(sorted(by_name.values(), key=_canonical_order)))

    @cached_property
    def weight_count(self) -> int:
        """W: float32 numbers that are mixed as weights."""
        return sum(t.size for t in self.tensors if t.dtype == "F32" and not is_statistic(t.name))

    @cached_property
    def statistic_count(self) -> int:
        """S: running means, and as many running variances."""
        return sum(t.size for t in self.tensors if t.dtype == "F32" and t.name.endswith(MEAN_SUFFIX))

    @cached_property
    def float_count(self) -> int:
        """W + 2S."""
        return self.weight_count + 2 * self.statistic_count

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


def _partner(name: str) -> str | None:
    if name.endswith(MEAN_SUFFIX):
        return name.removesuffix(MEAN_SUFFIX) + VARIANCE_SUFFIX
    if name.endswith(VARIANCE_SUFFIX):
        return name.removesuffix(VARIANCE_SUFFIX) + MEAN_SUFFIX
    return None


def _canonical_order(spec: TensorSpec) -> tuple[int, str]:
    if spec.dtype == "I64":
        return 3, spec.name
    # by the layer's name, so that both statistics of a layer have the same place in their block
    if spec.name.endswith(MEAN_SUFFIX):
        return 1, spec.name.removesuffix(MEAN_SUFFIX)
    if spec.name.endswith(VARIANCE_SUFFIX):
        return 2, spec.name.removesuffix(VARIANCE_SUFFIX)
    return 0, spec.name
