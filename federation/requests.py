"""What a site or an operator asks of the server, and the answer. docs/protocol.md writes it down for sites.

    Request ─ what: SubmitJob | JoinJob | DeclineJob | SteerJob | SteerModel | ProposeRelease | AnswerRelease
    Answer    `answers/<who>/<request_id>.json`, written once; the control message `answered` is a hint to read it

A site's request travels over fed.updates and the ingress, which checks who it is; an operator, who has the server's
broker account, sends the same request as a task. One handler serves both (tasks/requests.py). The id makes a request
that is delivered twice count once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from federation.base import Value
from federation.ids import Name, Sha256, UpdateId, is_name
from federation.jobs import MAX_VERSION, ModelRef

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519, RFC 8032, hexadecimal")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519, RFC 8032, hexadecimal")]
MAX_REASON = 200
"""Characters of a reason, or a purpose."""
Reason = Annotated[str, Field(max_length=MAX_REASON)]
MAX_SIGNED = 4000
"""Characters of a Consent as JSON."""


class SubmitJob(Value):
    """Create a job. The files lie below `jobs/<job>/updates/<who>/`, where a site may write; the server copies them."""

    kind: Literal["submit-job"] = "submit-job"
    document: dict[str, Any] = Field(
        description="a JobSpec as written: it is checked by the server, all of it"
    )
    initial: ModelRef = Field(description="all tensors of the model")
    first: ModelRef = Field(description="the tensors that sites exchange; may be the same file")

    @property
    def job(self) -> str | None:
        """The id that the document asks for, if it can be one."""
        found = self.document.get("id")
        return found if isinstance(found, str) and is_name(found) else None


class JoinJob(Value):
    kind: Literal["join-job"] = "join-job"
    job: Name
    num_images: int = Field(ge=0, le=10**12, description="training images; 0: not told")
    public_key: PublicKey | None = Field(default=None, description="by which this site signs its consent")


class DeclineJob(Value):
    kind: Literal["decline-job"] = "decline-job"
    job: Name
    reason: Reason


class SteerJob(Value):
    """Of the job's submitter, or an operator."""

    kind: Literal["steer-job"] = "steer-job"
    job: Name
    action: Literal["pause", "resume", "stop"]
    reason: Reason = ""


class SteerModel(Value):
    """Of the job's submitter, or an operator. `version`: to promote, or to go back to; of the quarantine to clear."""

    kind: Literal["steer-model"] = "steer-model"
    job: Name
    action: Literal["promote", "rollback", "clear"]
    version: int = Field(ge=0, le=MAX_VERSION)
    reason: Reason = ""


class ProposeRelease(Value):
    """Of the job's submitter, or an operator."""

    kind: Literal["propose-release"] = "propose-release"
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    purpose: Reason = Field(default="", description="to whom and what for")


class Consent(Value):
    """A site's answer to a proposal, and exactly what it signs: the UTF-8 bytes of this value's JSON.

    It repeats what was asked, so that nobody can put another model or purpose to an answer.
    """

    schema_version: Literal[1] = 1
    kind: Literal["release-consent"]  # without a default: no signature of another text can be taken for one
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    model_sha256: Sha256 = Field(description="of the version's stored model, as the log names it")
    file_sha256: Sha256 = Field(description="of the file that would be given away: the same with all tensors")
    purpose: Reason = Field(description="of the proposal, word for word")
    answer: Literal["approve", "refuse"]
    reason: Reason = ""
    site: Name | None = Field(
        default=None, description="given: the bundle may name this site and its share; none: it must not"
    )
    at: AwareDatetime


class AnswerRelease(Value):
    """Of a site alone: the signature is made with the key that stays on its machine."""

    kind: Literal["answer-release"] = "answer-release"
    job: Name
    version: int = Field(ge=0, le=MAX_VERSION)
    signed: str = Field(max_length=MAX_SIGNED, description="a Consent as JSON, byte for byte what was signed")
    public_key: PublicKey
    signature: Signature


What = Annotated[
    SubmitJob | JoinJob | DeclineJob | SteerJob | SteerModel | ProposeRelease | AnswerRelease,
    Field(discriminator="kind"),
]


class Request(Value):
    """`who`: a site, or "server" for an operator."""

    schema_version: Literal[1] = 1
    request_id: UpdateId
    who: Name
    what: What
    at: AwareDatetime


class Answer(Value):
    """What became of a request."""

    schema_version: Literal[1] = 1
    request_id: UpdateId
    who: Name
    kind: str = Field(max_length=32)
    ok: bool
    job: Name | None = None
    message: str = Field(default="", max_length=2000, description="what was done, in words")
    errors: tuple[Annotated[str, Field(max_length=2000)], ...] = Field(
        default=(), max_length=100, description="everything that is wrong with the request"
    )
    at: AwareDatetime
