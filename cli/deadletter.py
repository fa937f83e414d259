"""`fedqueue deadletter …`: what nobody could handle: look at it, and send it on its way again."""

from __future__ import annotations

import base64
import re
from typing import Annotated

import typer
from rich.markup import escape

from broker.open import connect, declare
from cli.options import BrokerUrl, StoreUrl, chosen_store, console, export, fail, load
from federation.errors import BadMessage, FedqueueError, NotFound
from federation.types import DeadLetter
from storage.blob import BlobStore
from storage.jobs import list_dead_letters, load_dead_letter
from storage.open import open_store

app = typer.Typer(help="Messages that nobody could handle.", no_args_is_help=True)

SHOWN = 110
"""Characters of an explanation in the list."""
LETTER_ID = re.compile(r"[0-9a-f-]{36}")


@app.command("list")
def list_letters(store_url: StoreUrl = None) -> None:
    """The letters that wait, newest last. What was requeued is not among them, unless it failed again.

    Example: fedqueue deadletter list
    """
    store = chosen_store(store_url)
    rows = [("id", "when (UTC)", "queue", "reason", "who", "message")]
    for letter in _waiting(store):
        message = letter.message if len(letter.message) <= SHOWN else f"{letter.message[: SHOWN - 1]}…"
        when, who = f"{letter.at:%Y-%m-%d %H:%M:%S}", _one_line(letter.user_id or "server")
        rows.append((letter.id, when, letter.queue, letter.reason, who, _one_line(message)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        # rich's table would break the ids, or the lines of a file, to fit its width
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="from `fedqueue deadletter list`")],
    store_url: StoreUrl = None,
) -> None:
    """Everything that is known of one letter, with its body if that is text.

    Example: fedqueue deadletter show 0b0c3d5e-7f4a-9c1d-2e3f-4a5b6c7d8e9f
    """
    store = chosen_store(store_url)
    found = _find(store, letter)
    for name, value in found.model_dump(mode="json", exclude={"body_base64", "schema_version"}).items():
        if value is not None:
            _print(f"{name:17s} {value}")
    _print_body(base64.b64decode(found.body_base64))


@app.command()
def requeue(
    letters: Annotated[
        list[str] | None, typer.Argument(metavar="ID…", help="from `fedqueue deadletter list`")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", envvar="FEDQUEUE_CLI_ALL", help="all letters that wait")
    ] = False,
    reason: Annotated[
        str | None, typer.Option(envvar="FEDQUEUE_CLI_REASON", help="with --all: only those with this reason")
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(envvar="FEDQUEUE_CLI_LETTER_QUEUE", help="with --all: only those of this queue"),
    ] = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Send messages on their way again, after their cause is gone. Doing it twice counts nothing twice.

    What fails again is in the list again. What is no valid message, or was kept in part, stays: exit status 1.

    Example: fedqueue deadletter requeue --all --reason unknown-job
    """
    if every == bool(letters):
        fail("name letters, or --all")
    if letters and (reason or queue):
        fail("--reason and --queue choose among --all")
    settings = load(broker_url=broker_url, store_url=store_url)
    store = open_store(settings)
    if every:
        chosen = [m for m in _waiting(store) if reason in (None, m.reason) and queue in (None, m.queue)]
    else:
        chosen = [_find(store, text) for text in letters or ()]
    export(settings)
    from tasks.celery import sender
    from tasks.deadletters import requeue as send_again

    stay = 0
    broker = connect(settings)
    try:
        declare(settings)
        send = sender(settings, broker)
        for letter in chosen:
            try:
                _print(f"{letter.id}  sent again as {send_again(store, send, letter)}")
            except BadMessage as exc:
                stay += 1
                _print(f"{letter.id}  stays, {exc.reason}: {exc}")
    except FedqueueError as exc:
        fail(exc)
    finally:
        broker.close()
    _print(f"{len(chosen) - stay} sent again, {stay} stay")
    if stay:
        raise typer.Exit(1)


def _waiting(store: BlobStore) -> list[DeadLetter]:
    """Newest last."""
    try:
        return sorted(list_dead_letters(store), key=lambda letter: letter.at)
    except FedqueueError as exc:
        fail(exc)


def _find(store: BlobStore, letter_id: str) -> DeadLetter:
    """Requeued or not. Exits if there is none."""
    unknown = f"there is no dead letter {letter_id!r}: `fedqueue deadletter list` lists those that wait"
    if not LETTER_ID.fullmatch(letter_id):
        fail(escape(unknown))
    try:
        return load_dead_letter(store, letter_id)
    except NotFound:
        fail(unknown)
    except FedqueueError as exc:
        fail(exc)


def _print_body(body: bytes) -> None:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        _print(f"body, {len(body)} bytes, not text, in base64:")
        _print(base64.b64encode(body).decode())
    else:
        _print(f"body, {len(body)} bytes:")
        _print(text)


def _print(text: str) -> None:
    """By lines, with what a terminal would obey escaped: the text may be anybody's."""
    for line in text.split("\n"):
        console.print(_one_line(line), markup=False, highlight=False, soft_wrap=True)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
