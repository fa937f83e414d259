"""Dealing one data set out to several sites, to try a federation before there is one.

Pure functions of what is in the images and a seed. Each returns, for every site, the indices of its images in ascending
order; every image is at exactly one site and every site has at least one, or BadDataset says why that cannot be.

An image holds objects of several classes, but is dealt out as one thing. Where a rule needs its class, that is the one
of its classes that has the fewest boxes in the whole data set, because the rare classes are what a skewed split is
about; ties go to the name that sorts first. Images without boxes are a class of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detection.annotations import Picture
from federation.errors import BadDataset

Split = list[list[int]]
FOLDER = "folder"
"""Stands for the folder of an image, as cameras often have one each."""
BACKGROUND = ""
"""The class of an image without boxes."""


def devices(pictures: Sequence[Picture], field: str | None = None) -> list[str | int | None]:
    """The device of each picture: its field `field`, or its folder for "folder".

    Without `field` the one field whose name begins with "device", else the folder. Raises BadDataset naming the fields
    if there are several such, or none of that name.
    """
    fields = sorted({key for picture in pictures for key in picture.fields})
    if field is None:
        named = [key for key in fields if key.startswith("device")]
        if len(named) > 1:
            raise BadDataset(
                f"several fields may name the device: choose with --device-field: {', '.join(named)}"
            )
        field = named[0] if named else FOLDER
    if field in fields:
        return [picture.fields.get(field) for picture in pictures]
    if field != FOLDER:
        raise BadDataset(f"no image has a field {field!r}; there are: {', '.join([*fields, FOLDER])}")
    folders = [picture.name.rpartition("/")[0] for picture in pictures]
    if len(set(folders)) == 1:
        raise BadDataset(
            "the images name no device: no field begins with 'device', and all lie in one folder"
        )
    return list(folders)


def by_device(devices: Sequence[str | int | None], sites: int) -> Split:
    """All images of a device are at the same site.

    Sites of about equal size: the device with the most images left goes to the site with the fewest. Sites come in the
    order of their devices.
    """
    counts = Counter(device for device in devices if device is not None)
    unknown = sum(device is None for device in devices)
    if unknown:
        raise BadDataset(f"{unknown} of {len(devices)} images name no device: they cannot be split by device")
    if len(counts) < sites:
        raise BadDataset(f"there are {len(counts)} devices, which are too few for {sites} sites")
    order = sorted(counts, key=_natural)
    groups: list[list[str | int]] = [[] for _ in range(sites)]
    for device in sorted(order, key=lambda d: -counts[d]):
        min(groups, key=lambda group: sum(counts[d] for d in group)).append(device)
    groups.sort(key=lambda group: min(order.index(device) for device in group))
    site_of = {device: site for site, group in enumerate(groups) for device in group}
    return _collect([site_of[device] for device in devices if device is not None], sites)


def iid(images: int, sites: int, seed: int) -> Split:
    """A random permutation, cut into parts that differ by one image at most."""
    _require_enough(images, sites)
    order = np.random.default_rng(seed).permutation(images)
    return [sorted(part.tolist()) for part in np.array_split(order, sites)]


def dirichlet(contents: Sequence[Sequence[str]], sites: int, alpha: float, seed: int) -> Split:
    """For each class, the sites' shares of its images are drawn from a symmetric Dirichlet(α).

    A small α gives each class to one site, a large one gives everyone the same; sizes differ, too. A site that drew
    nothing gets an image of the largest site. `contents[i]`: the class of each box of image i.

    Yurochkin et al. 2019, arXiv 1905.12022, §4. The Dirichlet split of Hsu et al. 2019, arXiv 1909.06335, draws for
    each site its shares of the classes instead and makes all sites equally large; that takes many sites: among three,
    most images are then of classes that no site has drawn, and go to anyone.
    """
    _require_enough(len(contents), sites)
    if not 0 < alpha < float("inf"):
        raise BadDataset(f"alpha must be above 0, is {alpha:g}")
    rng = np.random.default_rng(seed)
    labels = labels_of(contents)
    split: Split = [[] for _ in range(sites)]
    for name in sorted(set(labels)):
        images = rng.permutation([i for i, label in enumerate(labels) if label == name])
        cuts = (np.cumsum(_shares(rng, sites, alpha)) * len(images)).round().astype(int)[:-1]
        for own, part in zip(split, np.split(images, cuts), strict=True):
            own += part.tolist()
    for own in split:
        if not own:
            own.append(max(split, key=len).pop())
    return [sorted(own) for own in split]


def _shares(rng: np.random.Generator, sites: int, alpha: float) -> NDArray[np.float64]:
    """A draw from Dirichlet(α), which below about 0.001 underflows to nothing: then one site, at random, has it all."""
    shares = rng.dirichlet([alpha] * sites)
    return shares if np.isfinite(shares).all() and shares.sum() > 0.5 else np.eye(sites)[rng.integers(sites)]


def label_skew(contents: Sequence[Sequence[str]], sites: int, seed: int, shards: int = 2) -> Split:
    """Images sorted by class are cut into `shards` equal pieces a site, and dealt out at random.

    So most sites hold about `shards` classes. McMahan et al. 2017, arXiv 1602.05629, §3. `contents[i]`: the class of
    each box of image i.
    """
    _require_enough(len(contents), sites * shards, f"{sites} sites of {shards} shards")
    rng = np.random.default_rng(seed)
    labels = labels_of(contents)
    shuffled = rng.permutation(len(labels)).tolist()
    pieces = np.array_split(sorted(shuffled, key=lambda i: labels[i]), sites * shards)
    dealt = rng.permutation(len(pieces)).reshape(sites, shards)
    return [sorted(int(i) for piece in own for i in pieces[piece]) for own in dealt]


def labels_of(contents: Sequence[Sequence[str]]) -> list[str]:
    """The class by which each image is dealt out: its rarest; BACKGROUND for one without boxes."""
    boxes = Counter(name for content in contents for name in content)
    return [min(content, key=lambda name: (boxes[name], name), default=BACKGROUND) for content in contents]


def _require_enough(images: int, needed: int, what: str = "") -> None:
    if images < needed:
        raise BadDataset(f"{images} images are too few for {what or f'{needed} sites'}: some would have none")


def _collect(owner: Sequence[int], sites: int) -> Split:
    split: Split = [[] for _ in range(sites)]
    for index, site in enumerate(owner):
        split[site].append(index)
    return split


def _natural(device: str | int) -> tuple[int, int, str]:
    """Numbers by their value, before texts."""
    text = str(device)
    return (0, int(text), "") if text.isascii() and text.isdigit() else (1, 0, text)
