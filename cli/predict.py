"""`fedqueue predict`: use a version on images and videos, beside the cameras, with or without the store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cli.annotated import AnnotatedCopies, picture_name
from cli.inputs import Input, find_inputs
from cli.options import JobId, StoreUrl, console, errors, fail, load
from federation.errors import BadDataset, FedqueueError, StoreUnavailable
from federation.settings import Settings, env_name
from producers.offline import OfflineModels, Pulled
from storage.blob import BlobStore
from storage.channels import check_wanted
from storage.open import local_path, open_store

if TYPE_CHECKING:
    from detection.evaluate import Found
    from detection.frames import Frame
    from detection.results import ResultsFile

RESULTS = "predictions.json"
Detect = Callable[[Iterable["Frame"]], Iterator[tuple["Frame", "Found"]]]


def _wanted(text: str) -> str:
    try:
        return check_wanted(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def predict(
    images: Annotated[list[str], typer.Argument(help="files, folders, globs, videos", show_default=False)],
    job: JobId,
    version: Annotated[
        str,
        typer.Option(
            envvar="FEDQUEUE_CLI_VERSION",
            callback=_wanted,
            help="latest, best (as measured), stable, or a number",
        ),
    ] = "latest",
    out: Annotated[Path, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="folder for pictures and JSON")] = Path(
        "predictions"
    ),
    score: Annotated[
        float, typer.Option(envvar="FEDQUEUE_CLI_SCORE", min=0, max=1, help="least score, 0 to 1")
    ] = 0.35,
    classes: Annotated[
        str | None,
        typer.Option(envvar="FEDQUEUE_CLI_CLASSES", help="only these, separated by commas; none: all"),
    ] = None,
    every: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_EVERY", min=1, help="of videos, each so-many-th frame")
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(envvar=env_name("device"), help="auto (a GPU if there is one), cpu, cuda or cuda:N"),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            envvar="FEDQUEUE_CLI_BATCH", min=1, max=1024, help="images in memory, and detected, at a time"
        ),
    ] = 8,
    drawing: Annotated[
        bool,
        typer.Option(
            "--draw/--no-draw", envvar="FEDQUEUE_CLI_DRAW", help="write annotated pictures and videos"
        ),
    ] = True,
    font: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_FONT", help="font file for class names not in Latin, Greek or Cyrillic"
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", envvar="FEDQUEUE_CLI_OFFLINE", help="do not ask the store, use the cache"),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(envvar=env_name("predict_cache"), help="folder of the models pulled before")
    ] = None,
    store_url: StoreUrl = None,
) -> None:
    """Detect objects in images and videos; write annotated copies and COCO results (docs/predict.md).

    The model is pulled, verified and kept, so that this also works while the store cannot be reached.

    Example: fedqueue predict frames/ 'cameras/*/0001.jpg' --job street --version best --out predictions
    """
    settings = load(store_url=store_url, predict_cache=cache, device=device)
    inputs, nothing = find_inputs(images, out)
    _check(inputs, nothing, out, drawing)
    try:
        from detection.frames import is_video, require_video

        if any(is_video(item.path) for item in inputs):
            require_video()
        pulled = pull_version(settings, job, version, offline)
        labels = _labels(classes, pulled.job.spec.classes)
        _say(pulled, version)
        from detection.predict import Detector
        from detection.results import ResultsFile
        from detection.threads import use_threads

        use_threads(settings.threads)
        detector = Detector(pulled.job.spec, pulled.weights, settings.device)
        out.mkdir(parents=True, exist_ok=True)
        names = pulled.job.spec.classes
        results = ResultsFile(out / RESULTS, names, _info(pulled, score))
        copies = AnnotatedCopies(out, inputs, names, font) if drawing else None
        began = time.perf_counter()
        _run(
            inputs,
            nothing,
            every,
            lambda frames: detector.detect(frames, batch=batch, score_threshold=score, labels=labels),
            results,
            copies,
            detector.side,
        )
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"cannot write to {out}: {exc}")
    _report(results, time.perf_counter() - began, out, drawing)
    if results.unreadable:
        raise typer.Exit(1)


def _check(inputs: Sequence[Input], nothing: Sequence[str], out: Path, drawing: bool) -> None:
    """Exits if there is nothing to do, or something would be destroyed."""
    if not inputs:
        fail(
            f"no images in {', '.join(nothing)}: name files, folders with images, globs or videos that exist"
        )
    sources = {os.path.realpath(item.path) for item in inputs}
    drawn: dict[str, Input] = {}
    for item in inputs if drawing else ():
        target = out / picture_name(item)
        if os.path.realpath(target) in sources:
            fail(f"--out {out} would overwrite {target}, which is to be read: choose another folder")
        first = drawn.setdefault(picture_name(item), item)
        if first is not item:
            fail(
                f"{first.name} and {item.name} would both become {target}: do one after the other, or --no-draw"
            )


def pull_version(settings: Settings, job: str, version: str, offline: bool) -> Pulled:
    """The model, and where it is from."""
    models, connect = known_models(settings, job)
    if offline:
        return models.from_cache(version, "the store was not asked (--offline)")
    with errors.status("pulling the model"):
        return models.pull(version, connect)


def known_models(settings: Settings, job: str) -> tuple[OfflineModels, Callable[[], BlobStore]]:
    """The job's models on this machine, and how to reach the store. Raises BadJob."""
    is_folder = settings.store_url.startswith("file:")
    folder = local_path(settings.store_url).absolute()
    url = f"file:{folder}" if is_folder else settings.store_url

    def connect() -> BlobStore:
        if is_folder and not folder.is_dir():  # opening it would make an empty one
            raise StoreUnavailable(f"the store cannot be reached, there is no folder {folder}")
        return open_store(settings)

    return OfflineModels(url, job, settings.predict_cache, settings.site_state / job), connect


