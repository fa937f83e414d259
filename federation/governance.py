"""What the control plane stores beside the log: who takes part, who is invited, what is to be released.

announced/<job>.json                  Announcement
sites/<site>.json                     SiteKey
jobs/<job>/members/<site>.json        Member
jobs/<job>/invitations/<site>.json    Invitation
jobs/<job>/releases/<version>/
    proposal.json                     Proposal
    answers/<n>.json                  ReleaseRecord: SiteAnswers in the order in which they came, at last a Decision
    bundle/card.json, consents.json   Card, Consents
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from federation.base import Value
from federation.ids import Name, Sha256
from federation.jobs import MAX_VERSION, ClassName, ReleaseRule
from federation.requests import MAX_SIGNED, Consent, PublicKey, Reason, Signature
from federation.types import Metrics


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


# --- releases ------------------------------------------------------------------------------------------


class Proposal(Value):
    """The question to every contributor of a version: may it be given away outside, for this purpose?"""

    schema_version: Literal[1] = 1
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    model_sha256: Sha256 = Field(description="of the version's stored model, as the log names it")
    file_sha256: Sha256 = Field(description="of bundle/model.safetensors: the same with all tensors")
    file_bytes: int = Field(ge=1)
    purpose: Reason = ""
    contributors: tuple[Name, ...] = Field(min_length=1)
    by: Name
    at: AwareDatetime


class SignedConsent(Value):
    """`signed` is a Consent, byte for byte what the signature is of."""

    signed: str = Field(max_length=MAX_SIGNED)
    public_key: PublicKey
    signature: Signature

    def consent(self) -> Consent:
        """Raises Rejected if it is none. The signature is for `federation.signatures.verifies`."""
        return Consent.from_json(self.signed)


class SiteAnswer(Value):
    """A site's answer. Its newest one counts."""

    schema_version: Literal[1] = 1
    type: Literal["answer"] = "answer"
    site: Name = Field(description="as the broker knows it")
    consent: SignedConsent
    received_at: AwareDatetime


class Decision(Value):
    """The rule is met by the answers before this record: the bundle is made of them, and no answer follows."""

    schema_version: Literal[1] = 1
    type: Literal["decision"] = "decision"
    at: AwareDatetime


class ReleaseRecord(Value):
    """`answers/<n>.json`, appended by put-if-absent: so every answer comes before the decision, or too late."""

    record: Annotated[SiteAnswer | Decision, Field(discriminator="type")]


class Consents(Value):
    """`consents.json` of a bundle: the approvals that it rests on. Of who refused or was silent it says the number."""

    schema_version: Literal[1] = 1
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    rule: ReleaseRule
    contributors: int = Field(ge=1)
    approvals: tuple[SignedConsent, ...]


class CardContributor(Value):
    """A contributor that lets itself be named."""

    site: Name
    share: float = Field(ge=0, le=1, description="of the weights that all updates in it were merged with")
    updates: int = Field(ge=1)
    images: int = Field(ge=1, description="training images behind its largest update")


class CardEvaluation(Value):
    """What somebody measured; without a name if it is a site that does not let itself be named."""

    who: Name | None
    num_images: int | None
    metrics: Metrics
    per_class: dict[str, dict[str, float]]


class Card(Value):
    """`card.json` of a bundle: what the model card says, for programs."""

    schema_version: Literal[1] = 1
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    purpose: Reason
    classes: tuple[ClassName, ...]
    arch: str
    image_size: int
    model_sha256: Sha256 = Field(description="of the version's stored model, as the log names it")
    file_sha256: Sha256 = Field(description="of model.safetensors")
    file_bytes: int
    onnx_sha256: Sha256 | None = Field(description="of model.onnx; none: `onnx_problem` says why")
    onnx_problem: str = ""
    initial_sha256: Sha256 = Field(description="of the model that the job began with")
    aggregation: dict[str, Any] = Field(description="the job's policy")
    spans: tuple[tuple[int, int], ...] = Field(
        description="the versions that led to it, first and last of each stretch; what was rolled back is left out"
    )
    updates: int = Field(description="merged into those versions")
    mean_staleness: float
    rule: ReleaseRule
    contributors: int
    approved: int
    named: tuple[CardContributor, ...]
    evaluations: tuple[CardEvaluation, ...]
    proposed_at: AwareDatetime
    decided_at: AwareDatetime
