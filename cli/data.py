"""`fedqueue data …`: look at a data set before training, deal it out to sites, change its format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from cli.options import StoreUrl, console, fail, load
from federation.errors import BadDataset, FedqueueError
from federation.settings import AnnotationFormat
from storage.jobs import load_job
from storage.open import open_store

if TYPE_CHECKING:
    from detection.check import Checked
    from detection.split import Split
    from detection.statistics import Statistics

app = typer.Typer(help="Check a data set, split it over sites, convert it.", no_args_is_help=True)

DataPath = Annotated[
    Path, typer.Argument(help="annotations: a COCO or Federated Street file, a Pascal VOC or YOLO folder")
]
Images = Annotated[
    Path | None,
    typer.Option(envvar="FEDQUEUE_CLI_IMAGES", help="folder of the images; none: beside the annotations"),
]
Format = Annotated[
    AnnotationFormat | None,
    typer.Option(envvar="FEDQUEUE_CLI_FORMAT", help="format of the annotations; none: recognised"),
]
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@app.command()
def check(
    path: DataPath,
    images: Images = None,
    format: Format = None,
    classes: Annotated[
        str | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_CLASSES", help="class names with commas between; none: the data set's"
        ),
    ] = None,
    job: Annotated[
        str | None, typer.Option(envvar="FEDQUEUE_CLI_JOB", help="take the class names from this job")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(envvar="FEDQUEUE_CLI_SHEET", help="write a picture of some images with their boxes"),
    ] = None,
    sheet_images: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_SHEET_IMAGES", min=1, max=200, help="images on the sheet")
    ] = 12,
    store_url: StoreUrl = None,
) -> None:
    """Show what is in a data set and everything that is wrong with it. Exit status 1 if there are defects.

    Example: fedqueue data check annotations.json --images frames/ --job street --sheet sheet.png
    """
    if sheet is not None and sheet.suffix.lower() not in SHEET_SUFFIXES:
        fail(f"--sheet {sheet}: the name must end in one of {', '.join(SHEET_SUFFIXES)}")
    if classes is not None and job is not None:
        fail("give --classes or --job, not both")
    try:
        names = _names(classes)
        others: tuple[str, ...] = ()
        if job is not None:
            settings = load(store_url=store_url)
            names, others = load_job(open_store(settings), job).spec.classes, settings.site_classes or ()
        checked = _look(path, images, format, names, others)
        from detection.statistics import describe

        _print_statistics(checked, describe(checked.pictures, checked.classes))
        for note in checked.notes:
            console.print(f"[yellow]note[/]  {escape(note)}", highlight=False, soft_wrap=True)
        if sheet is not None:
            _write_sheet(checked, sheet, sheet_images)
    except FedqueueError as exc:
        fail(exc)
    if not checked.defects:
        console.print("no defects")
        return
    kinds: dict[str, int] = {}
    for defect in checked.defects:
        kinds[defect.kind] = kinds.get(defect.kind, 0) + 1
        console.print(
            f"[red]defect[/]  {escape(f'{defect.kind}: {defect}')}", highlight=False, soft_wrap=True
        )
    counted = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda k: -k[1]))
    fail(f"{len(checked.defects)} defects: {counted}. A data set is used whole or not at all: correct them")


@app.command()
def split(
    path: DataPath,
    sites: Annotated[int, typer.Option(envvar="FEDQUEUE_CLI_SITES", min=1, max=10_000, help="how many")],
    out: Annotated[Path, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="folder for one COCO file a site")],
    by: Annotated[
        Literal["device", "iid", "dirichlet", "label-skew"],
        typer.Option(envvar="FEDQUEUE_CLI_BY", help="rule: by camera, at random, or skewed by class"),
    ] = "iid",
    device_field: Annotated[
        str | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_DEVICE_FIELD",
            help="field of the images that names the device, or 'folder'; none: the one called device…",
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(envvar="FEDQUEUE_CLI_ALPHA", help="dirichlet: small is skewed, large is even")
    ] = 0.5,
    shards: Annotated[
        int,
        typer.Option(
            envvar="FEDQUEUE_CLI_SHARDS", min=1, help="label-skew: pieces a site, about its classes"
        ),
    ] = 2,
    seed: Annotated[int, typer.Option(envvar="FEDQUEUE_CLI_SEED", min=0, help="of the random rules")] = 0,
    images: Images = None,
    format: Format = None,
) -> None:
    """Deal a data set out to several sites, to try a federation on one machine. Images stay where they are.

    Example: fedqueue data split annotations.json --sites 5 --by dirichlet --alpha 0.3 --out sites/
    """
    from detection import split as rules
    from detection.formats import coco

    try:
        checked = _look(path, images, format, None).require()
        contents = [[box.name for box in picture.boxes] for picture in checked.pictures]
        if by == "device":
            parts = rules.by_device(rules.devices(checked.pictures, device_field), sites)
        elif by == "iid":
            parts = rules.iid(len(contents), sites, seed)
        elif by == "dirichlet":
            parts = rules.dirichlet(contents, sites, alpha, seed)
        else:
            parts = rules.label_skew(contents, sites, seed, shards)
        digits = len(str(sites))
        files = [out / f"site-{i:0{digits}}.json" for i in range(1, sites + 1)]
        _refuse_existing(files)
        for file, part in zip(files, parts, strict=True):
            coco.write_file([checked.pictures[i] for i in part], checked.classes, file)
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"{out} cannot be written: {exc}")
    _print_split(checked, files, parts)


@app.command()
def convert(
    path: DataPath,
    to: Annotated[AnnotationFormat, typer.Option(envvar="FEDQUEUE_CLI_TO", help="the new format")],
    out: Annotated[Path, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="folder for the new annotations")],
    copy_images: Annotated[
        bool, typer.Option("--copy-images", envvar="FEDQUEUE_CLI_COPY_IMAGES", help="copy the images, too")
    ] = False,
    images: Images = None,
    format: Format = None,
) -> None:
    """Write a data set in another format. Nothing is overwritten.

    Example: fedqueue data convert VOCdevkit/VOC2012 --to coco --out converted/ --copy-images
    """
    from detection.formats import FORMATS

    try:
        checked = _look(path, images, format, None).require()
        folder = out / FORMATS[to].images
        names = [picture.name for picture in checked.pictures]
        if copy_images:
            _refuse_existing([folder / name for name in names])
        written = FORMATS[to].write(checked.pictures, checked.classes, out)
        if copy_images:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checked.images / name, folder / name)
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"{out} cannot be written: {exc}")
    boxes = sum(len(picture.boxes) for picture in checked.pictures)
    where = folder if copy_images else checked.images
    _say(f"{len(names)} images, {boxes} boxes: {written}, images in {where}")


def _say(line: str) -> None:
    """As it is: a folder may be called [night]."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _names(classes: str | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    names = tuple(name.strip() for name in classes.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise BadDataset(f"--classes {classes!r}: must be different names with commas between")
    return names


