"""Reading and writing the text files of annotations, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from federation.errors import BadDataset


def read_bytes(path: Path) -> bytes:
    """Raises BadDataset if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise BadDataset(f"{path}: cannot be read: {exc.strerror}") from exc


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte-order mark. Raises BadDataset."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise BadDataset(f"{path}: is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc


def read_json(path: Path) -> Any:
    """Raises BadDataset."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as exc:
        raise BadDataset(f"{path}: is not JSON: {exc}") from exc


def write_text(path: Path, text: str) -> Path:
    """Write a new file, making its folder; an existing file is an error, because it may be somebody's labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as exc:
        raise BadDataset(f"{path}: is there already: choose an empty folder") from exc
    return path


def same_stem(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of pictures that differ in their suffix alone, and so would have the same label file."""
    seen: dict[str, str] = {}
    pairs = []
    for name in names:
        first = seen.setdefault(without_suffix(name), name)
        if first != name:
            pairs.append((first, name))
    return pairs


def require_unique_stems(names: Iterable[str]) -> None:
    """Raises BadDataset if two pictures would get one label file."""
    for first, second in same_stem(names):
        raise BadDataset(
            f"{first} and {second} differ in the suffix alone, and this format would give them one label file:"
            " rename one of them"
        )


def without_suffix(name: str) -> str:
    """The path `name` ("/" between its parts) without the last suffix."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.rpartition(".")
    return folder + slash + (stem if dot and stem else last)
