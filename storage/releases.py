"""What is stored of a release: the question, the answers in their order, and the bundle.

proposal.json                written once; bundle/model.safetensors before it: the very file that is asked about
answers/<n>.json             a small log: the next number by put-if-absent. A Decision ends it, so an answer
                             came either before the decision, and counts, or finds it there
bundle/SHA256SUMS            written last: without it there is no bundle
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from federation import keys
from federation.errors import AccessDenied, BadPayload, CorruptLog, NotFound
from federation.governance import Decision, Proposal, ReleaseRecord, SiteAnswer
from federation.signatures import verifies
from storage.blob import BlobStore
from storage.reading import load_value

MODEL = "model.safetensors"
ONNX = "model.onnx"
CARD = "card.json"
CARD_TEXT = "MODEL_CARD.md"
CONSENTS = "consents.json"
SUMS = "SHA256SUMS"
BUNDLE_FILES = (MODEL, ONNX, CARD, CARD_TEXT, CONSENTS)
"""What SHA256SUMS may name; only the ONNX file may be missing."""
MAX_SUMS_BYTES = 4096
MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class Release:
    """A proposal, and what became of it so far."""

    proposal: Proposal
    records: tuple[SiteAnswer | Decision, ...]

    @property
    def decision(self) -> Decision | None:
        last = self.records[-1] if self.records else None
        return last if isinstance(last, Decision) else None

    @property
    def answers(self) -> tuple[SiteAnswer, ...]:
        """All of them, oldest first."""
        return tuple(record for record in self.records if isinstance(record, SiteAnswer))

    @property
    def newest(self) -> dict[str, SiteAnswer]:
        """By site."""
        return {answer.site: answer for answer in self.answers}

    @property
    def approves(self) -> dict[str, bool]:
        """What each site answered last."""
        return {site: answer.consent.consent().answer == "approve" for site, answer in self.newest.items()}


def save_proposal(store: BlobStore, proposal: Proposal) -> bool:
    """False if there is another one of this version already."""
    return store.put_if_absent(keys.proposal_key(proposal.job, proposal.version), proposal.to_json())


def load_proposal(store: BlobStore, job: str, version: int) -> Proposal | None:
    """None: nobody has proposed this version. A site's account may ask this."""
    try:
        return load_value(store, keys.proposal_key(job, version), Proposal)
    except (NotFound, AccessDenied):  # a site's account is told 403 for an object that is not there
        return None


def load_release(store: BlobStore, job: str, version: int) -> Release | None:
    """None: nobody has proposed this version. A site's account may ask this. Raises CorruptLog."""
    proposal = load_proposal(store, job, version)
    if proposal is None:
        return None
    records = []
    for number, key in enumerate(store.list(keys.release_records_prefix(job, version))):
        if key != keys.release_record_key(job, version, number):
            raise CorruptLog(f"{key} comes where answer {number} should: restore that from a backup")
        records.append(load_value(store, key, ReleaseRecord).record)
    return Release(proposal, tuple(records))


def append_record(store: BlobStore, release: Release, record: SiteAnswer | Decision) -> bool:
    """Write `record` after those of `release`. False if another one is there: load the release and decide again."""
    proposal = release.proposal
    key = keys.release_record_key(proposal.job, proposal.version, len(release.records))
    return store.put_if_absent(key, ReleaseRecord(record=record).to_json())


def proposed_versions(store: BlobStore, job: str) -> Iterator[int]:
    """Versions of which anything of a release is stored, ascending. A site's account may ask this."""
    prefix = keys.releases_prefix(job)
    after = ""
    while key := next(iter(store.list(prefix, start_after=after)), None):
        number = key.removeprefix(prefix).partition("/")[0]
        if number.isascii() and number.isdigit():
            yield int(number)
        # "0" comes right after "/", so this skips all that lies below this version and nothing else
        after = f"{prefix}{number}0"


def is_released(store: BlobStore, job: str, version: int) -> bool:
    """Whether the bundle is there, whole. By listing, which a site's account may do."""
    key = keys.bundle_key(job, version, SUMS)
    return key in store.list(keys.bundle_prefix(job, version))


def keep_file(store: BlobStore, job: str, version: int, name: str, data: bytes) -> bytes:
    """Write a file of the bundle if it is not there; returns what is there, which may be another worker's."""
    key = keys.bundle_key(job, version, name)
    return (
        data if store.put_if_absent(key, data) else store.get(key, max_bytes=2 * len(data) + MAX_TEXT_BYTES)
    )


def load_file(store: BlobStore, job: str, version: int, name: str, max_bytes: int) -> bytes | None:
    """None: it is not there."""
    try:
        return store.get(keys.bundle_key(job, version, name), max_bytes=max_bytes)
    except NotFound:
        return None


def defects(store: BlobStore, job: str, version: int, *, digests: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with the release of `version`: object key, and what is the matter. digests: read every file."""
    prefix = keys.release_prefix(job, version)
    try:
        release = load_release(store, job, version)
        if release is None:
            return  # a worker died between the file and the question
        for number, answer in enumerate(release.answers):
            consent = answer.consent
            if not verifies(consent.public_key, consent.signature, consent.signed):
                key = keys.release_record_key(job, version, number)
                yield key, f"is an answer of {answer.site} that its key has not signed"
        if not is_released(store, job, version):
            return
        data = store.get(keys.bundle_key(job, version, SUMS), max_bytes=MAX_SUMS_BYTES)
        for name, digest in parse_sums(data).items():
            key = keys.bundle_key(job, version, name)
            size = store.size(key)
            if digests and sha256(store.get(key, max_bytes=size)) != digest:
                yield key, f"is not the file that {SUMS} names"
    except (CorruptLog, BadPayload, NotFound) as exc:
        yield prefix, str(exc)


def sums(digests: Mapping[str, str]) -> bytes:
    """SHA256SUMS of these files, as sha256sum(1) reads it. digests: name -> sha256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def parse_sums(data: bytes) -> dict[str, str]:
    """Raises CorruptLog if it is not what `sums` writes of a bundle."""
    lines = data.decode("utf-8", "replace").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if sums(digests) != data or not set(BUNDLE_FILES) - {ONNX} <= digests.keys() <= set(BUNDLE_FILES):
        raise CorruptLog(f"{SUMS} is not that of a release: fetch the bundle again")
    return digests


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
