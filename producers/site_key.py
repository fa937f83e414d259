"""The key by which this site signs: made on its machine at the first use, and never sent anywhere.

`<site_state>/release.key`, PKCS #8 in PEM, readable by its owner alone. Only the public half leaves.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from federation.errors import BadSettings, StoreUnavailable
from federation.signatures import SigningKey
from storage.files import sync_folder

NAME = "release.key"


def site_key(state: Path) -> SigningKey:
    """The key of this state folder; made if there is none. Agent and commands may call it at the same time.

    Raises BadSettings if the file is no such key, StoreUnavailable if the folder cannot be used.
    """
    path = state / NAME
    try:
        if not path.exists():
            state.mkdir(parents=True, exist_ok=True)
            _write_once(path, SigningKey.new().to_pem())
        return SigningKey.from_pem(path.read_bytes())
    except BadSettings as exc:
        raise BadSettings(f"{path}: {exc}: restore it from a backup") from exc
    except OSError as exc:
        raise StoreUnavailable(f"the site's key {path} cannot be used: {exc}") from exc


def _write_once(path: Path, pem: bytes) -> None:
    """Whole and durable, for its owner alone; if another process was first, its key stays."""
    temporary = path.with_name(f"~{uuid.uuid4().hex}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(fd)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