def _look(
    path: Path,
    images: Path | None,
    format: str | None,
    classes: tuple[str, ...] | None,
    others: tuple[str, ...] = (),
) -> Checked:
    from detection.check import check as look

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("looking at the images", total=None)
        report: Callable[[int, int], None] = lambda done, total: progress.update(  # noqa: E731
            task, completed=done, total=total
        )
        return look(path, images, classes, format=format, others=others, on_picture=report)


def _refuse_existing(files: list[Path]) -> None:
    for file in files:
        if file.exists():
            raise BadDataset(f"{file}: is there already: choose an empty folder")


def _write_sheet(checked: Checked, sheet: Path, count: int) -> None:
    if not checked.pictures:
        console.print("no sheet: no image can be drawn")
        return
    from detection.dataset import checked_items
    from detection.draw import annotation_sheet

    title = f"{checked.source.path.name}: {len(checked.pictures)} images"
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        annotation_sheet(checked_items(checked), checked.classes, sheet, title=title, count=count)
    except OSError as exc:
        fail(f"{sheet}: cannot be written: {exc}")
    _say(f"boxes drawn: {sheet}")


def _print_statistics(checked: Checked, statistics: Statistics) -> None:
    from detection.statistics import LARGE_PX, QUANTILES, SMALL_PX

    _say(f"{checked.source.path}: {checked.source.format}, images in {checked.images}")
    console.print(
        f"{statistics.images} images, {statistics.empty_images} of them without boxes; {statistics.boxes} boxes"
    )
    table = Table("class", "boxes", "", "images", "median side, px", box=None)
    most = max((count.boxes for count in statistics.classes.values()), default=0)
    for name, count in statistics.classes.items():
        bar = "█" * round(24 * count.boxes / most) if most else ""
        side = f"{count.median_px:.0f}" if count.boxes else ""
        table.add_row(escape(name), str(count.boxes), bar, str(count.images), side)
    console.print(table)
    sizes = Table("image size, px", "images", box=None)
    common = statistics.image_sizes.most_common(8)
    for (width, height), number in common:
        sizes.add_row(f"{width} x {height}", str(number))
    if len(statistics.image_sizes) > len(common):
        others = sum(statistics.image_sizes.values()) - sum(number for _, number in common)
        sizes.add_row(f"{len(statistics.image_sizes) - len(common)} other sizes", str(others))
    console.print(sizes)
    if statistics.boxes:
        labels = ["smallest", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "largest"]
        sides = Table("box side, √area", *labels, box=None)
        sides.add_row("px", *(f"{value:.0f}" for value in statistics.side_px))
        sides.add_row("share of the image's", *(f"{value:.3f}" for value in statistics.side_share))
        console.print(sides)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in statistics.sizes.items())
        console.print(f"COCO's sizes, bounds {SMALL_PX}² and {LARGE_PX}² px: {shares}", highlight=False)
    for field, values in statistics.fields.items():
        console.print(f"field {escape(field)}: {values} values", highlight=False)


def _print_split(checked: Checked, files: list[Path], parts: Split) -> None:
    table = Table("site", "images", "boxes", *(escape(name) for name in checked.classes), box=None)
    for file, part in zip(files, parts, strict=True):
        boxes = [box.name for i in part for box in checked.pictures[i].boxes]
        per_class = (str(boxes.count(name)) for name in checked.classes)
        table.add_row(escape(str(file)), str(len(part)), str(len(boxes)), *per_class)
    console.print(table)
    _say(f"images in {checked.images}")
