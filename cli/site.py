"""`fedqueue site …`: the agent beside a company's cameras."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker.open import connect
from cli.deploy import deploy, deployed
from cli.options import (
    BrokerUrl,
    StoreUrl,
    fail,
    load,
    log_to_stderr,
    stop_on_signals,
)
from cli.site_key import key
from cli.sites import list_sites, show_site
from federation.errors import FedqueueError
from federation.settings import Settings, env_name
from storage.open import open_store

if TYPE_CHECKING:
    from producers.trainer import TrainerFactory

app = typer.Typer(help="Run a site, or see which sites are there.", no_args_is_help=True)
app.command("list")(list_sites)
app.command("show")(show_site)
app.command()(deploy)
app.command()(deployed)
app.command()(key)


@app.command()
def run(
    job: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_JOB",
            help="work on this job alone, until it closes; may be repeated; none: on all that fit the policy",
        ),
    ] = None,
    site: Annotated[str | None, typer.Option(envvar=env_name("site"), help="this site's name")] = None,
    annotations: Annotated[
        Path | None, typer.Option(envvar=env_name("site_annotations"), help="annotation file or folder")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            envvar=env_name("site_images"), help="folder of the images; none: beside the annotations"
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(envvar=env_name("site_format"), help="coco, voc, yolo or street; none: recognised"),
    ] = None,
    cache_bytes: Annotated[
        int | None,
        typer.Option(envvar=env_name("site_cache_bytes"), help="bytes of decoded images in memory"),
    ] = None,
    disk_cache_bytes: Annotated[
        int | None,
        typer.Option(
            envvar=env_name("site_disk_cache_bytes"), help="bytes of decoded images below --state; 0: none"
        ),
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            envvar=env_name("trainer"),
            help="your own trainer, by entry point or package.module:attribute; none: the detector training",
        ),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar=env_name("site_state"), help="folder for outbox and model cache")
    ] = None,
    duty: Annotated[
        float | None,
        typer.Option(envvar=env_name("site_duty"), help="share of time, 0 to 1, spent computing"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(envvar=env_name("threads"), help="CPU threads; 0: all")
    ] = None,
    device: Annotated[
        str | None, typer.Option(envvar=env_name("device"), help="auto, cpu, cuda or cuda:N")
    ] = None,
    nice: Annotated[
        int | None,
        typer.Option(envvar=env_name("site_nice"), help="0 to 19: how far to give way to other programs"),
    ] = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Train on this site's own images: for all jobs that fit its policy, or for those named, until they close.

    Only tensors and numbers leave.

    Example: fedqueue site run --site north --annotations coco.json --images frames/
    """
    log_to_stderr()
    settings = load(
        site=site,
        site_annotations=annotations,
        site_images=images,
        site_format=format,
        site_cache_bytes=cache_bytes,
        site_disk_cache_bytes=disk_cache_bytes,
        trainer=trainer,
        site_state=state,
        site_duty=duty,
        threads=threads,
        device=device,
        site_nice=nice,
        broker_url=broker_url,
        store_url=store_url,
    )
    if settings.site is None:
        fail("a site needs a name: --site or FEDQUEUE_SITE")
    from producers.agent import SiteAgent
    from producers.niceness import be_nice

    be_nice(settings.site_nice)
    try:
        trainer_for, classes = _training(settings)
        if settings.trainer and settings.site_classes is None and not job:
            fail(
                "nobody knows which classes the data of a trainer of your own hold: set FEDQUEUE_SITE_CLASSES, or "
                "name the jobs with --job"
            )
        agent = SiteAgent(
            settings,
            job or (),
            open_store(settings),
            lambda: connect(settings),
            trainer_for,
            stop_on_signals(),
            version("fedqueue"),
            classes,
        )
        agent.run()
    except FedqueueError as exc:
        fail(exc)


def _training(settings: Settings) -> tuple[TrainerFactory, frozenset[str] | None]:
    """What trains here, and the classes that its data hold, if that is known."""
    if settings.trainer:
        from producers.custom_trainer import CustomTraining

        training = CustomTraining.from_settings(settings.trainer)
        return lambda spec: training, None
    from producers.detection_trainer import DetectionTrainer

    detection = DetectionTrainer.from_settings(settings)
    return detection.for_job, None if settings.site_classes is not None else detection.classes()
