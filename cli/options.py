"""Flags that several commands share. Each is a setting, shows its environment variable, and wins over it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from federation import plugins
from federation.errors import FedqueueError
from federation.settings import Settings, env_name
from storage.blob import BlobStore
from storage.control import announced
from storage.open import open_store

console = Console(width=None if sys.stdout.isatty() else 110)  # a log file has no width: room for tables
errors = Console(stderr=True)

BrokerUrl = Annotated[
    str | None,
    typer.Option(envvar=env_name("broker_url"), help="amqp://user:password@host:port/vhost or sqlite:PATH"),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(envvar=env_name("store_url"), help="s3://host:port/bucket[?tls=true] or file:PATH"),
]
LiveUrl = Annotated[
    str | None, typer.Option(envvar=env_name("live_url"), help="redis://host:port/db or file:PATH")
]
JobId = Annotated[str, typer.Option("--job", envvar="FEDQUEUE_CLI_JOB", help="the job's id")]
JobArgument = Annotated[str, typer.Argument(envvar="FEDQUEUE_CLI_JOB", help="the job's id")]


def load(**overrides: Any) -> Settings:
    """Settings with the flags that were given. Exits with the field's name if one is wrong."""
    try:
        settings = Settings.load(**overrides)
    except FedqueueError as exc:
        fail(exc)
    plugins.allow(settings.plugins)
    return settings


def chosen_store(store_url: str | None) -> BlobStore:
    """The store that a flag or the settings name. Exits if there can be none at that address."""
    try:
        return open_store(load(store_url=store_url))
    except FedqueueError as exc:
        fail(exc)


def fail(*found: FedqueueError | str) -> NoReturn:
    """A line for each error, exit status 1."""
    for error in found:
        kind = f"{type(error).__name__}: " if isinstance(error, FedqueueError) else ""
        errors.print(f"[bold red]{kind}[/]{escape(str(error))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def no_job(store: BlobStore, job: str) -> NoReturn:
    """Exits; names the jobs that there are."""
    try:
        names = ", ".join(announced(store))
    except FedqueueError as exc:
        fail(exc)
    fail(f"there is no job {job!r}; there are: {names or 'none'}")


def printable(text: str) -> str:
    """What somebody else wrote, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Plain lines for a service's log, coloured on a terminal."""
    if errors.is_terminal:
        handler: logging.Handler = RichHandler(console=errors, show_path=False)
        logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for noisy in ("urllib3", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # every failure is raised too, and broker/ says it once, in words; pika would add a traceback per attempt
    logging.getLogger("pika").setLevel(logging.CRITICAL)


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second SIGINT kills as usual."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


def existing(path: Path | None, what: str) -> Path:
    """`path` if it exists; else exits."""
    if path is None or not path.exists():
        fail(f"{what} {path} does not exist")
    return path


def export(settings: Settings) -> None:
    """Put flags into the environment, which celeryconfig.py and child processes read."""
    os.environ[env_name("broker_url")] = settings.broker_url.get_secret_value()
    os.environ[env_name("store_url")] = settings.store_url
    os.environ[env_name("live_url")] = settings.live_url.get_secret_value()
