"""`fedqueue model archs`: what a job may name as its architecture, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from cli.options import console, errors, fail, load
from federation import plugins
from federation.errors import FedqueueError
from federation.settings import env_name
from storage.tensors import encode, from_arrays

if TYPE_CHECKING:
    from detection.families import Family


def archs(
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", envvar="FEDQUEUE_CLI_ARCHS", help="only this one; may be repeated"),
    ] = None,
    measure: Annotated[
        bool, typer.Option(envvar="FEDQUEUE_CLI_MEASURE", help="also measure images per second, here and now")
    ] = False,
    classes: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_CLASSES", min=1, max=1000, help="number of classes")
    ] = 7,
    image_size: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_IMAGE_SIZE", min=64, max=2048, help="input side, pixels")
    ] = 256,
    batch_size: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_BATCH_SIZE", min=2, max=1024, help="images per step")
    ] = 4,
    seconds: Annotated[
        float, typer.Option(envvar="FEDQUEUE_CLI_SECONDS", min=0, help="for each of the two measurements")
    ] = 5.0,
    threads: Annotated[
        int | None, typer.Option(envvar=env_name("threads"), help="CPU threads; 0: all")
    ] = None,
    device: Annotated[
        str | None, typer.Option(envvar=env_name("device"), help="auto, cpu, cuda or cuda:N")
    ] = None,
) -> None:
    """List the architectures: parameters, bytes of an update, pretrained weights, and measured images per second.

    Example: fedqueue model archs --measure --image-size 320 --batch-size 8
    """
    settings = load(threads=threads, device=device)
    from detection.families import FAMILIES
    from detection.registry import ARCHS, known, unknown
    from detection.speed import Speed, outline
    from detection.speed import measure as measure_speed
    from detection.threads import pick_device, use_threads

    use_threads(settings.threads)
    try:
        where = pick_device(settings.device)
    except FedqueueError as exc:
        fail(exc)
    names = arch or [*ARCHS, *plugins.names(plugins.ARCHITECTURES)]
    for name in names:
        if not known(name):
            fail(unknown(name))
    table = Table(box=None)
    for column in ("architecture", "parameters", "bytes per update"):
        table.add_column(column, no_wrap=True)
    if measure:
        for column in ("input, px", "training, images/s", "inference, images/s"):
            table.add_column(column, justify="right")
    else:
        table.add_column("weights that torchvision has", overflow="fold")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[steps]} steps"),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("", total=len(names), steps=0)

        def step() -> None:
            progress.update(bar, steps=progress.tasks[0].fields["steps"] + 1)

        for name in names:
            progress.update(bar, description=name, steps=0)
            family = FAMILIES.get(name)
            side = max(image_size, family.min_image_size) if family else image_size
            try:
                parameters, arrays = outline(name, classes, side)
                nbytes = len(encode(from_arrays(arrays)))
                speed = (
                    measure_speed(name, classes, side, batch_size, seconds, step, where)
                    if measure
                    else Speed(0, 0)
                )
            except FedqueueError as exc:
                errors.print(f"{name}: {exc}", style="red", highlight=False, markup=False, soft_wrap=True)
                continue
            finally:
                progress.advance(bar)
            measured = [str(side), f"{speed.training:.2f}", f"{speed.inference:.2f}"]
            last = measured if measure else [", ".join(_weights(family))]
            table.add_row(name, f"{parameters:,}", f"{nbytes:,}", *last)
    console.print(table)


def _weights(family: Family | None) -> list[str]:
    """What `job submit --weights` takes for it besides files."""
    return [member.name for member in family.pretrained()] if family else []
