"""Tensor files: a model, an update or an optimiser's state as one safetensors file in canonical layout.

    8 bytes        length n of the header, little-endian
    n bytes        JSON {"__metadata__": {…}, "<name>": {"dtype", "shape", "data_offsets": [begin, end]}, …},
                   padded with spaces so that the data block begins on a multiple of 8
    data block     all F32 tensors, then all I64 tensors, in the order of federation.layout, without gaps

So the whole file is three pieces: header, one float32 vector, one int64 vector. Reading copies nothing. The
format is that of https://huggingface.co/docs/safetensors; any of its libraries reads these files. Sizes and
offsets in a header are claims of whoever wrote it: all are checked against the bytes before anything is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from federation.base import describe
from federation.errors import BadPayload
from federation.layout import ITEM_BYTES, MOMENT_SUFFIXES, VARIANCE_SUFFIX, Layout, TensorSpec

MAX_HEADER_BYTES = 2 << 20
"""Room for some ten thousand tensors; parsing more would cost memory that a file has not earned."""
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 1 << 48
MAX_MAGNITUDE = 1e30
"""Of a float. Near float32's own limit of 3.4e38 the difference of two finite weights is infinite."""
METADATA = {"format": "fedqueue.v1"}

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Array = NDArray[np.float32] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The tensors of one file as two flat vectors."""

    layout: Layout
    flat: NDArray[np.float32]  # [W + 2S], a payload's up to [3W + 2S] (federation.layout)
    ints: NDArray[np.int64]  # [I]

    def __post_init__(self) -> None:
        for vector, dtype, count in (
            (self.flat, _DTYPES["F32"], self.layout.float_count),
            (self.ints, _DTYPES["I64"], self.layout.int_count),
        ):
            if vector.dtype != dtype or vector.shape != (count,) or not vector.flags.c_contiguous:
                raise ValueError(
                    f"a vector is {vector.dtype}{list(vector.shape)}, the layout needs contiguous {dtype}[{count}]"
                )

    def arrays(self) -> dict[str, Array]:
        """Every tensor by name, as a view of `flat` or `ints`: nothing is copied."""
        return {
            spec.name: (self.flat if spec.dtype == "F32" else self.ints)[part].reshape(spec.shape)
            for spec, part in _parts(self.layout)
        }


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> TensorFile:
    """Copy named arrays, float32 or int64 of any shape, into one TensorFile.

    Raises BadPayload ("layout") for another type, or a running mean without its variance.
    """
    specs = []
    for name, array in arrays.items():
        dtype = _NAMES.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise BadPayload(
                f"tensor {_short(name)} is {array.dtype}: convert it to float32 or int64, or leave it out",
                "layout",
            )
        specs.append(_spec(name, dtype, array.shape))
    return _collect(Layout.of(specs), arrays)


def encode(file: TensorFile) -> bytes:
    """The bytes of the file; equal tensors give equal bytes. The data is copied once."""
    entries: dict[str, object] = {"__metadata__": METADATA}
    at = 0
    for spec in file.layout.tensors:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (at, at + spec.nbytes),
        }
        at += spec.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode("ascii")
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise BadPayload(f"{len(file.layout.tensors)} tensors need too large a header", "malformed-header")
    return b"".join((struct.pack("<Q", len(header)), header, file.flat.data, file.ints.data))


def decode(
    data: bytes | bytearray | memoryview, expected: Layout | None = None, *, check_numbers: bool = True
) -> TensorFile:
    """Read a file whose layout must be `expected`, or without one, any file of F32 and I64 tensors.

    The vectors are views of `data` where the file is in canonical order, as it must be if a layout is expected;
    other files are copied into that order.

    Raises BadPayload: "truncated", "malformed-header", "layout" (a tensor is missing, too many, of another
    type, shape or place), "not-finite".
    """
    view = memoryview(data).cast("B")
    entries, block = _split(view)
    found = Layout(tensors=tuple(spec for spec, _ in entries))
    if expected is not None:
        difference = expected.difference(found)
        if difference:
            raise BadPayload(difference, "layout")
    canonical = Layout.of(found.tensors)
    if canonical.tensors == found.tensors:
        middle = 4 * canonical.float_count
        flat: NDArray[np.float32] = _vector(block[:middle], _DTYPES["F32"])
        ints: NDArray[np.int64] = _vector(block[middle:], _DTYPES["I64"])
        file = TensorFile(canonical, flat, ints)
    else:
        arrays = {
            spec.name: _vector(block[begin : begin + spec.nbytes], _DTYPES[spec.dtype]).reshape(spec.shape)
            for spec, begin in entries
        }
        file = _collect(canonical, arrays)
    if check_numbers:
        _check_numbers(file)
    return file


# --- the header ------------------------------------------------------------------------------------------


def _split(view: memoryview) -> tuple[list[tuple[TensorSpec, int]], memoryview]:
    """The tensors in the order of their data, each with its first byte's offset; and the data block."""
    if len(view) < 8:
        raise BadPayload(f"{len(view)} bytes are no safetensors file", "truncated")
    (header_bytes,) = struct.unpack_from("<Q", view)
    if header_bytes > MAX_HEADER_BYTES:
        raise BadPayload(
            f"the header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES}", "malformed-header"
        )
    if len(view) < 8 + header_bytes:
        raise BadPayload(f"the file ends after {len(view)} bytes, within its header", "truncated")
    header = _parse(bytes(view[8 : 8 + header_bytes]))
    header.pop("__metadata__", None)
    # stable: tensors without elements share an offset, and keep the order of the header
    entries = sorted(
        (_entry(name, entry) for name, entry in header.items()), key=lambda e: (e[1], e[0].nbytes)
    )
    block = view[8 + header_bytes :]
    at = 0
    for spec, begin in entries:
        if begin != at:
            raise BadPayload(
                f"tensor {_short(spec.name)} begins at byte {begin} of the data, must be {at}: the data has a "
                "gap or an overlap",
                "malformed-header",
            )
        at += spec.nbytes
    if at > len(block):
        raise BadPayload(f"the data has {len(block)} bytes, the header describes {at}", "truncated")
    if at < len(block):
        raise BadPayload(f"{len(block) - at} bytes follow the last tensor", "malformed-header")
    return entries, block


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_no_float
        )
    except RecursionError as exc:
        raise BadPayload("the header is nested too deeply", "malformed-header") from exc
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError are some
        raise BadPayload(f"the header is not JSON: {str(exc)[:200]}", "malformed-header") from exc
    assert isinstance(header, dict)  # it begins with "{"
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _no_float(text: str) -> float:
    raise ValueError(f"{text[:20]} is not a whole number")


