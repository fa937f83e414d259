"""Dealing out images: every image at one site, no site empty, the same seed the same split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detection.annotations import Picture
from detection.split import BACKGROUND, Split, by_device, devices, dirichlet, iid, label_skew, labels_of
from federation.errors import BadDataset

Contents = list[list[str]]
contents = st.lists(st.lists(st.sampled_from("abcde"), max_size=4), min_size=1, max_size=60)
sites = st.integers(1, 12)
seeds = st.integers(0, 2**31)
alphas = st.sampled_from([1e-12, 1e-3, 0.1, 1.0, 1e3, 1e12])


def whole(split: Split, images: int, sites: int) -> None:
    assert len(split) == sites
    assert all(split), "no site is empty"
    assert sorted(i for own in split for i in own) == list(range(images))
    assert all(own == sorted(own) for own in split)


@given(contents, sites, seeds, alphas)
def test_dirichlet_deals_everything_out_once(what: Contents, n: int, seed: int, alpha: float) -> None:
    if len(what) < n:
        with pytest.raises(BadDataset, match="too few for"):
            dirichlet(what, n, alpha, seed)
        return
    split = dirichlet(what, n, alpha, seed)
    whole(split, len(what), n)
    assert split == dirichlet(what, n, alpha, seed)


@given(contents, sites, seeds, st.integers(1, 3))
def test_label_skew_deals_everything_out_once(what: Contents, n: int, seed: int, shards: int) -> None:
    if len(what) < n * shards:
        with pytest.raises(BadDataset, match="too few for"):
            label_skew(what, n, seed, shards)
        return
    split = label_skew(what, n, seed, shards)
    whole(split, len(what), n)
    assert split == label_skew(what, n, seed, shards)


@given(st.integers(1, 200), sites, seeds)
def test_iid_deals_everything_out_once_and_evenly(images: int, n: int, seed: int) -> None:
    if images < n:
        with pytest.raises(BadDataset, match="too few for"):
            iid(images, n, seed)
        return
    split = iid(images, n, seed)
    whole(split, images, n)
    assert max(map(len, split)) - min(map(len, split)) <= 1


@given(st.lists(st.integers(1, 8), min_size=1, max_size=60), sites)
def test_a_device_is_at_one_site(names: list[int], n: int) -> None:
    if len(set(names)) < n:
        with pytest.raises(BadDataset, match="too few for"):
            by_device(names, n)
        return
    split = by_device(names, n)
    whole(split, len(names), n)
    owners = [{names[i] for i in own} for own in split]
    assert sum(map(len, owners)) == len(set(names))


def test_as_many_sites_as_devices_keeps_their_order() -> None:
    assert by_device([10, 9, 2, 9, 10, 10], 3) == [[2], [1, 3], [0, 4, 5]]
    assert by_device(["10", "gate", "9"], 3) == [[2], [0], [1]]


def test_sites_of_devices_are_about_equal() -> None:
    assert [len(own) for own in by_device([1] * 10 + [2] * 6 + [3] * 5 + [4], 2)] == [11, 11]


def test_other_seeds_deal_otherwise() -> None:
    what = [[name] for name in "abcd" * 20]
    for rule in (
        lambda seed: iid(80, 4, seed),
        lambda seed: dirichlet(what, 4, 1.0, seed),
        lambda seed: label_skew(what, 4, seed),
    ):
        assert rule(1) != rule(2)


def skew(split: Split, what: Sequence[Sequence[str]]) -> float:
    """Mean over the classes of the largest share that one site has: 1 is all at one site, 1/N is even."""
    labels = labels_of(what)
    return float(
        np.mean(
            [
                max(sum(labels[i] == name for i in own) for own in split) / count
                for name, count in Counter(labels).items()
            ]
        )
    )


def test_alpha_says_how_skewed() -> None:
    what = [[name] for name in "abcdefgh" * 50]
    means = [np.mean([skew(dirichlet(what, 4, a, seed), what) for seed in range(10)]) for a in (0.01, 1, 1e6)]
    assert means[0] > 0.95
    assert 0.4 < means[1] < 0.7
    assert means[2] == pytest.approx(0.25, abs=0.01)


def test_label_skew_gives_a_site_few_classes() -> None:
    what = [[name] for name in "abcdefghij" * 20]
    split = label_skew(what, 5, seed=3, shards=2)
    assert {len({what[i][0] for i in own}) for own in split} <= {1, 2}
    assert [len(own) for own in split] == [40] * 5


def test_an_image_goes_by_its_rarest_class() -> None:
    what = [["car", "car", "bus"], ["car"], ["bus", "bike"], [], ["car", "bus"], ["cab", "bike"]]
    # boxes: car 4, bus 3, bike 2, cab 1
    assert labels_of(what) == ["bus", "car", "bike", BACKGROUND, "bus", "cab"]
    assert labels_of([["b", "a"]]) == ["a"], "ties go by name"


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_above_zero(alpha: float) -> None:
    with pytest.raises(BadDataset, match="alpha must be above 0"):
        dirichlet([["a"]] * 5, 2, alpha, 0)


def test_images_without_a_device_are_refused() -> None:
    with pytest.raises(BadDataset, match="1 of 3 images name no device"):
        by_device([1, None, 2], 2)


def picture(name: str = "a.jpg", **fields: str | int) -> Picture:
    return Picture(name, 1, 1, (), fields)


def test_the_field_that_names_the_device() -> None:
    assert devices([picture(device=3, night=1), picture()]) == [3, None]
    assert devices([picture(device=3, night=1)], "night") == [1]
    assert devices([picture("north/1.jpg"), picture("south/1.jpg")]) == ["north", "south"]
    assert devices([picture("north/1.jpg", device=3), picture("south/1.jpg")], "folder") == ["north", "south"]
    with pytest.raises(BadDataset, match="choose with --device-field: device20, device5"):
        devices([picture(device5=1, device20=2)])
    with pytest.raises(BadDataset, match="has a field 'camera'; there are: device, folder"):
        devices([picture(device=1)], "camera")
    with pytest.raises(BadDataset, match="name no device"):
        devices([picture(), picture("b.jpg")])
