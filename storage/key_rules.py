"""What a key may be, checked before anything is touched (see storage/blob.py).

The alphabet is narrow on purpose: a key is also a path of FolderStore, and no key can leave its folder or
meet one of the store's own temporary files, whose names begin with a character that keys lack.
"""

from __future__ import annotations

import re

MAX_KEY_BYTES = 1024
MAX_SEGMENT_BYTES = 255

_ALPHABET = re.compile(r"[A-Za-z0-9._/-]*\Z")


def check_key(key: str) -> str:
    """`key`, if it is one. Raises ValueError."""
    if not key or len(key) > MAX_KEY_BYTES or not _ALPHABET.match(key):
        raise ValueError(f"{key[:80]!r} is not an object key: 1 to {MAX_KEY_BYTES} of A-Z a-z 0-9 . _ - /")
    for segment in key.split("/"):
        _check_segment(segment, key)
        if not segment:
            raise ValueError(f"object key {key[:80]!r} has an empty segment")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix`, if a key can begin with it; its last segment may be unfinished. Raises ValueError."""
    if len(prefix) > MAX_KEY_BYTES or not _ALPHABET.match(prefix):
        raise ValueError(f"{prefix[:80]!r} is not a prefix of object keys")
    *whole, last = prefix.split("/")
    for segment in whole:
        _check_segment(segment, prefix)
        if not segment:
            raise ValueError(f"prefix {prefix[:80]!r} has an empty segment")
    if len(last) > MAX_SEGMENT_BYTES:
        raise ValueError(f"prefix {prefix[:80]!r} has a segment that is too long")
    return prefix


def is_segment(name: str) -> bool:
    """True if the file or folder `name` may be a part of a key."""
    return "/" not in name and _ALPHABET.match(name) is not None


def _check_segment(segment: str, key: str) -> None:
    if segment in (".", ".."):
        raise ValueError(f"object key {key[:80]!r} has a segment {segment!r}")
    if len(segment) > MAX_SEGMENT_BYTES:
        raise ValueError(f"object key {key[:80]!r} has a segment longer than {MAX_SEGMENT_BYTES}")
