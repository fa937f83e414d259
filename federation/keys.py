"""Every object key in the bucket. The layout is part of the protocol (docs/protocol.md).

_probe/<random>                            written and removed: by the start-up probe, to ask for the store's time
deadletters/<id>[.<n>].json                a message nobody could handle, whole, and each of its requeues
announced/<job>.json                       every job, so that a site finds them without reading what they store
answers/<who>/<request_id>.json            what became of a request; who: a site, or "server" for an operator
sites/<site>.json                          the site's public key, written once
jobs/<job>/
    job.json                               written once
    log/<20 digits>.json                   put-if-absent; the whole head after the event
    models/<sha256>[-<copy>].safetensors   immutable, named by content
    updates/<site>/<update_id>.safetensors immutable, written by the site
    rejected/<site>/<update_id>.json       reason, numbers, when
    metrics/<version>/<who>.json           evaluation results
    members/<site>.json                    joined or declined, and why
    invitations/<site>.json                until when the site is invited to train
    releases/<version>/proposal.json       the question whether this version may be given away outside
    releases/<version>/answers/<n>.json    the sites' signed answers as they came, at last the decision
    releases/<version>/bundle/…            what was released, once the job's rule was met
"""

from __future__ import annotations

from federation.errors import CorruptLog

PROBE_PREFIX = "_probe/"
DEADLETTERS_PREFIX = "deadletters/"
JOBS_PREFIX = "jobs/"
ANNOUNCED_PREFIX = "announced/"
ANSWERS_PREFIX = "answers/"
SITES_PREFIX = "sites/"


def job_prefix(job: str) -> str:
    return f"{JOBS_PREFIX}{job}/"


def job_key(job: str) -> str:
    return f"{job_prefix(job)}job.json"


def log_prefix(job: str) -> str:
    return f"{job_prefix(job)}log/"


def log_key(job: str, seq: int) -> str:
    """Zero-padded, so that the order of the listing is the order of the log."""
    return f"{log_prefix(job)}{seq:020d}.json"


def log_seq(key: str) -> int:
    """The sequence number in a log key. Raises CorruptLog for a key that is none."""
    name = key.rsplit("/", 1)[-1]
    digits, suffix = name[:20], name[20:]
    if suffix != ".json" or not digits.isascii() or not digits.isdigit():
        raise CorruptLog(f"{key} is not the key of a log record: move it out of the log's prefix")
    return int(digits)


def models_prefix(job: str) -> str:
    return f"{job_prefix(job)}models/"


def model_key(job: str, sha256: str, copy: str = "") -> str:
    """`copy`: a word that makes it another object of the same content."""
    return f"{models_prefix(job)}{sha256}{copy and f'-{copy}'}.safetensors"


def updates_prefix(job: str) -> str:
    return f"{job_prefix(job)}updates/"


def update_key(job: str, site: str, update_id: str) -> str:
    return f"{updates_prefix(job)}{site}/{update_id}.safetensors"


def rejected_prefix(job: str) -> str:
    return f"{job_prefix(job)}rejected/"


def rejected_key(job: str, site: str, update_id: str) -> str:
    return f"{rejected_prefix(job)}{site}/{update_id}.json"


def metrics_prefix(job: str, version: int | None = None) -> str:
    """Of all versions, or of one."""
    return f"{job_prefix(job)}metrics/" + ("" if version is None else f"{version:010d}/")


def metrics_key(job: str, version: int, who: str) -> str:
    return f"{metrics_prefix(job, version)}{who}.json"


def deadletter_key(letter_id: str) -> str:
    return f"{DEADLETTERS_PREFIX}{letter_id}.json"


def announcement_key(job: str) -> str:
    return f"{ANNOUNCED_PREFIX}{job}.json"


def answer_key(who: str, request_id: str) -> str:
    return f"{ANSWERS_PREFIX}{who}/{request_id}.json"


def site_key(site: str) -> str:
    return f"{SITES_PREFIX}{site}.json"


def members_prefix(job: str) -> str:
    return f"{job_prefix(job)}members/"


def member_key(job: str, site: str) -> str:
    return f"{members_prefix(job)}{site}.json"


def invitations_prefix(job: str) -> str:
    return f"{job_prefix(job)}invitations/"


def invitation_key(job: str, site: str) -> str:
    return f"{invitations_prefix(job)}{site}.json"


def releases_prefix(job: str) -> str:
    return f"{job_prefix(job)}releases/"


def release_prefix(job: str, version: int) -> str:
    return f"{releases_prefix(job)}{version:010d}/"


def proposal_key(job: str, version: int) -> str:
    return f"{release_prefix(job, version)}proposal.json"


def release_records_prefix(job: str, version: int) -> str:
    return f"{release_prefix(job, version)}answers/"


def release_record_key(job: str, version: int, number: int) -> str:
    """Zero-padded, so that the order of the listing is that of the answers."""
    return f"{release_records_prefix(job, version)}{number:06d}.json"


def bundle_prefix(job: str, version: int) -> str:
    return f"{release_prefix(job, version)}bundle/"


def bundle_key(job: str, version: int, name: str) -> str:
    return f"{bundle_prefix(job, version)}{name}"
