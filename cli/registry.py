"""`fedqueue model promote`, `rollback`, `clear`: what is decided about a version. Each is one record of the server."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cli.asking import WaitS, ask
from cli.options import BrokerUrl, JobArgument, StoreUrl, fail, load
from cli.versions import Wanted, number_of
from federation.errors import FedqueueError
from federation.requests import MAX_REASON, SteerModel
from storage.open import open_store

Why = Annotated[
    str, typer.Option("--reason", envvar="FEDQUEUE_CLI_REASON", help="why, in words; it goes to the log")
]


def promote(
    job: JobArgument,
    version: Wanted,
    wait_s: WaitS = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Make a version the stable one, which `--version stable` and `site deploy --channel stable` use from now on.

    Example: fedqueue model promote street best
    """
    _steer("promote", job, version, "", wait_s, broker_url, store_url)


def rollback(
    job: JobArgument,
    version: Wanted,
    reason: Why = "",
    wait_s: WaitS = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Make a new version whose model is that of an older one. Those in between are abandoned, a quarantine ends.

    Updates that were trained from an abandoned version are refused, older ones are merged.

    Example: fedqueue model rollback street 40 --reason "worse at night"
    """
    _steer("rollback", job, version, reason, wait_s, broker_url, store_url)


def clear(
    job: JobArgument,
    version: Annotated[
        int, typer.Argument(envvar="FEDQUEUE_CLI_VERSION", min=1, help="the version that is in quarantine")
    ],
    wait_s: WaitS = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Take a version out of quarantine: it is good after all, and what is as good as it is, too.

    Example: fedqueue model clear street 44
    """
    _steer("clear", job, str(version), "", wait_s, broker_url, store_url)


def _steer(
    action: Literal["promote", "rollback", "clear"],
    job: str,
    version: str,
    reason: str,
    wait_s: float,
    broker_url: str | None,
    store_url: str | None,
) -> None:
    if len(reason) > MAX_REASON:
        fail(f"--reason: at most {MAX_REASON} characters")
    settings = load(broker_url=broker_url, store_url=store_url)
    try:
        store = open_store(settings)
        number = number_of(store, job, version)
    except FedqueueError as exc:
        fail(exc)
    ask(settings, store, SteerModel(job=job, action=action, version=number, reason=reason), wait_s)
