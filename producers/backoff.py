"""Waiting after a failure: longer after each in a row, with jitter, so that a thousand sites do not return at once."""

from __future__ import annotations

from dataclasses import dataclass

from broker.backoff import backoff_s

FIRST_S = 0.5


@dataclass
class Backoff:
    """Counts failures in a row. Waits 0.5, 1, 2 … up to `limit_s` seconds, each times a random half to one."""

    limit_s: float
    failures: int = 0

    def next_s(self) -> float:
        """Count a failure and return how long to wait for it."""
        self.failures += 1
        return backoff_s(self.failures, FIRST_S, self.limit_s)

    def reset(self) -> None:
        self.failures = 0