def _entry(name: str, entry: object) -> tuple[TensorSpec, int]:
    """Check one tensor's description by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadPayload(f"tensor {_short(name)} must have dtype, shape and data_offsets", "malformed-header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise BadPayload(
            f"tensor {_short(name)}: shape and data_offsets must be lists of whole numbers ≥ 0",
            "malformed-header",
        )
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadPayload(
            f"tensor {_short(name)} is {_short(str(dtype))}; only F32 and I64 are exchanged", "layout"
        )
    if len(shape) > MAX_DIMENSIONS or prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise BadPayload(f"tensor {_short(name)} has an impossible shape", "malformed-header")
    spec = _spec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise BadPayload(
            f"tensor {_short(name)} has {spec.nbytes} bytes, its data_offsets span {offsets[1] - offsets[0]}",
            "malformed-header",
        )
    return spec, offsets[0]


def _are_sizes(value: object) -> bool:
    # the limit also keeps the product of a shape and every message about it short
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in value)


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    if name == "__metadata__":
        raise BadPayload("'__metadata__' cannot name a tensor", "layout")
    try:
        return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})
    except ValidationError as exc:
        raise BadPayload(f"tensor {_short(name)}: {describe(exc)}", "malformed-header") from exc


def _short(text: str) -> str:
    return ascii(text if len(text) <= 100 else text[:100] + "…")


# --- the data --------------------------------------------------------------------------------------------


def _parts(layout: Layout) -> Iterator[tuple[TensorSpec, slice]]:
    """Each tensor with its place in its vector, `flat` or `ints`."""
    at = {"F32": 0, "I64": 0}
    for spec in layout.tensors:
        yield spec, slice(at[spec.dtype], at[spec.dtype] + spec.size)
        at[spec.dtype] += spec.size


def _vector(block: memoryview, dtype: np.dtype[Any]) -> NDArray[Any]:
    vector = np.frombuffer(block, dtype)
    # an odd number of floats before them, or a foreign header of odd length, leaves numbers between addresses
    return vector if vector.flags.aligned else vector.copy()


def _collect(layout: Layout, arrays: Mapping[str, NDArray[Any]]) -> TensorFile:
    """Copy `arrays` into new vectors in the order of `layout`."""
    file = TensorFile(
        layout,
        np.empty(layout.float_count, _DTYPES["F32"]),
        np.empty(layout.int_count, _DTYPES["I64"]),
    )
    for name, view in file.arrays().items():
        view[...] = arrays[name]
    return file


def _check_numbers(file: TensorFile) -> None:
    """Raises BadPayload naming the first tensor with a number that no merge could digest.

    "not-finite": NaN or infinity. "out-of-range": beyond ±MAX_MAGNITUDE. "negative-variance".
    """
    if not file.flat.size:
        return
    # NaN and infinity propagate into both, which run many times faster than isfinite() of every number
    low, high = float(file.flat.min()), float(file.flat.max())
    layout = file.layout
    variances = file.flat[layout.float_count - layout.statistic_count :]
    squares = (
        file.flat[2 * layout.weight_count : 3 * layout.weight_count] if layout.moments == 2 else variances
    )
    positive = all(not part.size or part.min() >= 0 for part in (variances, squares))
    if low >= -MAX_MAGNITUDE and high <= MAX_MAGNITUDE and positive:
        return
    for name, array in file.arrays().items():
        if array.dtype != _DTYPES["F32"] or not array.size:
            continue
        if not np.isfinite(array).all():
            raise BadPayload(f"tensor {_short(name)} holds NaN or infinity", "not-finite")
        if np.abs(array).max() > MAX_MAGNITUDE:
            raise BadPayload(f"tensor {_short(name)} holds numbers beyond ±{MAX_MAGNITUDE:g}", "out-of-range")
        if name.endswith((VARIANCE_SUFFIX, MOMENT_SUFFIXES[1])) and array.min() < 0:
            raise BadPayload(f"tensor {_short(name)} holds a negative variance", "negative-variance")
