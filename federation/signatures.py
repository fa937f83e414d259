"""Ed25519 signatures (RFC 8032) by which a site vouches for its answer, and the fingerprints of their keys.

Keys and signatures travel as hexadecimal text. What is signed is text, too: its UTF-8 bytes, exactly.
"""

from __future__ import annotations

import hashlib
import re

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from federation.errors import BadSettings

FINGERPRINT_BYTES = 16
"""Of the SHA-256 of the key: nobody finds another key with the same 128 bits, and people can read them out."""


class SigningKey:
    """A private key. It is made where it is used, and never leaves that machine."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def new(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes) -> SigningKey:
        """Raises BadSettings if it is no Ed25519 key without a password."""
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as exc:
            raise BadSettings(f"no private key in PEM: {exc}") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise BadSettings("a private key of another kind than Ed25519")
        return cls(key)

    def to_pem(self) -> bytes:
        """PKCS #8, not encrypted."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def public_key(self) -> str:
        """64 hexadecimal digits."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, text: str) -> str:
        """128 hexadecimal digits."""
        return self._key.sign(text.encode()).hex()


def verifies(public_key: str, signature: str, text: str) -> bool:
    """True if `signature` was made of `text` with the private half of `public_key`."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), text.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(public_key: str) -> str:
    """What people compare by telephone: eight groups of four hexadecimal digits."""
    digits = hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[: 2 * FINGERPRINT_BYTES]
    return "-".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def is_fingerprint(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{4}(-[0-9a-f]{4}){7}", text) is not None
