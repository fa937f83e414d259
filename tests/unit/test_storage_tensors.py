"""Tensor files: canonical layout, interoperability with the safetensors library, and hostile bytes."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import BadPayload
from federation.layout import Layout
from storage.tensors import MAX_HEADER_BYTES, MAX_MAGNITUDE, TensorFile, decode, encode, from_arrays

MODEL: dict[str, np.ndarray[Any, Any]] = {
    "head.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bn.weight": np.array([1.5], np.float32),
    "bn.running_var": np.array([4.0], np.float32),
    "bn.running_mean": np.array([-2.0], np.float32),
    "bn.num_batches_tracked": np.array(2**40 + 1, np.int64),
    "scalar": np.array(0.25, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def refused(data: bytes, expected: Layout | None = None) -> BadPayload:
    with pytest.raises(BadPayload) as caught:
        decode(data, expected)
    assert str(caught.value)
    return caught.value


def file_of(header: object, block: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + block


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_model_survives() -> None:
    file = from_arrays(MODEL)
    again = decode(encode(file), file.layout)
    assert again.layout == file.layout
    assert again.arrays().keys() == MODEL.keys()
    for name, array in again.arrays().items():
        np.testing.assert_array_equal(array, MODEL[name], strict=True)


def test_the_vectors_are_in_canonical_order() -> None:
    file = from_arrays(MODEL)
    assert [t.name for t in file.layout.tensors] == [
        *("bn.weight", "empty", "head.weight", "scalar"),
        *("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
    ]
    assert file.flat.tolist() == [1.5, 0, 1, 2, 3, 4, 5, 0.25, -2.0, 4.0]
    assert file.ints.tolist() == [2**40 + 1]


def test_the_bytes_are_those_of_the_protocol() -> None:
    data = encode(from_arrays({"b": np.array([1.0], np.float32), "a": np.array([7], np.int64)}))
    header = (
        b'{"__metadata__":{"format":"fedqueue.v1"},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}}'
    )
    (n,) = struct.unpack_from("<Q", data)
    assert n % 8 == 0
    assert data[8 : 8 + n] == header.ljust(n)
    assert data[8 + n :] == struct.pack("<fq", 1.0, 7)


def test_equal_tensors_give_equal_bytes() -> None:
    assert encode(from_arrays(MODEL)) == encode(from_arrays(dict(reversed(MODEL.items()))))


def test_nothing_is_copied_on_reading() -> None:
    data = encode(from_arrays({"w": np.ones(1000, np.float32), "n": np.ones(2, np.int64)}))
    file = decode(data)
    owner = np.frombuffer(data, np.uint8)
    assert np.shares_memory(file.flat, owner)
    assert np.shares_memory(file.ints, owner)
    assert np.shares_memory(file.arrays()["w"], owner)


def test_optimiser_state_goes_the_same_way() -> None:
    state = {"m": np.array([1.0, 2.0], np.float32), "v": np.array([3.0, 4.0], np.float32)}
    arrays = decode(encode(from_arrays(state))).arrays()
    assert {name: array.tolist() for name, array in arrays.items()} == {"m": [1, 2], "v": [3, 4]}


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.bool_])
def test_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(BadPayload, match="convert it to float32 or int64"):
        from_arrays({"x": np.zeros(2, dtype)})


def test_any_strides_and_byte_order_can_be_collected() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4).T[::2]
    np.testing.assert_array_equal(from_arrays({"x": array}).arrays()["x"], array.astype("<f4"), strict=True)


def test_vectors_that_do_not_fit_the_layout_are_a_mistake() -> None:
    layout = from_arrays(MODEL).layout
    with pytest.raises(ValueError, match="the layout needs"):
        TensorFile(layout, np.zeros(3, np.float32), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="the layout needs"):
        TensorFile(layout, np.zeros(10, np.float64), np.zeros(1, np.int64))


# --- the safetensors library -------------------------------------------------------------------------------


def test_the_safetensors_library_reads_ours() -> None:
    theirs = safetensors.numpy.load(encode(from_arrays(MODEL)))
    assert theirs.keys() == MODEL.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, MODEL[name], strict=True)


def test_we_read_what_the_safetensors_library_writes() -> None:
    data = safetensors.numpy.save(MODEL, {"format": "pt"})
    file = decode(data)
    assert file.layout == from_arrays(MODEL).layout
    for name, array in file.arrays().items():
        np.testing.assert_array_equal(array, MODEL[name], strict=True)
    error = refused(data, file.layout)  # I64 first, as that library sorts: not what an update may look like
    assert error.reason == "layout"
    assert "canonical order" in str(error)


# --- what is refused -----------------------------------------------------------------------------------------


def test_every_truncation_is_noticed() -> None:
    data = encode(from_arrays(MODEL))
    for length in range(len(data)):
        assert refused(data[:length]).reason == "truncated"
    assert refused(data + b"\0").reason == "malformed-header"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("scalar"), "'scalar' is missing"),
        (lambda m: m.update(more=np.zeros(1, np.float32)), "'more' is not part of this model"),
        (lambda m: m.update(scalar=np.zeros(1, np.float32)), r"'scalar' has shape \(1,\), must have \(\)"),
        (lambda m: m.update(scalar=np.zeros((), np.int64)), "'scalar' is I64, must be F32"),
    ],
)
def test_another_layout_is_named(change: Any, message: str) -> None:
    model = dict(MODEL)
    change(model)
    with pytest.raises(BadPayload, match=message) as caught:
        decode(encode(from_arrays(model)), from_arrays(MODEL).layout)
    assert caught.value.reason == "layout"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "malformed-header"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "malformed-header"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (file_of(b""), "malformed-header"),
        (file_of(b"[]"), "malformed-header"),
        (file_of(b" {}"), "malformed-header"),
        (file_of(b'{"a"'), "malformed-header"),
        (file_of(b'{"\xff": 1}'), "malformed-header"),
        (file_of(b'{"a":' + b"[" * 100_000), "malformed-header"),
        (file_of(b'{"a":' * 100_000), "malformed-header"),
        (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "malformed-header"),
        (file_of(b'{"a":NaN}'), "malformed-header"),
        (file_of({"a": 1}), "malformed-header"),
        (file_of({"a": []}), "malformed-header"),
        (file_of({"a": {}}), "malformed-header"),
        (file_of({"a": {**entry([1], 0, 4), "more": 1}}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([-1], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([1.0], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([True], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry(["1"], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([2**64], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([2**32, 2**32, 0], 0, 0)}), "malformed-header"),
        (file_of({"a": entry([2**31, 2**31], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([1] * 100, 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([1], 0, 8)}, bytes(8)), "malformed-header"),
        (file_of({"a": entry([1], 4, 0)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([1], -4, 0)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([1], 4, 8)}, bytes(8)), "malformed-header"),
        (file_of({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "malformed-header"),
        (file_of({"a": entry([2**40], 0, 2**42)}, bytes(4)), "truncated"),
        (file_of({"a": entry([1], 0, 4)}, bytes(5)), "malformed-header"),
        (file_of({"a" * 513: entry([1], 0, 4)}, bytes(4)), "malformed-header"),
        (file_of({"": entry([1], 0, 4)}, bytes(4)), "malformed-header"),
        (
            file_of(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
            "malformed-header",
        ),
        (
            file_of(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                bytes(4),
            ),
            "malformed-header",
        ),
        (file_of({"a": entry([1], 0, 2, "F16")}, bytes(2)), "layout"),
        (file_of({"a": entry([1], 0, 4, "nonsense" * 1000)}, bytes(4)), "layout"),
        (file_of({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), "layout"),
        (file_of({"bn.running_mean": entry([1], 0, 4)}, bytes(4)), "layout"),
    ],
)
def test_a_hostile_file_is_refused(data: bytes, reason: str) -> None:
    error = refused(data)
    assert error.reason == reason
    assert len(str(error)) < 500


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(bad: float) -> None:
    model = {**MODEL, "head.weight": np.array([[0, 1, 2], [3, bad, 5]], np.float32)}
    data = encode(from_arrays(model))
    error = refused(data)
    assert error.reason == "not-finite"
    assert "'head.weight'" in str(error)
    assert np.isnan(decode(data, check_numbers=False).flat).any() == np.isnan(bad)


def test_infinities_that_cancel_are_noticed() -> None:
    assert refused(encode(from_arrays({"x": np.array([np.inf, -np.inf], np.float32)}))).reason == "not-finite"


def test_numbers_that_no_merge_could_digest_are_refused() -> None:
    largest = np.full(100, MAX_MAGNITUDE, np.float32) * np.float32(0.999)
    assert decode(encode(from_arrays({"x": largest}))).flat[0] == largest[0]
    for beyond in (np.finfo(np.float32).max, -np.finfo(np.float32).max):
        with pytest.raises(BadPayload, match=r"'x'.*beyond") as caught:
            decode(encode(from_arrays({"x": np.array([0, beyond], np.float32)})))
        assert caught.value.reason == "out-of-range"


def test_a_negative_variance_is_refused() -> None:
    layer = {"n.running_mean": np.zeros(3, np.float32), "n.running_var": np.array([1, -1e-6, 1], np.float32)}
    with pytest.raises(BadPayload, match=r"n\.running_var") as caught:
        decode(encode(from_arrays(layer)))
    assert caught.value.reason == "negative-variance"


def test_a_negative_second_moment_is_refused() -> None:
    """Other sites would take its root."""
    moments = {"w.exp_avg": np.array([-1, 2], np.float32), "w.exp_avg_sq": np.array([1, 2], np.float32)}
    tensors = {"w": np.zeros(2, np.float32), "n.running_mean": np.zeros(1, np.float32)} | moments
    tensors["n.running_var"] = np.ones(1, np.float32)
    assert decode(encode(from_arrays(tensors))).layout.moments == 2
    tensors["w.exp_avg_sq"][1] = -1e-9
    with pytest.raises(BadPayload, match=r"w\.exp_avg_sq") as caught:
        decode(encode(from_arrays(tensors)))
    assert caught.value.reason == "negative-variance"


def test_numbers_between_addresses_are_read() -> None:
    """A foreign header may have any length, and an odd number of floats leaves the integers unaligned."""
    header = {"b": entry([3], 0, 12), "a": entry([1], 12, 20, "I64")}
    for pad in range(8):
        data = file_of(json.dumps(header).encode() + b" " * pad, struct.pack("<fffq", 1, 2, 3, 4))
        file = decode(data)
        assert (file.flat.tolist(), file.ints.tolist()) == ([1, 2, 3], [4])
        assert file.flat.flags.aligned
        assert file.ints.flags.aligned


VALID = encode(from_arrays(MODEL))
HEADER_END = 8 + struct.unpack_from("<Q", VALID)[0]


def _check_any(data: bytes) -> None:
    for expected in (None, from_arrays(MODEL).layout):
        try:
            decode(data, expected)
        except BadPayload as exc:
            reason = exc.reason
        else:
            continue
        assert reason in ("truncated", "malformed-header", "layout", "not-finite")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.binary(min_size=1, max_size=4)), max_size=6))
def test_a_corrupt_header_raises_nothing_but_bad_payload(edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(VALID)
    for at, patch in edits:
        data[at : at + len(patch)] = patch
    _check_any(bytes(data))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I64", "F16", "", None]),
                "shape": st.lists(st.one_of(st.integers(-1, 3), st.integers(), st.booleans()), max_size=4),
                "data_offsets": st.lists(st.one_of(st.integers(-1, 40), st.integers()), max_size=3),
            }
        ),
        max_size=4,
    ),
    st.binary(max_size=40),
)
def test_any_header_raises_nothing_but_bad_payload(header: dict[str, object], block: bytes) -> None:
    _check_any(file_of(header, block))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(ANY_JSON)
def test_any_json_raises_nothing_but_bad_payload(header: object) -> None:
    _check_any(file_of(header))
    _check_any(file_of({"a": header}))
