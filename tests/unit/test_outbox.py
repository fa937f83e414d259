"""The outbox keeps an update, whole or not at all, until its fate is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from producers.outbox import Outbox
from tests.factories import client_update


def test_an_entry_survives_a_new_agent_under_the_same_id(tmp_path: Path) -> None:
    update, payload = client_update(), b"tensors"
    Outbox(tmp_path).put(update, payload)
    again = Outbox(tmp_path)
    assert list(again.waiting()) == [update]
    assert again.payload(update) == payload


def test_entries_come_oldest_first_whatever_the_file_times_say(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    updates = [client_update() for _ in range(5)]
    for number, update in enumerate(updates):
        outbox.put(update, b"x")
        stamp = 10_000 - number
        os.utime(tmp_path / "out" / f"{update.update_id}.json", (stamp, stamp))
    assert [u.update_id for u in Outbox(tmp_path).waiting()] == sorted(u.update_id for u in updates)


def test_a_confirmed_entry_is_remembered_until_it_is_settled(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    update = client_update()
    outbox.put(update, b"x")
    outbox.confirmed(update)
    assert list(outbox.waiting()) == []
    assert Outbox(tmp_path).sent() == [update]
    assert list((tmp_path / "out").iterdir()) == []
    assert outbox.settle(update.update_id)
    assert not outbox.settle(update.update_id)
    assert outbox.sent() == []


def test_an_uncommitted_payload_is_cleared_away(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    kept = client_update()
    outbox.put(kept, b"kept")
    lost = client_update()
    (tmp_path / "out" / f"{lost.update_id}.safetensors").write_bytes(b"half")
    (tmp_path / "out" / f"{lost.update_id}.json.tmp").write_bytes(b"{")
    again = Outbox(tmp_path)
    assert list(again.waiting()) == [kept]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{kept.update_id}.json",
        f"{kept.update_id}.safetensors",
    ]


_WRITER = """
import sys
from pathlib import Path
from producers.outbox import Outbox
from tests.factories import client_update
outbox = Outbox(Path(sys.argv[1]))
while True:
    update = client_update()
    outbox.put(update, update.update_id.encode() * 1000)
    print(update.update_id, flush=True)
"""


@pytest.mark.parametrize("count", [1, 7])
def test_kill_9_between_any_two_writes_loses_nothing_that_was_put(tmp_path: Path, count: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        put = [writer.stdout.readline().strip() for _ in range(count)]
        writer.send_signal(signal.SIGKILL)
    outbox = Outbox(tmp_path)
    kept = {update.update_id: update for update in outbox.waiting()}
    assert set(put) <= set(kept)
    for update_id, update in kept.items():
        assert outbox.payload(update) == update_id.encode() * 1000
