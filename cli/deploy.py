"""`fedqueue site deploy` and `deployed`: a model file beside the cameras that follows a channel (docs/deploy.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.options import (
    JobId,
    StoreUrl,
    console,
    fail,
    load,
    log_to_stderr,
    printable,
    stop_on_signals,
)
from cli.predict import known_models
from federation.errors import FedqueueError
from federation.settings import Settings
from storage.channels import CHANNELS, STABLE, check_wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    from producers.offline import Pulled

AWAY = 3
"""Exit status of --once if the store could not be asked: what is deployed stays, and may be old."""

Out = Annotated[
    Path, typer.Option("--out", envvar="FEDQUEUE_CLI_OUT", help="folder that the inference process reads")
]


def _channel(text: str) -> str:
    try:
        return check_wanted(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def deploy(
    job: JobId,
    channel: Annotated[
        str,
        typer.Option(
            envvar="FEDQUEUE_CLI_CHANNEL",
            callback=_channel,
            help=f"{', '.join(CHANNELS)}, or the number of a version",
        ),
    ] = STABLE,
    out: Out = Path("deployed"),
    once: Annotated[
        bool, typer.Option("--once", envvar="FEDQUEUE_CLI_ONCE", help="look once and end, for cron")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", envvar="FEDQUEUE_CLI_WITH_ONNX", help="write model.onnx, too")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_CHECK",
            help="command that judges what was swapped in, by exit status 0; {model} {manifest} {dir} are its paths",
        ),
    ] = None,
    check_limit_s: Annotated[
        float,
        typer.Option(envvar="FEDQUEUE_CLI_CHECK_LIMIT_S", min=0.1, help="seconds that the command may take"),
    ] = 120.0,
    retry: Annotated[
        bool,
        typer.Option("--retry", envvar="FEDQUEUE_CLI_RETRY", help="try versions again that failed before"),
    ] = False,
    every_s: Annotated[
        float, typer.Option(envvar="FEDQUEUE_CLI_EVERY_S", min=0.1, help="seconds between two looks")
    ] = 10.0,
    store_url: StoreUrl = None,
) -> None:
    """Keep a model file for this site's inference process what a channel of the job says, until it is stopped.

    A version is pulled, verified, tried, and swapped in as a whole; if --check then says no, the one before it is back.
    With --once the exit status is 0: up to date now; 1: failed; 3: the store is away, what is deployed stays.

    Example: fedqueue site deploy --job street --channel stable --out deployed --check './smoke-test {model}'
    """
    log_to_stderr()
    settings = load(store_url=store_url)
    from producers.deployed import DeployedFolder
    from producers.deployment import Deployment
    from producers.postcheck import CheckStopped, Command

    try:
        models, connect = known_models(settings, job)
        folder = DeployedFolder(out, job)
        deployment = Deployment(
            folder=folder,
            channel=channel,
            models=models,
            connect=connect,
            stop=stop_on_signals(),
            check=None if check is None else Command.parse(check, check_limit_s),
            onnx=_exporter(settings) if onnx else None,
        )
        with folder.locked():
            deployment.begin(retry=retry)
            if not once:
                deployment.run(every_s, settings.backoff_limit_s)
                return
            outcome = deployment.look()
    except CheckStopped:
        fail("stopped before the check had ended: nothing has changed")
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"{out} cannot be used: {exc}")
    if outcome.state == "failed":
        fail(outcome.message)
    console.print(f"{job}: {outcome.message}", highlight=False, markup=False, soft_wrap=True)
    if outcome.state == "away":
        raise typer.Exit(AWAY)


def _exporter(settings: Settings) -> Callable[[Pulled], bytes]:
    from cli.export import metadata
    from detection.export import export_onnx

    def export(pulled: Pulled) -> bytes:
        return export_onnx(pulled.job.spec, pulled.weights, metadata(settings, pulled)).data

    return export


def deployed(
    out: Out = Path("deployed"),
) -> None:
    """What lies in a deployment's folder: the version in use, the one before it, what failed, what was done.

    Example: fedqueue site deployed --out deployed
    """
    from producers.deployed import CURRENT, PREVIOUS, DeployedFolder, read_note

    try:
        note = read_note(out)
    except (FedqueueError, OSError) as exc:
        fail(exc if isinstance(exc, FedqueueError) else f"{out} cannot be read: {exc}")
    if note is None:
        fail(f"{out} is no deployment's folder: `fedqueue site deploy --job JOB --out {out}` makes one")
    folder = DeployedFolder(out, note.job)
    table = Table("", "version", "channel", "deployed (UTC)", "sha256", "files", box=None)
    for link in (CURRENT, PREVIOUS):
        manifest = folder.deployed(link)
        if manifest is None:
            table.add_row(link, "none")
            continue
        files = ", ".join(f"{name} {file.nbytes}" for name, file in sorted(manifest.files.items()))
        model = manifest.files["model.safetensors"].sha256[:12]
        at = f"{manifest.deployed_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(link, str(manifest.version), manifest.channel, at, model, files)
    console.print(f"[bold]{note.job}[/]  {out}", highlight=False)
    console.print(table)
    console.print()
    if note.trial is not None:
        console.print(
            f"[yellow]versions/{note.trial.folder} is being checked, or its deployment was killed: "
            "the next `fedqueue site deploy` settles it[/]",
            highlight=False,
            soft_wrap=True,
        )
    waiting = {(failure.version, failure.reason) for failure in note.failures}
    for entry in note.history:
        blocked = entry.what == "failed" and (entry.version, entry.reason) in waiting
        line = f"{entry.at:%Y-%m-%d %H:%M:%S}  v{entry.version:<5d} {entry.what:<9} {entry.channel}"
        line += f"  {printable(entry.reason)}" if entry.reason else ""
        line += "; not tried again before --retry" if blocked else ""
        console.print(line, markup=False, highlight=False, soft_wrap=True)
