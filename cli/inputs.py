"""Which files a command that reads images is meant to read: files, folders, globs, also in quotes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Input:
    """A file, and its name below the folder that all inputs share, with "/": no two have the same one."""

    path: Path
    name: str


def find_inputs(arguments: Sequence[str], skip: Path) -> tuple[list[Input], list[str]]:
    """The files that `arguments` name, each once, in their order, and the arguments that name none.

    A folder stands for the images in it and below, by suffix, without hidden ones; a glob for what it matches ("**"
    for any number of folders). In both what lies below `skip` is left out. Any other file is taken as it is named.
    """
    files: dict[Path, None] = {}
    bases: list[str] = []
    nothing: list[str] = []
    skipped = Path(os.path.abspath(skip))
    for argument in arguments:
        base, found = _expand(os.path.expanduser(argument), skipped)
        before = len(files)
        named = list(found)
        files.update(dict.fromkeys(named))
        if not named:
            nothing.append(argument)
        elif len(files) > before:
            bases += base or [str(path.parent) for path in named]
    if not files:
        return [], nothing
    shared = os.path.commonpath(bases)
    return [Input(path, path.relative_to(shared).as_posix()) for path in files], nothing


def _expand(argument: str, skipped: Path) -> tuple[list[str], Iterable[Path]]:
    """The folder that names are to begin in, if the argument is one, and its files, absolute."""
    path = Path(os.path.abspath(argument))
    if path.is_dir():
        return [str(path)], _images_below(path, skipped)
    if path.exists():
        return [], [path]
    matches = (Path(os.path.abspath(match)) for match in sorted(glob.glob(argument, recursive=True)))
    return [], [file for match in matches for file in _matched(match, skipped)]


def _matched(path: Path, skipped: Path) -> Iterator[Path]:
    if path.is_dir():
        # "**" gives a folder and each file in it; a folder's images are taken once
        yield from _images_below(path, skipped)
    elif not path.is_relative_to(skipped):
        yield path


def _images_below(folder: Path, skipped: Path) -> Iterator[Path]:
    from detection.images import SUFFIXES

    for root, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and Path(root, n) != skipped)
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)
