"""fedqueue.write_release: a release whose rule is met becomes a bundle that can be given away.

    model.safetensors   all tensors; there since the proposal, because the sites' signatures name its digest
    model.onnx          if the architecture can be exported; else the card says why not
    card.json, MODEL_CARD.md, consents.json
    SHA256SUMS          written last

Runs in the evaluation worker, which has torch for the export. First the slow part, then the decision: an answer that
comes before it still counts. After it everything follows from what is stored, each file is written by
put-if-absent and read back if it was there, and so a worker that dies, or two at once, make one bundle.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from aggregator.consent import judge
from aggregator.lineage import lineage
from federation.errors import BadJob, BadSettings, CorruptLog
from federation.governance import Card, Consents, Decision
from federation.jobs import Job
from storage.jobs import list_evaluations
from storage.releases import (
    CARD,
    CARD_TEXT,
    CONSENTS,
    MODEL,
    ONNX,
    SUMS,
    Release,
    append_record,
    is_released,
    keep_file,
    load_file,
    load_release,
    sha256,
    sums,
)
from storage.tensors import decode
from tasks import celery
from tasks.context import Context, current
from tasks.model_card import make_card, to_markdown

log = logging.getLogger("fedqueue.release")


@celery.task(celery.WRITE_RELEASE)
def write_release(self: Any, job: str, version: str) -> None:
    """Write the bundle of `version` of `job`, if its rule is met and it is not there. Asking twice is harmless."""
    write(current(), job, int(version))


def write(context: Context, job_id: str, version: int) -> bool:
    """True if this call finished the bundle. Raises NotFound, CorruptLog, BadSettings, Transient."""
    job = context.job(job_id)
    release = load_release(context.store, job_id, version)
    if release is None or is_released(context.store, job_id, version):
        return False
    if release.decision is None and not _may_decide(context, job, release):
        return False
    onnx, problem = _export(context, job, release)
    decided = _decide(context, job, release)
    if decided is None:
        log.info("%s: version %d: it is not to be released any more, nothing is written", job_id, version)
        return False
    if onnx is not None:
        onnx = keep_file(context.store, job_id, version, ONNX, onnx)
    _finish(context, job, decided, onnx, problem)
    log.info("%s: version %d is released", job_id, version)
    return True


def _may_decide(context: Context, job: Job, release: Release) -> bool:
    """The rule is met, and the version is neither in quarantine nor rolled back since it was proposed."""
    proposal = release.proposal
    if not judge(job.spec.release, proposal.contributors, release.approves).met:
        return False
    withdrawn = context.log(job.id).head().head.withdrawn(proposal.version)
    if withdrawn is not None:
        log.warning("%s: version %d is approved, but it is %s", job.id, proposal.version, withdrawn)
    return withdrawn is None


def _decide(context: Context, job: Job, release: Release) -> Release | None:
    """The release with its decision; None if it may not be decided any more."""
    while release.decision is None:
        newest = load_release(context.store, job.id, release.proposal.version)
        if newest is None or (newest.decision is None and not _may_decide(context, job, newest)):
            return None
        if newest.decision is None:
            append_record(context.store, newest, Decision(at=datetime.now(UTC)))
            newest = load_release(context.store, job.id, release.proposal.version) or newest
        release = newest
    return release


def _export(context: Context, job: Job, release: Release) -> tuple[bytes | None, str]:
    """The ONNX file, or why there is none. Raises BadSettings if this machine lacks what the export needs."""
    proposal = release.proposal
    data = load_file(context.store, job.id, proposal.version, MODEL, proposal.file_bytes)
    if data is None or sha256(data) != proposal.file_sha256:
        raise CorruptLog(
            f"{job.id}: {MODEL} of the release of version {proposal.version} is not what the sites were asked about: "
            "restore it from a backup"
        )
    try:
        from detection.export import export_onnx
    except ImportError as exc:
        raise BadSettings(
            f"{exc}: a worker that writes releases needs torch and onnx, pip install 'fedqueue[site,export]'"
        ) from exc
    metadata = {"job": job.id, "version": str(proposal.version), "sha256": proposal.model_sha256}
    try:
        return export_onnx(job.spec, decode(data).arrays(), metadata).data, ""
    except BadJob as exc:
        return None, str(exc)


def _finish(context: Context, job: Job, release: Release, onnx: bytes | None, problem: str) -> None:
    """Card, consents and SHA256SUMS from what is stored: the same bytes whoever writes them."""
    store, proposal, decision = context.store, release.proposal, release.decision
    assert decision is not None
    version = proposal.version
    standing = judge(job.spec.release, proposal.contributors, release.approves)
    card = make_card(
        job,
        release,
        decision,
        standing,
        lineage(context.log(job.id).history(), version),
        [found for found in list_evaluations(store, job.id) if found.version == version],
        None if onnx is None else sha256(onnx),
        problem,
    )
    kept = keep_file(store, job.id, version, CARD, card.to_json())
    card = Card.from_json(kept)  # another worker's, if it was first: its ONNX file then counts
    newest = release.newest
    consents = Consents(
        job=job.id,
        version=version,
        rule=job.spec.release,
        contributors=len(proposal.contributors),
        approvals=tuple(newest[site].consent for site in standing.approved),
    )
    digests = {MODEL: card.file_sha256, CARD: sha256(kept)}
    if card.onnx_sha256 is not None:
        digests[ONNX] = card.onnx_sha256
    for name, data in {CARD_TEXT: to_markdown(card).encode(), CONSENTS: consents.to_json()}.items():
        digests[name] = sha256(keep_file(store, job.id, version, name, data))
    keep_file(store, job.id, version, SUMS, sums(digests))