def _labels(classes: str | None, known: tuple[str, ...]) -> list[int] | None:
    if classes is None:
        return None
    names = [name.strip() for name in classes.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        fail(f"--classes: {', '.join(unknown) or 'nothing'} is not among the job's {', '.join(known)}")
    return [known.index(name) + 1 for name in names]


def _say(pulled: Pulled, wanted: str) -> None:
    """One line: which model this is, and how that is known."""
    line = f"{pulled.job.id}, version {pulled.version}{'' if wanted.isdigit() else f', the {wanted}'}"
    if pulled.answer.reason:
        line += f" ({pulled.answer.reason})"
    line += f", sha256 {pulled.sha256[:12]}"
    if pulled.own_norm:
        line += ", with norm layers of this site's own"
    if pulled.away:
        line += f"; from the cache, as the store said on {pulled.answer.asked_at:%Y-%m-%d %H:%M} UTC: {pulled.away}"
    style = "yellow" if pulled.away else None
    errors.print(line, highlight=False, soft_wrap=True, markup=False, style=style)


def _info(pulled: Pulled, score: float) -> dict[str, Any]:
    return {
        "description": "detections, not ground truth",
        "job": pulled.job.id,
        "version": pulled.version,
        "sha256": pulled.sha256,
        "arch": pulled.job.spec.arch,
        "score_threshold": score,
        "asked_at": pulled.answer.asked_at.isoformat(timespec="seconds"),
        "offline": bool(pulled.away),
        "software": f"fedqueue {installed_version('fedqueue')}",
    }


def _run(
    inputs: Sequence[Input],
    nothing: Sequence[str],
    every: int,
    detect: Detect,
    results: ResultsFile,
    copies: AnnotatedCopies | None,
    side: int,
) -> None:
    """Read, detect, write, one picture after another. What cannot be read is said, noted, and left out."""
    names = {item.path: item.name for item in inputs}
    columns = (TextColumn("detecting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar_off = not errors.is_terminal
    with (
        results,
        copies or nullcontext(),
        Progress(*columns, console=errors, transient=True, disable=bar_off) as progress,
    ):
        bar = progress.add_task("detecting", total=None)

        def unreadable(name: str, reason: str) -> None:
            results.add_unreadable(name, reason)
            errors.print(f"skipped: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)

        for argument in nothing:
            unreadable(argument, f"{argument}: there is no such image")
        progress.update(bar, total=_count(inputs, every))
        frames = _frames(inputs, every, side, unreadable)
        for frame, found in detect(frames):
            more: dict[str, object] = {"turned": True} if frame.turned else {}
            if frame.index is not None:
                more |= {"frame": frame.index, "time_s": frame.time_s}
            if copies is not None:
                try:
                    more["picture"] = copies.add(frame, found)
                except BadDataset as exc:
                    unreadable(names[frame.path], str(exc))
                    continue
            results.add(names[frame.path], frame.width, frame.height, found, **more)
            progress.advance(bar)


def _frames(
    inputs: Sequence[Input], every: int, side: int, unreadable: Callable[[str, str], None]
) -> Iterator[Frame]:
    from detection.frames import is_video, read_image, read_video

    for item in inputs:
        try:
            if is_video(item.path):
                yield from read_video(item.path, every)
            else:
                yield read_image(item.path, at_least=side)
        except BadDataset as exc:
            unreadable(item.name, str(exc))


def _count(inputs: Sequence[Input], every: int) -> int | None:
    """How many pictures there will be, if that is known; a video's header tells how long it claims to be."""
    from detection.frames import count_frames, is_video

    counts = [count_frames(item.path, every) if is_video(item.path) else 1 for item in inputs]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _report(results: ResultsFile, seconds: float, out: Path, drawing: bool) -> None:
    shown = ", ".join(f"{name} {count}" for name, count in results.objects.most_common())
    what = f"annotated copies and {RESULTS}" if drawing else RESULTS
    console.print(
        f"{sum(results.objects.values())} objects{f' ({shown})' if shown else ''} in {results.images} images, "
        f"{seconds:.1f} s, {results.images / max(seconds, 1e-9):.1f} images/s; {what} in {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if results.unreadable:
        errors.print(
            f"{len(results.unreadable)} could not be read: see above, or unreadable in {RESULTS}", style="red"
        )
