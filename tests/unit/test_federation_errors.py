"""Errors: three families, and all survive pickling, as Celery moves them between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from federation import errors
from federation.errors import (
    AccessDenied,
    BadMessage,
    BadPayload,
    Conflict,
    Fatal,
    FedqueueError,
    NotFound,
    Rejected,
    Transient,
)

ALL = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FedqueueError)
]
FAMILIES = (Transient, Rejected, Fatal)


def test_every_error_belongs_to_one_family() -> None:
    """`except Transient` and its like are complete: who catches the families catches all but NotFound."""
    for error in ALL:
        families = [family for family in FAMILIES if issubclass(error, family)]
        assert len(families) == (0 if error in (FedqueueError, NotFound) else 1), error


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    named = [line.split("──")[1].split()[0] for line in errors.__doc__.splitlines() if "──" in line]
    assert set(named) | {"FedqueueError", "NotFound"} == {error.__name__ for error in ALL}
    assert "NotFound" in errors.__doc__


@pytest.mark.parametrize("error", ALL)
def test_every_error_says_what_it_means(error: type[FedqueueError]) -> None:
    assert error.__doc__
    assert error.__doc__.strip()


@pytest.mark.parametrize("error", ALL)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickling(error: type[FedqueueError], protocol: int) -> None:
    original = error("bucket is away: check its URL")
    found = pickle.loads(pickle.dumps(original, protocol))
    assert type(found) is error
    assert str(found) == str(original) == "bucket is away: check its URL"
    assert found.args == original.args
    assert getattr(found, "reason", None) == getattr(original, "reason", None)


@pytest.mark.parametrize("error", [e for e in ALL if issubclass(e, Rejected)])
def test_a_reason_survives_pickling_and_copying(error: type[Rejected]) -> None:
    original = error("tensor 'a' holds NaN", "not-finite")
    for found in (pickle.loads(pickle.dumps(original)), copy.copy(original), copy.deepcopy(original)):
        assert type(found) is error
        assert found.reason == "not-finite"
        assert str(found) == "tensor 'a' holds NaN"


@pytest.mark.parametrize("error", [e for e in ALL if issubclass(e, Rejected)])
def test_the_default_reason_is_a_short_stable_word(error: type[Rejected]) -> None:
    assert error("text").reason == error.reason
    assert error.reason.replace("-", "").isalpha()
    assert error.reason == error.reason.lower()
    assert len(error.reason) <= 64


def test_reasons_of_different_errors_differ() -> None:
    reasons = [error.reason for error in ALL if issubclass(error, Rejected)]
    assert len(set(reasons)) == len(reasons)


def test_families_do_not_catch_each_other() -> None:
    for raised, others in (
        (Conflict, (Rejected, Fatal, NotFound)),
        (BadPayload, (Transient, Fatal, NotFound)),
        (AccessDenied, (Transient, Rejected, NotFound)),
        (NotFound, (Transient, Rejected, Fatal)),
    ):
        assert not issubclass(raised, others)


def test_repr_shows_message_and_reason() -> None:
    assert repr(BadMessage("no", "too-large")) == "BadMessage('no', 'too-large')"
