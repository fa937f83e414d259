"""A worker with a bug: an update with the metric `poison/<how>` makes accept_update end like that.

celery -A tests.integration.poison worker       over RabbitMQ, instead of `celery -A tasks worker`
python -m tests.integration.poison worker       the embedded server, instead of `fedqueue worker`
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from celery.exceptions import SoftTimeLimitExceeded

import tasks.accept
from federation.types import ClientUpdate
from tasks import app
from tasks.context import Context

PREFIX = "poison/"
# seconds; shorter than the settings allow, because a test waits for them
app.conf.task_soft_time_limit, app.conf.task_time_limit = 3, 4


def fail() -> None:
    raise RuntimeError("a bug that this update finds")


def exhaust() -> None:
    raise MemoryError("an update that is too much")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dawdle() -> None:
    time.sleep(600)


def hang() -> None:
    while True:
        with contextlib.suppress(SoftTimeLimitExceeded):
            time.sleep(600)


ENDS: dict[str, Callable[[], None]] = {
    f"{PREFIX}{end.__name__}": end for end in (fail, exhaust, die, dawdle, hang)
}
accept = tasks.accept.accept


def poisoned(context: Context, update: ClientUpdate) -> None:
    for metric in ENDS.keys() & update.metrics.keys():
        os.write(2, f"poisoned by {update.update_id}\n".encode())
        ENDS[metric]()
    accept(context, update)


tasks.accept.accept = poisoned

if __name__ == "__main__":
    from cli.main import app as fedqueue

    fedqueue()
