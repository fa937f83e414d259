"""Invited participation: who trains next is chosen here, every `oversee_every_s`.

    who has joined, who was invited until when     the store
    which invitations are answered                 the log: by the first update of the site, accepted or refused, that
                                                   was recorded after it was invited
    who is connected, how busy, at what            liveness

`aggregator/selection.py` decides. What is decided is one object for each site, `jobs/<job>/invitations/<site>.json`;
the control message `invited` is a hint to read it. Everything can be read anew at any time, so a worker that dies loses
nothing; with liveness empty nobody is known to be connected, and nobody is invited until heartbeats have come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from aggregator.selection import OVERRUN, Candidate, Selection, expected, free_slots, select
from federation.errors import Transient
from federation.governance import Invitation, Member
from federation.jobs import Job
from federation.settings import Settings
from federation.types import Accepted, Head, LogRecord, Refused
from federation.wire import Invited
from storage.blob import BlobStore
from storage.control import list_invitations, list_members, save_invitation
from storage.liveness import Seen
from storage.log import VersionLog
from tasks.context import Context
from tasks.tell import hint

log = logging.getLogger("fedqueue.invite")

AT_WORK = ("pulling", "training", "uploading")
"""States of a site that makes an update."""
PAUSE = 3.0
"""In `oversee_every_s`: whoever has not looked for so long may not have been the only one to invite."""


class Turns:
    """The newest invitation of each site and what came of it. Reads what is new since it was asked last.

    Of the log it reads the last OVERRUN leases and what is appended later: an invitation that is older has expired, and
    how long its turn took is known from before or not at all.
    """

    def __init__(self, store: BlobStore, versions: VersionLog, job: Job, now: datetime) -> None:
        """Raises NotFound if the job has no log, StoreUnavailable."""
        self._store, self._versions, self._job = store, versions, job
        self._since = now - timedelta(seconds=OVERRUN * job.spec.participation.lease_s)
        self._next = versions.first_since(self._since)
        self.head = versions.head().head
        self.newest: dict[str, Invitation] = {}
        self.unsure = False
        """An invitation was sent to the store, and whether it is there is not known: `reload`."""
        self._answered: dict[str, datetime] = {}
        self.reload()

    def reload(self) -> None:
        """Learn what another process has decided, before its consequences are read. Raises StoreUnavailable."""
        for invitation in list_invitations(self._store, self._job.id):
            self._keep(invitation)
        self.unsure = False

    def _keep(self, invitation: Invitation) -> None:
        if self.newest.get(invitation.site) != invitation:
            self.newest[invitation.site] = invitation
            self._answered.pop(invitation.site, None)

    def read(self, newest: LogRecord) -> None:
        """Read the records that are new, up to `newest` at least. Raises CorruptLog, StoreUnavailable."""
        if newest.seq < self._next:
            return
        for record in self._versions.history(self._next):
            self._add(record)
            self._next, self.head = record.seq + 1, record.head

    def _add(self, record: LogRecord) -> None:
        match record.event:
            case Accepted():
                site = record.event.contribution.update.site
            case Refused():
                site = record.event.refusal.update.site
            case _:
                return
        invitation = self.newest.get(site)
        if invitation is not None and record.at > invitation.invited_at:
            self._answered.setdefault(site, record.at)

    def answered(self, site: str) -> datetime | None:
        """When an update of the site was recorded, the first since it was invited."""
        return self._answered.get(site)

    def is_invited(self, site: str, now: datetime) -> bool:
        """It holds an invitation that has neither expired nor been answered."""
        invitation = self.newest.get(site)
        return invitation is not None and now < invitation.expires_at and site not in self._answered

    def expected_s(self, site: str, now: datetime) -> float | None:
        """Seconds that the site's next turn should take; None: there was none to go by."""
        invitation, answered = self.newest.get(site), self._answered.get(site)
        if invitation is None:
            return None
        unread = invitation.invited_at < self._since
        if answered is None and (unread or now < invitation.expires_at):
            return invitation.expected_s
        took = None if answered is None else (answered - invitation.invited_at).total_seconds()
        return expected(invitation.expected_s, took, self._job.spec.participation.lease_s)

    def invite(self, site: str, version: int, now: datetime) -> None:
        """Raises StoreUnavailable."""
        invitation = Invitation(
            job=self._job.id,
            site=site,
            version=version,
            invited_at=now,
            expires_at=now + timedelta(seconds=self._job.spec.participation.lease_s),
            expected_s=self.expected_s(site, now),
        )
        self.unsure = True
        save_invitation(self._store, invitation)
        self.unsure = False
        self._keep(invitation)


