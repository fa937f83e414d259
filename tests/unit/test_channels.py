"""Which version a name means: latest, best and stable, in quarantine and after a rollback."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from federation.errors import NotFound
from federation.jobs import Job
from federation.types import SERVER, Evaluation, Head, Published, Quarantined
from storage.channels import check_wanted, resolve
from storage.jobs import save_evaluation, save_job
from storage.log import VersionLog
from storage.memory import MemoryStore
from tests.factories import job_spec
from tests.unit.aggregator_cases import make_ref, make_version

VALUES = {2: 0.5, 4: 0.6, 6: 0.9, 8: 0.7}


def log_of(newest: int) -> tuple[MemoryStore, VersionLog]:
    """A job with versions 0 to `newest`, every second one measured."""
    store = MemoryStore()
    save_job(
        store,
        Job(spec=job_spec(), initial=make_ref(0), max_update_bytes=1, created_at=datetime.now(UTC)),
    )
    log = VersionLog(store, "toy")
    log.create(Head(current=make_version(0)))
    for version in range(1, newest + 1):
        log.append(log.head(), Published(merged=()), Head(current=make_version(version)))
    for version, value in VALUES.items():
        if version <= newest:
            save_evaluation(
                store,
                Evaluation(
                    job="toy",
                    version=version,
                    who=SERVER,
                    num_images=10,
                    metrics={"mAP@0.5": value},
                    at=datetime.now(UTC),
                ),
            )
    return store, log


def change(log: VersionLog, **changes: object) -> None:
    head = log.head().head.model_copy(update=changes)
    log.append(log.head(), Quarantined(version=1, reason="whatever happened"), head)


def means(store: MemoryStore, wanted: str) -> int:
    return resolve(store, "toy", wanted).current.version


def test_names_of_a_job_as_it_goes() -> None:
    store, log = log_of(8)
    assert (means(store, "latest"), means(store, "best"), means(store, "3")) == (8, 6, 3)
    change(log, stable=make_version(4))
    assert means(store, "stable") == 4
    assert resolve(store, "toy", "best").reason == "mAP@0.5 0.900 by server"


def test_what_is_in_quarantine_is_neither_latest_nor_best() -> None:
    store, log = log_of(8)
    head = log.head().head
    quarantine = Head.model_validate(
        {
            **head.model_dump(),
            "quarantine": {"version": 5, "reason": "worse", "offered": make_version(4).model_dump()},
        }
    ).quarantine
    change(log, quarantine=quarantine)
    assert (means(store, "latest"), means(store, "best")) == (4, 4)
    assert resolve(store, "toy", "latest").reason == "version 5 and later are in quarantine"
    assert resolve(store, "toy", "7").reason == "in quarantine"
    assert means(store, "7") == 7


def test_what_was_rolled_back_is_not_the_best() -> None:
    store, log = log_of(8)
    change(
        log,
        abandoned=Head.model_validate(
            {"current": make_version(8).model_dump(), "abandoned": ({"first": 5, "last": 7},)}
        ).abandoned,
    )
    assert (means(store, "latest"), means(store, "best")) == (8, 8)
    assert resolve(store, "toy", "6").reason == "rolled back"


def test_what_there_is_not_is_said_with_what_to_do() -> None:
    store, _ = log_of(1)
    with pytest.raises(NotFound, match="fedqueue model promote toy"):
        resolve(store, "toy", "stable")
    with pytest.raises(NotFound, match="measured"):
        resolve(store, "toy", "best")
    with pytest.raises(NotFound, match="no stored version 9"):
        resolve(store, "toy", "9")
    with pytest.raises(NotFound):
        resolve(store, "another", "latest")


@pytest.mark.parametrize("text", ["stable", "STABLE ", "latest", "best"])
def test_channels_are_names_of_versions(text: str) -> None:
    assert check_wanted(text) == text.strip().lower()
