"""Every object key in the bucket. The layout is part of the protocol (docs/protocol.md).

_probe/<random>                            written and removed: by the start-up probe, to ask for the store's time
deadletters/<id>[.<n>].json                a message nobody could handle, whole, and each of its requeues
jobs/<job>/
    job.json                               written once
    log/<20 digits>.json                   put-if-absent; the whole head after the event
    models/<sha256>[-<copy>].safetensors   immutable, named by content
    updates/<site>/<update_id>.safetensors immutable, written by the site
    rejected/<site>/<update_id>.json       reason, numbers, when
    metrics/<version>/<who>.json           evaluation results
"""

from __future__ import annotations

from federation.errors import CorruptLog

PROBE_PREFIX = "_probe/"
DEADLETTERS_PREFIX = "deadletters/"
JOBS_PREFIX = "jobs/"


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


def metrics_prefix(job: str) -> str:
    return f"{job_prefix(job)}metrics/"


def metrics_key(job: str, version: int, who: str) -> str:
    return f"{metrics_prefix(job)}{version:010d}/{who}.json"


def deadletter_key(letter_id: str) -> str:
    return f"{DEADLETTERS_PREFIX}{letter_id}.json"
