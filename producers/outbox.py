"""Finished updates on disk, from before the first upload attempt until their fate is known.

    <folder>/out/<update_id>.safetensors   the payload; written first
    <folder>/out/<update_id>.json          the ClientUpdate; its appearance commits the entry
    <folder>/sent/<update_id>.json         confirmed by the broker, fate not yet seen in the log

Every file is written beside its place, flushed to disk and renamed, so that a crash leaves an entry whole or
not at all. Ids are UUIDv7: sorting names sorts by time. An entry keeps its id for ever, whatever fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from federation.points import Point, reach
from federation.types import ClientUpdate
from storage.files import replace_durably, sync_folder


@dataclass(frozen=True)
class Outbox:
    """The outbox of one site for one job. One process at a time."""

    folder: Path

    def __post_init__(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        self._sent.mkdir(parents=True, exist_ok=True)
        committed = {path.stem for path in self._out.glob("*.json")}
        for path in self._out.iterdir():
            if path.suffix != ".json" and path.stem not in committed:
                path.unlink()  # payloads and temporary files of entries that a crash left uncommitted

    @property
    def _out(self) -> Path:
        return self.folder / "out"

    @property
    def _sent(self) -> Path:
        return self.folder / "sent"

    def put(self, update: ClientUpdate, payload: bytes) -> None:
        """Add an entry. When this returns it survives a power cut."""
        replace_durably(self._payload(update), payload)
        reach(Point.OUTBOX_PAYLOAD)
        replace_durably(self._entry(update), update.to_json())
        reach(Point.OUTBOX_PUT)

    def waiting(self) -> Iterator[ClientUpdate]:
        """Entries that the broker has not confirmed, oldest first."""
        for path in sorted(self._out.glob("*.json")):
            yield ClientUpdate.from_json(path.read_bytes())

    def payload(self, update: ClientUpdate) -> bytes:
        return self._payload(update).read_bytes()

    def confirmed(self, update: ClientUpdate) -> None:
        """The broker has it: drop the payload, and remember the update until its fate is known."""
        os.replace(self._entry(update), self._sent / f"{update.update_id}.json")
        reach(Point.OUTBOX_MOVED)
        self._payload(update).unlink(missing_ok=True)
        sync_folder(self._out)
        sync_folder(self._sent)

    def sent(self) -> list[ClientUpdate]:
        """Confirmed by the broker, fate unknown, oldest first."""
        return [ClientUpdate.from_json(path.read_bytes()) for path in sorted(self._sent.glob("*.json"))]

    def settle(self, update_id: str) -> bool:
        """Its fate is known. True if it was one of ours."""
        try:
            (self._sent / f"{update_id}.json").unlink()
        except FileNotFoundError:
            return False
        return True

    def _entry(self, update: ClientUpdate) -> Path:
        return self._out / f"{update.update_id}.json"

    def _payload(self, update: ClientUpdate) -> Path:
        return self._out / f"{update.update_id}.safetensors"
