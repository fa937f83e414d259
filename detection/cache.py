"""Decoded and resized images, kept in memory and, if wanted, on disk: decoding is what loading costs.

On disk a square is one .npy file of uint8 [side, side, 3] followed by the CRC-32 of its pixels, named by what it was
made from, so that an image that was changed is decoded anew:

    <folder>/<side>/<first two digits>/<sha256 of the image file>.npy

Files are replaced atomically and not synced: what a power cut leaves half written fails its checksum and is decoded
again. The folder holds the images themselves in another form: it is for the owner's eyes alone (mode 0700).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("fedqueue.cache")

CRC_BYTES = 4
PARTIAL = ".partial"
ABANDONED_S = 3600
"""No file takes so long to write."""
Square = NDArray[np.uint8]  # [side, side, 3], RGB
P = TypeVar("P", bound="Pixels")


class Pixels(Protocol):
    """An array or a tensor."""

    @property
    def nbytes(self) -> int: ...


@dataclass(eq=False)
class MemoryCache(Generic[P]):
    """Keeps what fits and evicts nothing: under random access over more images than fit, an evicting cache would
    miss nearly every time. Several data sets may share one, and then its bound."""

    limit_bytes: int
    used_bytes: int = 0
    squares: dict[tuple[Path, int], P] = field(default_factory=dict)

    def get(self, image: Path, side: int) -> P | None:
        return self.squares.get((image, side))

    def put(self, image: Path, side: int, square: P) -> None:
        if (image, side) not in self.squares and self.used_bytes + square.nbytes <= self.limit_bytes:
            self.squares[(image, side)] = square
            self.used_bytes += square.nbytes


@dataclass(frozen=True, slots=True)
class _Entry:
    side: int
    sha256: str


class DiskCache:
    """Squares below `folder`, at most `limit_bytes` of them.

    When it is full, squares that this process has not asked for and that are of other images, or of a size that is not
    asked for, make room, the oldest first. What the data set at hand needs is never evicted (see MemoryCache). Several
    processes may use one folder; each counts the files that it found and its own.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.used_bytes = 0
        self._sizes: dict[_Entry, int] = {}  # the oldest first
        self._digests: set[str] = set()
        self._own: set[str] = set()
        self._sides: set[int] = set()
        self._writable = True
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._scan()

    def __contains__(self, sha256: str) -> bool:
        """True if an image file of this content was decoded before."""
        return sha256 in self._digests

    def reserve(self, digests: Iterable[str]) -> None:
        """Say which images are in use: their squares are not evicted."""
        self._own.update(digests)

    def get(self, sha256: str, side: int) -> Square | None:
        """The square, or None if it is not there or is damaged; then it is removed."""
        entry = _Entry(side, sha256)
        self._sides.add(side)
        if entry not in self._sizes:
            return None
        path = self._path(entry)
        try:
            raw = np.fromfile(path, np.uint8)
        except OSError:  # somebody tidied up
            self._forget(entry)
            return None
        header = _header(side)
        body = raw[len(header) : -CRC_BYTES]
        if (
            len(raw) == len(header) + 3 * side * side + CRC_BYTES
            and raw[: len(header)].tobytes() == header
            and raw[-CRC_BYTES:].tobytes() == _crc(body)
        ):
            return body.reshape(side, side, 3)
        log.warning("%s: is damaged and is made again", path)
        self._remove(entry)
        return None

    def put(self, sha256: str, side: int, square: Square) -> None:
        """Keep a square if there is room. A disk that cannot be written ends the keeping, not the training."""
        entry, header = _Entry(side, sha256), _header(side)
        self._sides.add(side)
        nbytes = len(header) + square.nbytes + CRC_BYTES
        if entry in self._sizes or not self._writable or not self._make_room(nbytes) or not self._writable:
            return
        path = self._path(entry)
        partial = path.with_suffix(f".{os.getpid()}{PARTIAL}")
        body = np.ascontiguousarray(square)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.writelines((header, body.data, _crc(body)))
            partial.replace(path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._give_up(path, exc)
            return
        self._remember(entry, nbytes)

    def _make_room(self, nbytes: int) -> bool:
        if self.used_bytes + nbytes > self.limit_bytes:
            spare = [e for e in self._sizes if e.sha256 not in self._own or e.side not in self._sides]
            for entry in spare:
                if self.used_bytes + nbytes <= self.limit_bytes:
                    break
                self._remove(entry)
        return self.used_bytes + nbytes <= self.limit_bytes

    def _scan(self) -> None:
        found = []
        for path in self.folder.glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):  # the agent of another job uses the folder, too
                status = path.stat()
                if path.suffix == PARTIAL and status.st_mtime < time.time() - ABANDONED_S:
                    path.unlink()  # of a process that was killed
                elif path.suffix == ".npy" and path.parts[-3].isdigit():
                    found.append((status.st_mtime_ns, status.st_size, _Entry(int(path.parts[-3]), path.stem)))
        for _, nbytes, entry in sorted(found, key=lambda item: item[0]):
            self._remember(entry, nbytes)

    def _remember(self, entry: _Entry, nbytes: int) -> None:
        self._sizes[entry] = nbytes
        self._digests.add(entry.sha256)
        self.used_bytes += nbytes

    def _forget(self, entry: _Entry) -> None:
        self.used_bytes -= self._sizes.pop(entry)

    def _remove(self, entry: _Entry) -> None:
        path = self._path(entry)
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            self._give_up(path, exc)
        self._forget(entry)

    def _give_up(self, path: Path, exc: OSError) -> None:
        self._writable = False
        log.warning("%s: cannot be written (%s): decoded images are not kept on disk", path, exc.strerror)

    def _path(self, entry: _Entry) -> Path:
        return self.folder / str(entry.side) / entry.sha256[:2] / f"{entry.sha256}.npy"


def _header(side: int) -> bytes:
    """Of a .npy file, version 1.0. https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "|u1", "fortran_order": False, "shape": (side, side, 3)}
    )
    return out.getvalue()


def _crc(body: NDArray[np.uint8]) -> bytes:
    return zlib.crc32(body.data).to_bytes(CRC_BYTES, "little")
