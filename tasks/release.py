"""Requests propose-release and answer-release: may a version be given away outside?

    propose    the contributors from the log, the very file into the bundle's place, then the question
    answer     a site's signed answer into the release's little log; if the rule is met, the bundle is asked for

Nobody answers for another: the broker and the ingress say who sends, and the signature is checked against the key
that this site told first. docs/adr/0017-release-keys.md says what that protects against, and what not.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from aggregator.consent import Standing, judge
from aggregator.lineage import Lineage, lineage
from federation import keys
from federation.errors import NotFound, Rejected
from federation.governance import Proposal, SignedConsent, SiteAnswer
from federation.jobs import Job
from federation.requests import AnswerRelease, Consent, ProposeRelease, Request
from federation.signatures import verifies
from federation.types import SERVER, LogRecord
from federation.wire import ReleaseProposed
from storage.control import pin_key
from storage.models import load_full_model
from storage.releases import (
    MODEL,
    Release,
    append_record,
    is_released,
    load_proposal,
    load_release,
    proposed_versions,
    save_proposal,
    sha256,
)
from storage.tensors import encode
from tasks import celery
from tasks.context import Context
from tasks.steer import owned_job
from tasks.tell import hint

MAX_ANSWERS = 50
"""Of one site to one proposal: each is read again with every later one."""
CLOCK_TOLERANCE = timedelta(hours=1)
"""How far ahead a site's clock may be: an answer from the future would hide the later ones."""


def propose(context: Context, request: Request) -> str:
    """Ask each contributor. Raises NotFound, Rejected. Asking for the same again asks again who has not answered."""
    asked = request.what
    assert isinstance(asked, ProposeRelease)
    job = owned_job(context, request, asked.job)
    stored = context.log(job.id).version(asked.version)
    parts = _releasable(job, list(context.log(job.id).history()), asked.version).parts
    proposal = load_proposal(context.store, job.id, asked.version)
    if proposal is None:
        file = encode(load_full_model(context.store, job, stored.model))
        # put before the question: what is asked about can then never be missing
        context.store.put_if_absent(keys.bundle_key(job.id, asked.version, MODEL), file)
        proposal = Proposal(
            job=job.id,
            version=asked.version,
            model_sha256=stored.model.sha256,
            file_sha256=sha256(file),
            file_bytes=len(file),
            purpose=asked.purpose,
            contributors=tuple(sorted(parts)),
            by=request.who,
            at=request.at,
        )
        if not save_proposal(context.store, proposal):
            proposal = load_proposal(context.store, job.id, asked.version) or proposal
    if proposal.purpose != asked.purpose:
        raise Rejected(
            f"version {asked.version} of {job.id} was proposed for another purpose already: {proposal.purpose!r}"
        )
    release = load_release(context.store, job.id, asked.version)
    assert release is not None
    standing = standing_of(job, release)
    for site in standing.waiting:
        hint(context, ReleaseProposed(job=job.id, version=asked.version), site)
    return f"version {asked.version} of {job.id} is proposed: {standing.describe()}"


def _releasable(job: Job, records: list[LogRecord], version: int) -> Lineage:
    """What the version is made of. Raises Rejected if it is none to give away."""
    head = records[-1].head
    if head.quarantine is not None and version >= head.quarantine.version:
        raise Rejected(
            f"version {version} of {job.id} is in quarantine ({head.quarantine.reason}): clear it first, or "
            f"propose version {head.quarantine.offered.version}"
        )
    if version not in lineage(records, head.version).line:
        raise Rejected(
            f"version {version} of {job.id} was rolled back: propose one that is not, `fedqueue model list` shows them"
        )
    found = lineage(records, version)
    if not found.parts:
        raise Rejected(
            f"no site's work is in version {version} of {job.id}, so there is nobody to ask: `fedqueue model pull` "
            "and `export` write it to a file"
        )
    return found


