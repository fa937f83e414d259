"""Is a bundle what the sites consented to? From its files alone, and fingerprints that were told another way.

What a site signed is the digest of model.safetensors, job, version and purpose. So these can be forged by nobody who
has not the sites' keys. All else (figures, shares, the ONNX file) is the word of whoever wrote the bundle: SHA256SUMS
shows that it was not damaged since, no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aggregator.consent import needed
from federation.errors import FedqueueError
from federation.governance import Card, Consents
from federation.requests import Consent
from federation.signatures import fingerprint, verifies
from storage.releases import CARD, CONSENTS, MODEL, ONNX, SUMS, parse_sums


@dataclass(frozen=True)
class Approval:
    """A signature that holds. `site`: as it lets itself be named. `known_as`: whose key it is, of those given."""

    site: str | None
    fingerprint: str
    known_as: str | None


@dataclass(frozen=True)
class Checked:
    """`problems` is empty if all is well."""

    card: Card | None
    approvals: tuple[Approval, ...]
    problems: tuple[str, ...]


def check(folder: Path, keys: Mapping[str, str]) -> Checked:
    """The bundle in `folder`. keys: site -> fingerprint of its key. Writes nothing, needs no store."""
    try:
        digests = parse_sums((folder / SUMS).read_bytes())
        card = Card.from_json((folder / CARD).read_bytes())
        consents = Consents.from_json((folder / CONSENTS).read_bytes())
    except OSError as exc:
        return Checked(None, (), (f"{exc.filename}: {exc.strerror}",))
    except FedqueueError as exc:
        return Checked(None, (), (str(exc),))
    problems = _check_files(folder, digests, card)
    approvals: list[Approval] = []
    for number, signed in enumerate(consents.approvals, 1):
        try:
            consent = signed.consent()
        except FedqueueError as exc:
            problems.append(f"approval {number} cannot be read: {exc}")
            continue
        if not verifies(signed.public_key, signed.signature, signed.signed):
            problems.append(
                f"approval {number} ({consent.site or 'not named'}): its signature is forged or damaged"
            )
            continue
        if differs := _differences(card, consent):
            problems.append(f"approval {number} is of something else: {', '.join(differs)}")
            continue
        approvals.append(_approval(consent, fingerprint(signed.public_key), keys, problems))
    _check_rule(card, consents, approvals, problems)
    for site in sorted(keys.keys() - {approval.known_as for approval in approvals}):
        problems.append(f"there is no approval by the key {keys[site]} of {site}")
    return Checked(card, tuple(approvals), tuple(problems))


def _check_files(folder: Path, digests: Mapping[str, str], card: Card) -> list[str]:
    problems = []
    for name, digest in digests.items():
        try:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    problems.append(f"{name} is not the file that {SUMS} names")
        except OSError as exc:
            problems.append(f"{name}: {exc.strerror}")
    for name, expected in {MODEL: card.file_sha256, ONNX: card.onnx_sha256}.items():
        if digests.get(name) != expected:
            problems.append(f"{SUMS} and {CARD} name different files {name}")
    return problems


def _differences(card: Card, consent: Consent) -> list[str]:
    """In what the text that was signed is not an approval of this card's model."""
    expected = {
        "job": card.job,
        "version": card.version,
        "model_sha256": card.model_sha256,
        "file_sha256": card.file_sha256,
        "purpose": card.purpose,
        "answer": "approve",
    }
    return [name for name, value in expected.items() if getattr(consent, name) != value]


def _approval(consent: Consent, made_by: str, keys: Mapping[str, str], problems: list[str]) -> Approval:
    """made_by: fingerprint of the key that signed."""
    told = keys.get(consent.site or "")
    if told is not None and told != made_by:
        problems.append(
            f"{consent.site} is said to have signed with the key {made_by}, but its key is {told}"
        )
    known_as = next((site for site, known in keys.items() if known == made_by), None)
    if known_as is not None and consent.site not in (None, known_as):
        problems.append(
            f"{consent.site} is said to have signed with the key {made_by}, which is that of {known_as}"
        )
    return Approval(consent.site, made_by, known_as)


def _check_rule(card: Card, consents: Consents, approvals: list[Approval], problems: list[str]) -> None:
    if (consents.job, consents.version, consents.rule, consents.contributors) != (
        card.job,
        card.version,
        card.rule,
        card.contributors,
    ):
        problems.append(f"{CONSENTS} and {CARD} do not tell of the same release")
    count = len({approval.fingerprint for approval in approvals})
    if count < len(approvals):
        problems.append("one key has approved more than once")
    if count < needed(card.rule, card.contributors):
        problems.append(
            f"{count} of {card.contributors} contributors approved, {needed(card.rule, card.contributors)} must"
        )
    names = {approval.site for approval in approvals}
    for site in card.named:
        if site.site not in names:
            problems.append(f"{CARD} names {site.site}, which has not allowed it")
