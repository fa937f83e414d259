"""A bucket as a local folder: the embedded mode's object store, and good for any number of processes at once.

    <root>/jobs/demo/log/00000000000000000000.json   an object is the file of its key
    <root>/~tmp/~<random>                            not yet objects; left behind by a kill, they do no harm

put-if-absent is link(2): it fails if the name exists, whoever made it, and what it names is already whole and
synced. So the file system must know hard links, which is tried when the store is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from federation.errors import AccessDenied, BadPayload, NotFound, StoreUnavailable, UnsafeStore
from federation.points import Point, reach
from storage.files import (
    CHUNK_BYTES,
    TEMPORARY_MARK,
    Buffer,
    remove_stale,
    sync_folder,
    verified,
    write_temporary,
)
from storage.key_rules import check_key, check_prefix, is_segment


class FolderStore:
    """BlobStore over a folder. Safe for threads and processes of one machine (not over NFS)."""

    def __init__(self, root: Path) -> None:
        """Raises UnsafeStore if `root` has no hard links, AccessDenied, StoreUnavailable."""
        self._root = root.absolute()
        self._temporary = self._root / f"{TEMPORARY_MARK}tmp"
        self._synced: set[Path] = set()  # folders whose own names are known to be durable
        with _writing("the store's folder"):
            self._make_durable(self._temporary)
            remove_stale(self._temporary)
            probe = write_temporary(self._temporary, b"")
        linked = probe.with_name(probe.name + "-link")
        try:
            os.link(probe, linked)
            linked.unlink()
        except OSError as exc:
            raise UnsafeStore(
                f"{self._root} is on a file system without hard links ({exc}), on which put-if-absent is not "
                "safe: use a folder on ext4, xfs, btrfs, APFS or NTFS, or an S3 store"
            ) from exc
        finally:
            probe.unlink(missing_ok=True)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        with _reading(key), open(self._path(key), "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > max_bytes:
                raise BadPayload(f"{key} has {nbytes} bytes, at most {max_bytes} are read", "too-large")
            return file.read()

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        with _reading(key), open(self._path(key), "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != nbytes:
                raise BadPayload(f"{key} has {found} bytes, declared are {nbytes}", "wrong-size")
            with verified(path, key, nbytes=nbytes, sha256=sha256) as sink:
                while chunk := file.read(CHUNK_BYTES):
                    sink(chunk)

    def size(self, key: str) -> int:
        with _reading(key):
            path = self._path(key)
            if path.is_dir():
                raise IsADirectoryError(key)
            return path.stat().st_size

    def modified(self, key: str) -> datetime:
        with _reading(key):
            path = self._path(key)
            if path.is_dir():
                raise IsADirectoryError(key)
            return datetime.fromtimestamp(path.stat().st_mtime, UTC)

    def put(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        with self._new_file(path, data) as temporary:
            os.replace(temporary, path)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        path = self._path(key)
        with _writing(key):
            if path.is_file():  # only saves the copying: the link below decides
                sync_folder(path.parent)
                return False
        with self._new_file(path, data) as temporary:
            reach(Point.FILE_WRITTEN)
            try:
                os.link(temporary, path)
                reach(Point.FILE_NAMED)
            except FileExistsError:
                return False
            return True

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        check_prefix(prefix)
        folder, slash, _ = prefix.rpartition("/")
        return self._list(folder + slash, prefix, start_after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _writing(key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
            sync_folder(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _new_file(self, path: Path, data: Buffer) -> Iterator[Path]:
        """`data` in a temporary file, for the body to give it its name, which is then made durable."""
        try:
            with _writing(str(path.relative_to(self._root))):
                self._make_durable(path.parent)
                temporary = write_temporary(self._temporary, data)
                try:
                    yield temporary
                finally:
                    temporary.unlink(missing_ok=True)
                    # also when another writer was first: what we then report must not vanish either
                    sync_folder(path.parent)
        except StoreUnavailable:
            self._synced.clear()  # somebody may have removed folders
            raise

    def _make_durable(self, folder: Path) -> None:
        """Create `folder` and its parents, each synced into its own, even if another process made it."""
        if folder in self._synced:
            return
        if folder != self._root:
            self._make_durable(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        elif not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        self._synced.add(folder)

    def _list(self, folder: str, prefix: str, start_after: str) -> Iterator[str]:
        """Walk `folder` ("" or ending in "/") in byte order of whole keys."""
        names = []
        with _reading(folder):
            try:
                with os.scandir(self._root / folder) as entries:
                    # a folder sorts as "name/": "a-b" comes before "a/b", and "a/b" before "a0"
                    names = sorted(e.name + "/" * e.is_dir() for e in entries if is_segment(e.name))
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in names:
            path = folder + name
            if name.endswith("/"):
                may_match = path.startswith(prefix) or prefix.startswith(path)
                if may_match and (path > start_after or start_after.startswith(path)):
                    yield from self._list(path, prefix, start_after)
            elif path.startswith(prefix) and path > start_after:
                yield path


@contextmanager
def _reading(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
        raise NotFound(f"{key} is not in the store") from exc
    except PermissionError as exc:
        raise AccessDenied(f"may not read {key}: {exc}; check the owner of the store's folder") from exc
    except OSError as exc:
        raise StoreUnavailable(f"cannot read {key}: {exc}") from exc


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as exc:
        # S3 can hold both "a" and "a/b", a folder cannot; no key of federation.keys is a parent of another
        raise ValueError(
            f"{what}: the folder store has a file where this needs a folder, or the reverse"
        ) from exc
    except PermissionError as exc:
        raise AccessDenied(f"may not write {what}: {exc}; check the owner of the store's folder") from exc
    except OSError as exc:
        raise StoreUnavailable(f"cannot write {what}: {exc}") from exc