def standing_of(job: Job, release: Release) -> Standing:
    """By the job's rule and the newest answers."""
    return judge(job.spec.release, release.proposal.contributors, release.approves)


def answer(context: Context, request: Request) -> str:
    """Keep a contributor's answer. Raises NotFound, Rejected. A later answer of the same site replaces it."""
    asked = request.what
    assert isinstance(asked, AnswerRelease)
    job = context.job(asked.job)
    if request.who == SERVER:
        raise Rejected("a contributor answers itself, with its own key: an operator cannot", "not-yours")
    release = load_release(context.store, job.id, asked.version)
    if release is None:
        raise NotFound(f"nobody has proposed to release version {asked.version} of {job.id}")
    consent = _checked(request, asked, release.proposal)
    pin_key(context.store, request.who, asked.public_key)
    signed = SignedConsent(signed=asked.signed, public_key=asked.public_key, signature=asked.signature)
    record = SiteAnswer(site=request.who, consent=signed, received_at=datetime.now(UTC))
    while not _is_known(release, record):
        if release.decision is not None:
            raise Rejected(
                f"version {asked.version} of {job.id} was released at {release.decision.at:%Y-%m-%d %H:%M:%S} UTC by "
                "the answers of before: this one comes too late",
                "released",
            )
        newest = release.newest.get(request.who)
        if newest is not None and consent.at <= newest.consent.consent().at:
            raise Rejected(
                f"site {request.who} has given a later answer, at {newest.consent.consent().at.isoformat()}: "
                "answer again if it is to change (is the clock right?)"
            )
        if sum(known.site == request.who for known in release.answers) >= MAX_ANSWERS:
            raise Rejected(f"site {request.who} has answered {MAX_ANSWERS} times: the last answer stays")
        append_record(context.store, release, record)
        release = load_release(context.store, job.id, asked.version) or release
    standing = standing_of(job, release)
    if standing.met or release.decision is not None:
        context.send(celery.WRITE_RELEASE, {"job": job.id, "version": str(asked.version)})
        return f"answer recorded ({consent.answer}); {standing.describe()}: the bundle is being written"
    return f"answer recorded ({consent.answer}); {standing.describe()}"


def _checked(request: Request, asked: AnswerRelease, proposal: Proposal) -> Consent:
    """What was signed, if this site may sign it, and has. Raises Rejected."""
    site = request.who
    if site not in proposal.contributors:
        raise Rejected(f"no work of site {site} is in version {asked.version} of {asked.job}", "not-yours")
    consent = Consent.from_json(asked.signed)
    expected = {
        "job": proposal.job,
        "version": proposal.version,
        "model_sha256": proposal.model_sha256,
        "file_sha256": proposal.file_sha256,
        "purpose": proposal.purpose,
        "site": site if consent.site is not None else None,
    }
    wrong = [name for name, value in expected.items() if getattr(consent, name) != value]
    if wrong:
        raise Rejected(f"what is signed is not what was asked: {', '.join(wrong)} differ from the proposal")
    if not verifies(asked.public_key, asked.signature, asked.signed):
        raise Rejected("the signature is not of this text by this key", "bad-signature")
    if consent.at > datetime.now(UTC) + CLOCK_TOLERANCE:
        raise Rejected(
            f"signed at {consent.at.isoformat()}, which is in the future: set this machine's clock"
        )
    return consent


def _is_known(release: Release, record: SiteAnswer) -> bool:
    """Whether this very answer is there: requests come twice."""
    return any(
        known.site == record.site and known.consent.signed == record.consent.signed
        for known in release.answers
    )


def ask_for_bundles(context: Context, job: Job) -> None:
    """Once more for every release whose rule is met and whose bundle is not there: a request may have been lost."""
    for version in proposed_versions(context.store, job.id):
        if is_released(context.store, job.id, version):
            continue
        release = load_release(context.store, job.id, version)
        if release is not None and (release.decision is not None or standing_of(job, release).met):
            context.send(celery.WRITE_RELEASE, {"job": job.id, "version": str(version)})
