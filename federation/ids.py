"""Names: job and site names, and update ids.

Names travel in object keys and routing keys, so they have one narrow alphabet: lower-case letters, digits
and hyphens, 1 to 63 characters, first and last not a hyphen (the label of RFC 1123). No dot, no slash, no
upper case: a name can neither add a level to a routing key nor leave its prefix in the bucket.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Annotated

from pydantic import StringConstraints

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"
UUID7_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z"
SHA256_PATTERN = r"^[0-9a-f]{64}\Z"

# pydantic's own regex engine has no look-around and spells \Z as \z; "$" there matches only the very end.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
UpdateId = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

_NAME = re.compile(NAME_PATTERN)
_UUID7 = re.compile(UUID7_PATTERN)


def is_name(text: str) -> bool:
    """True if `text` may name a job or a site."""
    return _NAME.match(text) is not None


def is_update_id(text: str) -> bool:
    """True if `text` is a UUID version 7, as ids of updates and requests are."""
    return _UUID7.match(text) is not None


def new_update_id() -> str:
    """A UUID version 7 (RFC 9562 §5.7): 48 bits of Unix milliseconds, then random bits.

    Sorting by id sorts by time of creation, which keeps listings of a site's uploads readable.
    """
    milliseconds = time.time_ns() // 1_000_000
    number = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    number = number & ~(0xF << 76) | 0x7 << 76  # version
    number = number & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(uuid.UUID(int=number))
