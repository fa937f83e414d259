"""Code that is not ours, found by name: docs/custom-models.md.

A job is written by another company, so a name in it must never make this machine import what its operator did
not choose. Two things are a choice: installing a package that registers an entry point in one of the groups
below, and listing an import path `package.module:attribute` in the setting `plugins`. `find` knows nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from federation.errors import BadSettings

ARCHITECTURES = "fedqueue.architectures"
"""Factories of detectors: (num_classes, image_size) -> torch.nn.Module."""
TRAINERS = "fedqueue.trainers"
"""Objects with train(weights, plan) -> (weights, num_examples, metrics), or what makes one when called."""

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_allowed: frozenset[str] = frozenset()


def is_path(name: str) -> bool:
    """True for `package.module:attribute`."""
    return _PATH.fullmatch(name) is not None


def allow(paths: Iterable[str]) -> None:
    """From now on `find` imports these paths, and no others. Called where a process reads its settings."""
    global _allowed
    _allowed = frozenset(paths)


def names(group: str) -> list[str]:
    """What `find` can find: installed entry points, and the allowed import paths, whatever they lead to."""
    return sorted({point.name for point in entry_points(group=group)} | _allowed)


def find(group: str, name: str) -> Any | None:
    """The object that a *job* names, or None if nobody here chose it. Raises BadSettings if it cannot be imported."""
    return load(group, name) if name in names(group) else None


def load(group: str, name: str) -> Any:
    """The object that this machine's *own settings* name: an entry point, or any import path.

    Raises BadSettings if there is none, or more than one, or its code cannot be imported.
    """
    points = list(entry_points(group=group, name=name))
    if len(points) > 1:
        where = ", ".join(sorted(point.dist.name if point.dist else point.value for point in points))
        raise BadSettings(f"{name!r} is registered by several packages ({where}): uninstall all but one")
    if not points and not is_path(name):
        known = ", ".join(point.name for point in entry_points(group=group)) or "none"
        raise BadSettings(
            f"there is no {name!r}: name an installed entry point of group {group} (there are: {known}) "
            "or an import path package.module:attribute"
        )
    point = points[0] if points else EntryPoint(name, name, group)
    try:
        return point.load()
    except Exception as exc:  # whatever somebody else's module does when it is imported
        raise BadSettings(f"{point.value} cannot be imported: {type(exc).__name__}: {exc}") from exc
