"""Waiting between attempts: exponential, capped, jittered, and always ready to be stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

STOP_POLL_S = 0.25
"""How often `stop` is asked while nothing happens. The port promises once a second."""


def backoff_s(attempt: int, first_s: float, limit_s: float) -> float:
    """Seconds to wait after failed attempt number `attempt`, from 1.

    first, 2·first, 4·first … up to limit, times a random number in [0.5, 1], so that clients that lost the
    same broker do not return in step.
    """
    doublings = min(attempt - 1, 32)  # beyond, the power would overflow and the limit holds anyway
    return min(limit_s, first_s * 2.0**doublings) * random.uniform(0.5, 1.0)


def pause(seconds: float, stop: Callable[[], bool], sleep: Callable[[float], None] = time.sleep) -> None:
    """Sleep for `seconds`, or less if `stop()` becomes true. `sleep` may service a connection meanwhile."""
    deadline = time.monotonic() + seconds
    while not stop():
        left = deadline - time.monotonic()
        if left <= 0:
            return
        sleep(min(left, STOP_POLL_S))
