"""Names and ids: one narrow alphabet, so that neither a key nor a routing key can be escaped."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from federation import ids
from federation.ids import NAME_PATTERN, SHA256_PATTERN, UUID7_PATTERN, Name, Sha256, UpdateId, is_name
from tests.unit.federation_cases import names, update_ids

NAME = TypeAdapter(Name)
UPDATE_ID = TypeAdapter(UpdateId)
SHA256 = TypeAdapter(Sha256)

GOOD = ["a", "7", "site-a", "a--b", "north", "x" * 63, "0-0"]
BAD = [
    "",
    "-",
    "-a",
    "a-",
    "A",
    "a.b",
    "a/b",
    "a#",
    "*",
    "..",
    ".",
    "a b",
    "a\n",
    "a\r",
    "\na",
    "a\x00",
    "ä",
    "a_b",
    "x" * 64,
    "ａ",  # a full-width letter
    "a\u0301",
]


def accepts(adapter: TypeAdapter[str], text: str) -> bool:
    try:
        adapter.validate_python(text, strict=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert is_name(name)
    assert accepts(NAME, name)


@pytest.mark.parametrize("name", BAD)
def test_names_that_would_escape(name: str) -> None:
    assert not is_name(name)
    assert not accepts(NAME, name)


@given(st.one_of(names, st.text(max_size=70), names.map(lambda n: n + "\n")))
def test_both_regex_engines_agree(text: str) -> None:
    """`is_name` uses Python's engine, the types use pydantic's: a name is one for both or for neither."""
    assert accepts(NAME, text) == is_name(text)


@given(names)
def test_a_name_is_one_word_of_a_routing_key_and_one_segment_of_a_key(name: str) -> None:
    assert not set(name) & set("./#* \n")
    assert f"updates.{name}".split(".") == ["updates", name]


@given(update_ids)
def test_update_ids_have_version_and_variant(update_id: str) -> None:
    assert accepts(UPDATE_ID, update_id)
    parsed = uuid.UUID(update_id)
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not-an-id",
        str(uuid.UUID(int=0)),
        "0190b5a0-0000-4000-8000-000000000000",  # version 4
        "0190b5a0-0000-7000-c000-000000000000",  # another variant
        "0190B5A0-0000-7000-8000-000000000000",  # one spelling only: an id is compared as text
        "0190b5a0000070008000000000000000",
        "0190b5a0-0000-7000-8000-000000000000\n",
        " 0190b5a0-0000-7000-8000-000000000000",
        "0190b5a0-0000-7000-8000-00000000000/",
    ],
)
def test_what_is_no_update_id(text: str) -> None:
    assert not accepts(UPDATE_ID, text)
    assert re.match(UUID7_PATTERN, text) is None


def test_new_ids_are_version_7_and_differ() -> None:
    made = [ids.new_update_id() for _ in range(2000)]
    assert len(set(made)) == len(made)
    for text in made:
        assert accepts(UPDATE_ID, text)
        assert uuid.UUID(text).version == 7
        assert uuid.UUID(text).variant == uuid.RFC_4122


def test_new_ids_carry_the_time_and_sort_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = 1_700_000_000_123
    made = []
    for step in range(200):
        now = (start + 7 * step) * 1_000_000
        monkeypatch.setattr("federation.ids.time.time_ns", lambda now=now: now)
        made.append(ids.new_update_id())
    assert made == sorted(made)
    assert [uuid.UUID(text).int >> 80 for text in made] == [start + 7 * step for step in range(200)]


def test_new_ids_use_all_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over some ids every bit but version and variant is seen both as 0 and as 1."""
    monkeypatch.setattr("federation.ids.time.time_ns", lambda: 0)
    ones, zeros = 0, 0
    for _ in range(200):
        number = uuid.UUID(ids.new_update_id()).int & (1 << 80) - 1
        ones, zeros = ones | number, zeros | ~number
    fixed = 0xF << 76 | 0x3 << 62
    random = (1 << 80) - 1 & ~fixed
    assert ones & random == random
    assert zeros & random == random


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_what_is_no_digest(text: str) -> None:
    assert not accepts(SHA256, text)
    assert re.match(SHA256_PATTERN, text) is None


def test_a_digest() -> None:
    assert accepts(SHA256, "0123456789abcdef" * 4)
    assert re.match(NAME_PATTERN, "site-a")
