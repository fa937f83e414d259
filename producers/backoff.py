"""Waiting after a failure: exponential with full jitter, so that a thousand sites do not return at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_S = 0.5


@dataclass
class Backoff:
    """Seconds to wait: uniform in (half, whole) of 0.5, 1, 2, 4 … up to `limit_s`."""

    limit_s: float
    failures: int = 0

    def next_s(self) -> float:
        """Count a failure and return how long to wait for it."""
        ceiling: float = min(self.limit_s, FIRST_S * 2 ** min(self.failures, 30))
        self.failures += 1
        return ceiling * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.failures = 0