def candidates(
    job: Job,
    members: Iterable[Member],
    seen: Mapping[str, Seen],
    turns: Turns,
    settings: Settings,
    now: datetime,
) -> list[Candidate]:
    """Those that have joined, as a selection sees them. seen: site -> its last heartbeat."""
    unmerged = Counter(contribution.update.site for contribution in turns.head.pending)

    def occupied(site: str) -> str:
        status = seen[site].status if site in seen else None
        if status is not None and status.job == job.id and status.state in AT_WORK:
            return f"is {status.state} still"
        if unmerged[site] >= job.spec.inflight_limit:
            return f"{unmerged[site]} of its updates wait to be merged"
        return ""

    def candidate(member: Member) -> Candidate:
        site, last = member.site, seen.get(member.site)
        invitation = turns.newest.get(site)
        machine = last.status.machine if last is not None else None
        return Candidate(
            site=site,
            num_images=member.num_images,
            since_s=None if invitation is None else max(0.0, (now - invitation.invited_at).total_seconds()),
            expected_s=turns.expected_s(site, now),
            connected=last is not None
            and last.condition(settings.heartbeat_s, settings.heartbeat_ttl_s) == "connected",
            load=None if machine is None else machine.load_per_core,
            invited=turns.is_invited(site, now),
            occupied=occupied(site),
        )

    named = job.spec.participants
    return [
        candidate(member)
        for member in members
        if member.answer == "joined" and (named is None or member.site in named)
    ]


def invite(context: Context, job: Job, newest: LogRecord, now: datetime | None = None) -> None:
    """Keep `concurrency` sites busy. Raises Transient; nothing is lost then, the next call goes on."""
    participation = job.spec.participation
    if participation.mode != "invited" or newest.head.idle_because is not None:
        return
    now = now or datetime.now(UTC)
    turns = _turns(context, job, now)
    turns.read(newest)
    head = turns.head
    if head.idle_because is not None:
        return
    members = context.members(job.id)
    # whoever has declined meanwhile gives its place back
    busy = sum(turns.is_invited(member.site, now) for member in members if member.answer == "joined")
    unmerged = len(head.pending)
    if not free_slots(participation, busy, unmerged):
        return
    found = candidates(job, members, _seen(context), turns, context.settings, now)
    chosen = select(found, participation, unmerged)
    for site in chosen.invite:
        turns.invite(site, head.offered.version, now)
        hint(context, Invited(job=job.id), site)
        log.info("%s: invited %s", job.id, site)
    for site, why in chosen.passed_over.items():
        log.debug("%s: not invited: %s %s", job.id, site, why)


def _seen(context: Context) -> dict[str, Seen]:
    """Empty if liveness does not answer: nobody is known to be connected."""
    try:
        return {seen.status.site: seen for seen in context.liveness.sites()}
    except Transient as exc:
        log.info("nobody is invited: %s", exc)
        return {}


@dataclass
class _Memory:
    """Of this thread, while it works with `context`."""

    context: Context
    turns: dict[str, tuple[float, Turns]] = field(default_factory=dict)
    """Job -> monotonic time of the last look, and what is known."""


_here = threading.local()


def _turns(context: Context, job: Job, now: datetime) -> Turns:
    """What this thread knows of the job's turns. After a pause another worker may have invited in its place."""
    memory: _Memory | None = getattr(_here, "memory", None)
    if memory is None or memory.context is not context:
        memory = _here.memory = _Memory(context)
    if job.id not in memory.turns:
        memory.turns[job.id] = time.monotonic(), Turns(context.store, context.log(job.id), job, now)
    last, turns = memory.turns[job.id]
    if turns.unsure or time.monotonic() - last > PAUSE * context.settings.oversee_every_s:
        turns.reload()
    memory.turns[job.id] = time.monotonic(), turns
    return turns


# --- looking -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a site that has joined stands in an invited job. `why`: what it waits for, in words."""

    candidate: Candidate
    invitation: Invitation | None
    answered: datetime | None
    why: str


def places(
    store: BlobStore, job: Job, seen: Mapping[str, Seen], settings: Settings, now: datetime
) -> list[Place]:
    """What the next selection would say of each site that has joined, by site. Changes nothing.

    seen: site -> its last heartbeat. Raises NotFound, CorruptLog, StoreUnavailable.
    """
    versions = VersionLog(store, job.id)
    turns = Turns(store, versions, job, now)
    turns.read(versions.head())
    found = candidates(job, list_members(store, job.id), seen, turns, settings, now)
    chosen = select(found, job.spec.participation, len(turns.head.pending))
    return [
        Place(
            candidate,
            turns.newest.get(candidate.site),
            turns.answered(candidate.site),
            _why(candidate.site, chosen, turns.head),
        )
        for candidate in found
    ]


def _why(site: str, chosen: Selection, head: Head) -> str:
    return chosen.passed_over.get(site) or head.idle_because or "is next"
