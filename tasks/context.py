"""What one server process works with. Made on first use, so after a prefork worker has forked."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property

from broker.open import connect
from broker.port import Broker
from federation import plugins
from federation.jobs import Job
from federation.settings import Settings
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.liveness import Liveness, open_liveness
from storage.log import VersionLog
from storage.open import open_store
from tasks.celery import Send, sender


@dataclass
class Context:
    """Settings, store and broker of this process, and what it has learnt of each job."""

    settings: Settings
    store: BlobStore
    broker: Broker
    send: Send
    _jobs: dict[str, Job] = field(default_factory=dict)
    _logs: dict[str, VersionLog] = field(default_factory=dict)

    @cached_property
    def liveness(self) -> Liveness:
        """Which sites are alive. Connects at the first call."""
        return open_liveness(self.settings)

    def job(self, job_id: str) -> Job:
        """job.json, read once: it never changes. Raises NotFound."""
        if job_id not in self._jobs:
            self._jobs[job_id] = load_job(self.store, job_id)
        return self._jobs[job_id]

    def log(self, job_id: str) -> VersionLog:
        """The job's log; kept, because it remembers where the head was."""
        if job_id not in self._logs:
            self._logs[job_id] = VersionLog(self.store, job_id)
        return self._logs[job_id]


_here = threading.local()


def current() -> Context:
    """This thread's context, made from the environment on first use: brokers are not shared between threads."""
    context: Context | None = getattr(_here, "context", None)
    if context is None:
        context = open_context(Settings.load())
        install(context)
    return context


def open_context(settings: Settings) -> Context:
    plugins.allow(settings.plugins)
    broker = connect(settings, keep_open=True, server=True)
    return Context(settings, open_store(settings), broker, sender(settings, broker))


def install(context: Context | None) -> None:
    """Use `context` in this thread from now on; None: make one anew when it is needed."""
    _here.context = context
