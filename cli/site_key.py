"""`fedqueue site key`: what a site tells the others of the key by which it signs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import console, fail, load
from federation.errors import FedqueueError
from federation.settings import env_name
from federation.signatures import fingerprint

StateFolder = Annotated[
    Path | None,
    typer.Option(envvar=env_name("site_state"), help="folder of this site's outbox, model cache and key"),
]


def key(state: StateFolder = None) -> None:
    """Show this site's public key and its fingerprint, to be told to the others by telephone or in a contract.

    The private half is in release.key of the state folder, made at the first use; it never leaves this machine.

    Example: fedqueue site key
    """
    settings = load(site_state=state)
    from producers.site_key import NAME, site_key

    try:
        public_key = site_key(settings.site_state).public_key
    except FedqueueError as exc:
        fail(exc)
    for what, value in {
        "public key": public_key,
        "fingerprint": fingerprint(public_key),
        "private key": f"{settings.site_state / NAME} (keep it secret, and a copy in a safe)",
    }.items():
        console.print(f"{what:12} {value}", markup=False, highlight=False, soft_wrap=True)
