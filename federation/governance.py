"""What the control plane stores beside the log: who takes part, who is invited, what is to be released.

announced/<job>.json                  Announcement
sites/<site>.json                     SiteKey
jobs/<job>/members/<site>.json        Member
jobs/<job>/invitations/<site>.json    Invitation
jobs/<job>/releases/<version>/…       Proposal, SignedConsent
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from federation.base import Value
from federation.ids import Name, Sha256
from federation.jobs import MAX_VERSION
from federation.requests import PublicKey, Reason, Signature


class Announcement(Value):
    """There is such a job. Its `job.json` and log say everything else."""

    schema_version: Literal[1] = 1
    job: Name
    submitted_by: Name
    at: AwareDatetime


class Member(Value):
    """A site's answer to a job; a later answer replaces it."""

    schema_version: Literal[1] = 1
    job: Name
    site: Name
    answer: Literal["joined", "declined"]
    reason: Reason = ""
    num_images: int = Field(default=0, ge=0, le=10**12, description="training images; 0: not told")
    at: AwareDatetime = Field(description="when the site answered, by its own clock")


class Invitation(Value):
    """The site is asked to train from the newest version, and to send the update before `expires_at`."""

    schema_version: Literal[1] = 1
    job: Name
    site: Name
    version: int = Field(ge=0, le=MAX_VERSION, description="the newest when it was invited")
    invited_at: AwareDatetime = Field(description="tells this invitation from others of the site")
    expires_at: AwareDatetime
    expected_s: float | None = Field(
        default=None,
        ge=0,
        description="seconds that the server expects it to take, by the site's earlier turns",
    )


class SiteKey(Value):
    """The key by which a site signs, told by itself when it first joined a job; it never changes."""

    schema_version: Literal[1] = 1
    site: Name
    public_key: PublicKey
    at: AwareDatetime


class Proposal(Value):
    """The question to every contributor of a version: may it be given away outside?"""

    schema_version: Literal[1] = 1
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    model_sha256: Sha256
    purpose: Reason = ""
    contributors: tuple[Name, ...]
    by: Name
    at: AwareDatetime


class SignedConsent(Value):
    """An answer as it came: `signed` is a Consent, byte for byte what the signature is of."""

    schema_version: Literal[1] = 1
    signed: str = Field(max_length=2000)
    public_key: PublicKey
    signature: Signature
    received_at: AwareDatetime
