"""The canonical layout: order, counts, pairs of statistics, and differences in words."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from federation.errors import BadPayload
from federation.layout import ITEM_BYTES, Layout, TensorSpec, is_statistic


def f32(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="F32", shape=shape)


def i64(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="I64", shape=shape)


# the order is the protocol's: values by name; means by layer; variances by layer; integers by name
CANONICAL = [
    f32("a.weight", 2, 3),
    f32("b.bias", 4),
    f32("z.weight"),
    f32("a.bn.running_mean", 3),
    f32("bn.running_mean", 5),
    f32("a.bn.running_var", 3),
    f32("bn.running_var", 5),
    i64("a.bn.num_batches_tracked"),
    i64("anchors", 4),
    i64("bn.num_batches_tracked"),
]


def test_canonical_order_whatever_the_order_of_the_file() -> None:
    for seed in range(20):
        shuffled = list(CANONICAL)
        random.Random(seed).shuffle(shuffled)
        assert list(Layout.of(shuffled).tensors) == CANONICAL


def test_counts() -> None:
    layout = Layout.of(CANONICAL)
    assert layout.weight_count == 6 + 4 + 1
    assert layout.statistic_count == 3 + 5
    assert layout.float_count == 11 + 2 * 8
    assert layout.int_count == 1 + 4 + 1
    assert layout.nbytes == 4 * 27 + 8 * 6
    assert layout.counter_slices == (slice(0, 1), slice(5, 6))


def test_moments_lie_between_the_parameters_and_the_statistics() -> None:
    layout = Layout.of(CANONICAL)
    sent = layout.with_moments(2)
    names = [tensor.name for tensor in sent.tensors]
    parameters = ["a.weight", "b.bias", "z.weight"]
    moments = [name + suffix for suffix in (".exp_avg", ".exp_avg_sq") for name in parameters]
    assert names == parameters + moments + [tensor.name for tensor in CANONICAL[3:]]
    assert sent.parameters == layout.parameters
    assert (layout.moments, sent.moments, layout.with_moments(1).moments) == (0, 2, 1)
    assert sent.weight_count == layout.weight_count == 11
    assert sent.float_count == layout.float_count + 22
    assert layout.with_moments(0) == layout


@pytest.mark.parametrize(
    "odd",
    [
        [f32("z.weight.exp_avg")],
        [f32("a.weight.exp_avg", 2, 3), f32("b.bias.exp_avg", 4), f32("z.weight.exp_avg", 1)],
        [f32("a.weight.exp_avg_sq", 2, 3), f32("b.bias.exp_avg_sq", 4), f32("z.weight.exp_avg_sq")],
        [f32("other.exp_avg", 3)],
    ],
    ids=["of one", "of another shape", "second without first", "of nothing"],
)
def test_moments_of_some_parameters_alone_are_refused(odd: list[TensorSpec]) -> None:
    with pytest.raises(BadPayload, match="a moment is of every parameter"):
        Layout.of([*CANONICAL, *odd])


def test_means_and_variances_of_a_layer_have_the_same_place_in_their_blocks() -> None:
    """Even where the names sort differently with their suffixes: "a" < "a.b", but "a.running" > "a.b.running"."""
    layers = ["a", "a.b", "a-b", "a0", "a.running_mean_x", "A", "ä"]
    specs = [
        f32(f"{layer}.running_{kind}", n + 1) for n, layer in enumerate(layers) for kind in ("mean", "var")
    ]
    names = [t.name for t in Layout.of(specs).tensors]
    half = len(layers)
    means = [name.removesuffix(".running_mean") for name in names[:half]]
    variances = [name.removesuffix(".running_var") for name in names[half:]]
    assert means == variances == sorted(layers)


@st.composite
def spec_lists(draw: st.DrawFn) -> list[TensorSpec]:
    layers = draw(st.lists(st.text("ab.0é", min_size=1, max_size=6), max_size=6, unique=True))
    specs: list[TensorSpec] = []
    for layer in layers:
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        kind = draw(st.sampled_from(["weight", "norm", "integer"]))
        if kind == "norm":
            specs += [f32(f"{layer}.running_mean", *shape), f32(f"{layer}.running_var", *shape)]
            specs.append(i64(f"{layer}.num_batches_tracked"))
        elif kind == "weight":
            specs.append(f32(f"{layer}.weight", *shape))
        else:
            specs.append(i64(f"{layer}.index", *shape))
    return draw(st.permutations(specs))


@given(spec_lists())
def test_blocks_follow_each_other(specs: list[TensorSpec]) -> None:
    """flat[0:W] values, flat[W:W+S] means, flat[W+S:W+2S] variances, then the integers."""
    layout = Layout.of(specs)
    assert Layout.of(reversed(specs)) == layout
    at = 0
    for tensor in layout.tensors:
        if tensor.dtype == "I64":
            assert at == layout.float_count
            continue
        if tensor.name.endswith(".running_mean"):
            block = (layout.weight_count, layout.weight_count + layout.statistic_count)
        elif tensor.name.endswith(".running_var"):
            block = (layout.weight_count + layout.statistic_count, layout.float_count)
        else:
            block = (0, layout.weight_count)
        assert block[0] <= at
        at += tensor.size
        assert at <= block[1]
    assert at == layout.float_count
    assert layout.nbytes == 4 * layout.float_count + 8 * layout.int_count
    assert sum(s.stop - s.start for s in layout.counter_slices) == len(layout.counter_slices)


@given(spec_lists())
def test_json_round_trip(specs: list[TensorSpec]) -> None:
    layout = Layout.of(specs)
    assert layout.weight_count >= 0  # a cached number must not make two layouts differ
    assert Layout.from_json(layout.to_json()) == layout


def test_empty_layout() -> None:
    layout = Layout.of([])
    assert (layout.float_count, layout.int_count, layout.nbytes, layout.counter_slices) == (0, 0, 0, ())


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([f32("a"), f32("a")], "'a' is there twice"),
        ([f32("a"), i64("a")], "'a' is there twice"),
        ([f32("n.running_mean", 3)], "'n.running_mean' needs 'n.running_var'"),
        ([f32("n.running_var", 3)], "'n.running_var' needs 'n.running_mean'"),
        ([f32("n.running_mean", 3), f32("n.running_var", 4)], "same type and shape"),
        ([f32("n.running_mean", 3), f32("n.running_var", 3, 1)], "same type and shape"),
        ([f32("n.running_mean", 3), i64("n.running_var", 3)], "same type and shape"),
        ([f32("n.running_mean", 3), f32("m.running_var", 3)], "same type and shape"),
    ],
)
def test_layouts_that_cannot_be_merged(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(BadPayload, match=message) as info:
        Layout.of(specs)
    assert info.value.reason == "layout"


@pytest.mark.parametrize(
    "wrong",
    [
        '{"name": "a", "dtype": "F32", "shape": [-1]}',
        '{"name": "a", "dtype": "F32", "shape": [-2, -3]}',
        '{"name": "a", "dtype": "F32", "shape": [2.0]}',
        '{"name": "a", "dtype": "F32", "shape": ["2"]}',
        '{"name": "a", "dtype": "F32", "shape": [true]}',
        '{"name": "a", "dtype": "F32"}',
        '{"name": "a", "dtype": "F16", "shape": []}',
        '{"name": "a", "dtype": "f32", "shape": []}',
        '{"name": "", "dtype": "F32", "shape": []}',
        '{"name": "a", "dtype": "F32", "shape": [], "data_offsets": [0, 4]}',
    ],
)
def test_specs_that_are_no_tensor(wrong: str) -> None:
    with pytest.raises(BadPayload):
        TensorSpec.from_json(wrong, BadPayload)


def test_sizes() -> None:
    assert f32("a").size == 1
    assert f32("a", 0, 7).size == 0
    assert i64("a", 2, 3).nbytes == 48
    assert ITEM_BYTES == {"F32": 4, "I64": 8}


def test_difference_is_empty_for_the_same() -> None:
    assert Layout.of(CANONICAL).difference(Layout.of(reversed(CANONICAL))) == ""


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([f32("a", 2)], "tensor 'b' is missing"),
        ([f32("a", 2), f32("b", 3), f32("c", 1)], "tensor 'c' is not part of this model"),
        ([i64("a", 2), f32("b", 3)], "tensor 'a' is I64, must be F32"),
        ([f32("a", 3), f32("b", 3)], r"tensor 'a' has shape \(3,\), must have \(2,\)"),
        ([f32("a", 2, 1), f32("b", 3)], r"tensor 'a' has shape \(2, 1\), must have \(2,\)"),
    ],
)
def test_difference_in_words(theirs: list[TensorSpec], message: str) -> None:
    mine = Layout.of([f32("a", 2), f32("b", 3)])
    assert re.fullmatch(message, mine.difference(Layout.of(theirs)))


def test_a_file_in_another_order_differs() -> None:
    mine = Layout.of([f32("a", 2), f32("b", 2)])
    other = Layout(tensors=(f32("b", 2), f32("a", 2)))
    assert "canonical order" in mine.difference(other)


@given(spec_lists(), spec_lists())
def test_difference_is_empty_only_for_equals(a: list[TensorSpec], b: list[TensorSpec]) -> None:
    first, second = Layout.of(a), Layout.of(b)
    assert (first.difference(second) == "") == (first == second)
    assert (first.difference(second) == "") == (second.difference(first) == "")


def test_statistics_are_recognised_by_their_names() -> None:
    assert is_statistic("a.running_mean")
    assert is_statistic("a.running_var")
    assert not is_statistic("a.running_means")
    assert not is_statistic("running.weight")


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        f32("a").shape = (1,)  # type: ignore[misc]
