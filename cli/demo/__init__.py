"""`fedqueue demo`: the whole system on one machine, from images to a federated model, and what it was worth.

data.py        what is trained on: generated scenes, or a folder of real images
deployment.py  the processes of server and sites, embedded or over real servers
processes.py   real processes with log files
live.py        watching the job
alone.py       the comparison: each site without the others
report.py      table and pictures
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import BrokerUrl, LiveUrl, StoreUrl, console, export, fail, load
from federation.errors import BadJob, FedqueueError
from federation.jobs import EvaluationPolicy, JobSpec
from federation.settings import Settings

if TYPE_CHECKING:
    from cli.demo.data import DemoData


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_DATA", help="folder of real images split by site; none: generated scenes"
        ),
    ] = None,
    sites: Annotated[
        int, typer.Option(envvar="FEDQUEUE_CLI_DEMO_SITES", min=1, help="with --data: which split")
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option(envvar="FEDQUEUE_CLI_OUT", help="new folder for everything; default runs/<time>"),
    ] = None,
    versions: Annotated[
        int | None, typer.Option(envvar="FEDQUEUE_CLI_VERSIONS", min=1, help="merges until the job closes")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(envvar="FEDQUEUE_CLI_STEPS", min=1, help="gradient steps per update")
    ] = None,
    alone: Annotated[
        bool, typer.Option(envvar="FEDQUEUE_CLI_ALONE", help="also train every site alone, for comparison")
    ] = True,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
    live_url: LiveUrl = None,
    site_configs: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDQUEUE_CLI_SITE_CONFIGS", help="folder with <site>.toml: each site's own accounts"
        ),
    ] = None,
) -> None:
    """Run server and sites on this machine until the job closes, and compare with each site alone.

    Embedded unless settings or flags name a broker: then over those servers, with the same processes that
    docs/operations.md starts by hand.

    Example: fedqueue demo --data ../street --sites 3
    """
    from cli.demo.data import find_split, render_scenes

    began = time.monotonic()
    folder = (out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")).resolve()
    if folder.exists() and any(folder.iterdir()):
        fail(f"{folder} is not empty: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    settings = load(broker_url=broker_url, store_url=store_url, live_url=live_url)
    if "broker_url" not in settings.model_fields_set:  # nothing was said: embedded, and all in one folder
        settings = load(
            broker_url=f"sqlite:{folder / 'queue.db'}",
            store_url=f"file:{folder / 'store'}",
            live_url=f"file:{folder / 'live'}",
        )
    export(settings)
    try:
        chosen = find_split(data.resolve(), sites) if data else render_scenes(folder / "data")
        if not _run(folder, settings, chosen, versions, steps, alone, site_configs, began):
            fail("the federation does not beat every site alone")
    except FedqueueError as exc:
        fail(exc)


def _run(
    folder: Path,
    settings: Settings,
    data: DemoData,
    versions: int | None,
    steps: int | None,
    compare: bool,
    site_configs: Path | None,
    began: float,
) -> bool:
    from cli.demo.alone import train_alone
    from cli.demo.deployment import Deployment
    from cli.demo.live import watch
    from cli.demo.processes import Processes
    from cli.demo.report import report
    from cli.submission import Description, send_job
    from storage.jobs import load_job
    from storage.models import load_full_model
    from storage.open import open_store
    from storage.tensors import encode

    spec = _spec(data, versions, steps)
    store = open_store(settings)
    seconds = {"preparation": time.monotonic() - began}
    what = "generated street-like scenes" if data.generated else str(data.images.parent)
    console.print(
        f"{len(data.sites)} sites on {what}; everything is kept in {folder}", highlight=False, soft_wrap=True
    )
    deployment = Deployment(settings, folder, site_configs and site_configs.resolve())
    with Processes(folder / "logs") as processes:
        deployment.start_server(processes, data)
        with console.status("the server starts, the job is created"):
            weights = str(data.pretrained) if data.pretrained else None
            described = Description.of(spec, weights)
            answer = send_job(settings, store, described, wait_s=60, alive=processes.check)
            if not answer.ok:
                raise BadJob("; ".join(answer.errors))
        started = time.monotonic()
        deployment.start_sites(processes, data, spec.id)
        job = load_job(store, spec.id)
        watched = watch(job, store, settings, processes, list(data.sites))
        seconds["federation"] = time.monotonic() - started
    model = load_full_model(store, job, watched.records[-1].head.current.model)
    (folder / "model.safetensors").write_bytes(encode(model))
    results = {}
    if compare:
        initial = load_full_model(store, job, job.initial).arrays()
        local_steps = {site: watched.merged.get(site, 0) * spec.plan.local_steps for site in data.sites}
        started = time.monotonic()
        results = train_alone(spec, initial, data, local_steps)
        seconds["sites alone"] = time.monotonic() - started
    return report(folder, settings, data, store, watched, results, seconds, began)


def _spec(data: DemoData, versions: int | None, steps: int | None) -> JobSpec:
    from detection.presets import GENERATED, STREET

    preset = GENERATED if data.generated else STREET
    plan, stop = preset.plan, preset.stop
    return JobSpec(
        id="generated" if data.generated else data.images.parent.name.lower().replace("_", "-"),
        classes=data.classes,
        plan=plan.model_copy(update={"local_steps": steps or plan.local_steps}),
        aggregation=preset.aggregation,
        stop=stop.model_copy(update={"max_versions": versions or stop.max_versions}),
        evaluation=EvaluationPolicy(every=max(1, (versions or stop.max_versions) // 15)),
    )
