"""Ed25519 as RFC 8032 has it, and the key file of a site."""

from __future__ import annotations

import re
import stat
import threading
from pathlib import Path

import pytest

from federation.errors import BadSettings, StoreUnavailable
from federation.requests import Consent
from federation.signatures import SigningKey, fingerprint, is_fingerprint, verifies
from producers.site_key import NAME, site_key

# RFC 8032 §7.1, TEST 2: the message is the one byte 0x72
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_the_example_of_the_rfc() -> None:
    assert verifies(PUBLIC, SIGNATURE, "r")
    assert not verifies(PUBLIC, SIGNATURE, "s")


def test_a_signature_is_of_one_text_and_one_key() -> None:
    key, other = SigningKey.new(), SigningKey.new()
    text = '{"answer":"approve","reason":"für Graz"}'
    signature = key.sign(text)
    assert verifies(key.public_key, signature, text)
    assert not verifies(key.public_key, signature, text + " ")
    assert not verifies(other.public_key, signature, text)
    assert not verifies(key.public_key, other.sign(text), text)
    assert not verifies(key.public_key, "00" * 64, text)
    assert not verifies("zz" * 32, signature, text)


def test_a_fingerprint_can_be_read_out() -> None:
    assert fingerprint(PUBLIC) == "39f7-13d0-a644-253f-0452-9421-b9f5-1b9b"
    assert is_fingerprint(fingerprint(PUBLIC))
    assert not is_fingerprint(PUBLIC)
    assert fingerprint(SigningKey.new().public_key) != fingerprint(PUBLIC)


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    first = site_key(state)
    assert stat.S_IMODE((state / NAME).stat().st_mode) == 0o600
    assert site_key(state).public_key == first.public_key
    assert [path.name for path in state.iterdir()] == [NAME]
    assert b"PRIVATE KEY" in (state / NAME).read_bytes()


def test_who_makes_it_at_the_same_time_gets_the_same_key(tmp_path: Path) -> None:
    found: list[str] = []
    start = threading.Barrier(4)

    def make() -> None:
        start.wait()
        found.append(site_key(tmp_path).public_key)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_broken_key_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("nonsense")
    with pytest.raises(BadSettings, match="restore it from a backup"):
        site_key(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"release\.key cannot be used"):
        site_key(tmp_path / "file")


def test_the_example_of_the_protocol_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    found = dict(re.findall(r"^    (public key|fingerprint|signed|signature) +(\S.*)$", text, re.M))
    assert len(found) == 4
    assert verifies(found["public key"], found["signature"], found["signed"])
    assert fingerprint(found["public key"]) == found["fingerprint"]
    assert Consent.from_json(found["signed"]).answer == "approve"
