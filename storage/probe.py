"""Does the store honour put-if-absent? Asked when a server process starts: everything else rests on it.

A server that ignores `If-None-Match: *` answers 200 and overwrites. Two workers would then both believe that
they appended log record n, and one accepted update would be gone without a trace.
"""

from __future__ import annotations

import uuid

from federation.errors import NotFound, UnsafeStore
from federation.keys import PROBE_PREFIX
from storage.blob import BlobStore

ADVICE = (
    "Use a store with conditional writes, on a bucket without versioning: AWS S3, MinIO and its forks, "
    "Cloudflare R2, Ceph RGW, RustFS, SeaweedFS from 4.17 on, or a local folder. Garage, the S3 interface of "
    "Google Cloud Storage, `rclone serve s3` and s3rver do not have them. See docs/operations.md."
)


def probe(store: BlobStore) -> None:
    """Write one key twice, read it back, delete it. Needs the rights to do so below `_probe/`.

    Raises UnsafeStore; StoreUnavailable, AccessDenied, BadSettings as the store does.
    """
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    try:
        created = store.put_if_absent(key, first)
        # False is honest, too, if the reply to a first attempt was lost; the bytes must be ours
        if _read(store, key) != first:
            raise UnsafeStore(
                f"the object store did not keep what put-if-absent wrote ({created=}). {ADVICE}"
            )
        if store.put_if_absent(key, second):
            raise UnsafeStore(f"the object store let a second put-if-absent of the same key pass. {ADVICE}")
        if _read(store, key) != first:
            raise UnsafeStore(f"the object store refused a put-if-absent, yet overwrote the object. {ADVICE}")
    finally:
        store.delete(key)


def _read(store: BlobStore, key: str) -> bytes | None:
    try:
        return store.get(key, max_bytes=1024)
    except NotFound:
        return None
