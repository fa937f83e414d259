"""A daily span of local time, such as "22:00-06:00"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import time
from typing import Self

_SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)")


@dataclass(frozen=True)
class Hours:
    """From `begin` until just before `end`; past midnight if `end` is the earlier."""

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for what is no span HH:MM-HH:MM, or an empty one."""
        found = _SPAN.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"{text!r} is no span of hours: write it as 22:00-06:00")
        begin, end = (time(int(h or 0), int(m or 0)) for h, m in (found.group(1, 2), found.group(3, 4)))
        if begin == end:
            raise ValueError(f"{text!r} begins when it ends: for the whole day set nothing")
        return cls(begin, end)

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"

    def __contains__(self, at: time) -> bool:
        if self.begin < self.end:
            return self.begin <= at < self.end
        return at >= self.begin or at < self.end
