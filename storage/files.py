"""Local files that appear whole and durable, or not at all.

A temporary file in the same folder is written, synced and renamed; the rename is synced through its folder.
Temporary names begin with "~", which no object key contains.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from federation.errors import BadPayload, StoreUnavailable

TEMPORARY_MARK = "~"
STALE_TEMPORARY_S = 86_400.0
"""A temporary file this old belongs to nobody: no write takes a day."""
CHUNK_BYTES = 1 << 20

Buffer = bytes | bytearray | memoryview


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_temporary(folder: Path, data: Buffer) -> Path:
    """`data` in a new synced file of `folder`. On failure nothing is left. Raises OSError."""
    path = _temporary(folder)
    try:
        with _create(path) as fd:
            view = memoryview(data).cast("B")
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def replace_durably(path: Path, data: Buffer) -> None:
    """Replace `path` so that after a power failure it has `data`, or is as it was before. Raises OSError."""
    temporary = write_temporary(path.parent, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_quickly(path: Path, data: Buffer) -> None:
    """Replace `path` in one step, without making it survive a power failure. Raises OSError."""
    temporary = _temporary(path.parent)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def verified(path: Path, key: str, *, nbytes: int, sha256: str) -> Iterator[Callable[[Buffer], None]]:
    """A sink for the bytes of object `key`. `path` appears at the end, if size and digest are as declared.

    Raises BadPayload ("wrong-size" as soon as there are too many | "wrong-digest"); StoreUnavailable if
    `path` cannot be written (disk full, folder gone).
    """
    temporary = _temporary(path.parent)
    digest, count = hashlib.sha256(), 0

    try:
        with _create(temporary) as fd:

            def sink(chunk: Buffer) -> None:
                nonlocal count
                view = memoryview(chunk).cast("B")
                count += view.nbytes
                if count > nbytes:
                    raise BadPayload(f"{key} has more than the declared {nbytes} bytes", "wrong-size")
                digest.update(view)
                while view:
                    view = view[os.write(fd, view) :]

            yield sink
            if count != nbytes:
                raise BadPayload(f"{key} has {count} bytes, declared are {nbytes}", "wrong-size")
            if digest.hexdigest() != sha256:
                raise BadPayload(
                    f"{key} has sha256 {digest.hexdigest()}, declared is {sha256}", "wrong-digest"
                )
            os.fsync(fd)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as exc:
        raise StoreUnavailable(f"cannot write {path}: {exc}; free some space or fix the folder") from exc
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Delete the temporary files that killed writers left in `folder` long ago. Raises OSError.

    Other processes may be doing the same, or writing new ones.
    """
    oldest = time.time() - STALE_TEMPORARY_S
    for path in folder.glob(f"{TEMPORARY_MARK}*"):
        try:
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:
            continue


def _temporary(folder: Path) -> Path:
    return folder / f"{TEMPORARY_MARK}{uuid.uuid4().hex}"


@contextmanager
def _create(path: Path) -> Iterator[int]:
    # not tempfile: its files are for their owner only, and the folder may be shared by several accounts
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)
