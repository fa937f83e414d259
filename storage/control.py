"""The control plane's objects in the bucket: announcements, answers to requests, members, invitations, sites' keys."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TypeVar

from federation import keys
from federation.base import Value
from federation.errors import AccessDenied, NotFound, Rejected
from federation.governance import Announcement, Invitation, Member, SiteKey
from federation.requests import Answer
from federation.signatures import fingerprint
from storage.blob import BlobStore
from storage.reading import load_value

V = TypeVar("V", bound=Value)


def announce(store: BlobStore, announcement: Announcement) -> None:
    """Let sites find the job. Repeating it changes nothing."""
    store.put_if_absent(keys.announcement_key(announcement.job), announcement.to_json())


def announced(store: BlobStore) -> Iterator[str]:
    """The ids of all jobs that were announced, sorted. A site's account may ask this."""
    for key in store.list(keys.ANNOUNCED_PREFIX):
        yield key.removeprefix(keys.ANNOUNCED_PREFIX).removesuffix(".json")


def load_announcement(store: BlobStore, job: str) -> Announcement | None:
    return _maybe(store, keys.announcement_key(job), Announcement)


def save_answer(store: BlobStore, answer: Answer) -> None:
    """The first answer to a request stays."""
    store.put_if_absent(keys.answer_key(answer.who, answer.request_id), answer.to_json())


def load_answer(store: BlobStore, who: str, request_id: str) -> Answer | None:
    """None: there is none yet."""
    return _maybe(store, keys.answer_key(who, request_id), Answer)


def save_member(store: BlobStore, member: Member) -> None:
    """Write a site's answer to a job, unless it has given a later one."""
    known = load_member(store, member.job, member.site)
    if known is None or known.at <= member.at:
        store.put(keys.member_key(member.job, member.site), member.to_json())


def load_member(store: BlobStore, job: str, site: str) -> Member | None:
    """None: the site has not answered."""
    return _maybe(store, keys.member_key(job, site), Member)


def list_members(store: BlobStore, job: str) -> list[Member]:
    """By site."""
    return [load_value(store, key, Member) for key in store.list(keys.members_prefix(job))]


def save_invitation(store: BlobStore, invitation: Invitation) -> None:
    """Write it, replacing an earlier one of this site."""
    store.put(keys.invitation_key(invitation.job, invitation.site), invitation.to_json())


def load_invitation(store: BlobStore, job: str, site: str) -> Invitation | None:
    """None: the site was never invited."""
    return _maybe(store, keys.invitation_key(job, site), Invitation)


def list_invitations(store: BlobStore, job: str) -> list[Invitation]:
    """The newest of each site, expired or not, by site."""
    return [load_value(store, key, Invitation) for key in store.list(keys.invitations_prefix(job))]


def pin_key(store: BlobStore, site: str, public_key: str) -> None:
    """Remember by which key the site signs: the first that it tells. Raises Rejected for any other one."""
    told = SiteKey(site=site, public_key=public_key, at=datetime.now(UTC))
    if store.put_if_absent(keys.site_key(site), told.to_json()):
        return
    known = load_value(store, keys.site_key(site), SiteKey)
    if known.public_key != public_key:
        raise Rejected(
            f"site {site} told the key {fingerprint(known.public_key)} before, this one is {fingerprint(public_key)}: "
            "restore release.key of its state folder from a backup (docs/release.md says what to do if it is lost)",
            "another-key",
        )


def load_key(store: BlobStore, site: str) -> SiteKey | None:
    """None: the site has not told its key yet. A site's account may ask this."""
    return _maybe(store, keys.site_key(site), SiteKey)


def _maybe(store: BlobStore, key: str, kind: type[V]) -> V | None:
    try:
        return load_value(store, key, kind)
    except (NotFound, AccessDenied):  # a site's account is told 403 for an object that is not there
        return None
