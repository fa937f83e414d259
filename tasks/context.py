"""What one server process works with. Made on first use, so after a prefork worker has forked."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from functools import cached_property

from broker.open import connect
from broker.port import Broker
from federation import plugins
from federation.errors import CorruptLog, NotFound
from federation.governance import Member
from federation.jobs import Job
from federation.keys import member_key, members_prefix, metrics_prefix
from federation.settings import Settings
from federation.types import Evaluation
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.liveness import Liveness, open_liveness
from storage.log import VersionLog
from storage.open import open_store
from storage.reading import load_value
from tasks.celery import Send, sender

log = logging.getLogger("fedqueue.tasks")


@dataclass
class Context:
    """Settings, store and broker of this process, and what it has learnt of each job."""

    settings: Settings
    store: BlobStore
    broker: Broker
    send: Send
    _jobs: dict[str, Job] = field(default_factory=dict)
    _logs: dict[str, VersionLog] = field(default_factory=dict)
    _measured: dict[str, dict[str, Evaluation | None]] = field(default_factory=dict)
    _members: dict[str, dict[str, Member]] = field(default_factory=dict)

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

    def members(self, job_id: str) -> list[Member]:
        """The sites' answers to a job, by site. Takes one listing, and a request for each that is new.

        Each is read once, so whoever writes one says so (`forget_member`), and whoever was not the only one to write
        them begins anew (`forget_members`). Raises CorruptLog, StoreUnavailable.
        """
        known = self._members.setdefault(job_id, {})
        listed = list(self.store.list(members_prefix(job_id)))
        for key in listed:
            if key not in known:
                known[key] = load_value(self.store, key, Member)
        return [known[key] for key in listed]

    def forget_member(self, job_id: str, site: str) -> None:
        self._members.get(job_id, {}).pop(member_key(job_id, site), None)

    def forget_members(self) -> None:
        self._members.clear()

    def evaluations(self, job_id: str) -> list[Evaluation]:
        """What was measured of a job, without the classes. Each is read once: the first one stays."""
        known = self._measured.setdefault(job_id, {})
        listed = set(self.store.list(metrics_prefix(job_id)))
        for key in known.keys() - listed:  # retention has removed it
            del known[key]
        for key in sorted(listed - known.keys()):
            try:
                found = load_value(self.store, key, Evaluation)
                known[key] = found.model_copy(update={"per_class": {}})
            except NotFound:
                continue
            except CorruptLog as exc:
                log.error("left out: %s", exc)
                known[key] = None
        return [evaluation for evaluation in known.values() if evaluation is not None]


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
