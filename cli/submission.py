"""`fedqueue job submit | check | schema`: a job description on its way to the server."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.asking import WaitS, new_request, send, show, wait, who_asks
from cli.initial import FILES, first_weights
from cli.options import BrokerUrl, StoreUrl, console, existing, fail, load
from federation.errors import BadJob, FedqueueError
from federation.jobs import JobSpec, read_spec
from federation.requests import Answer, SubmitJob
from federation.settings import Settings
from federation.types import SERVER
from federation.wire import encode_request
from storage.blob import BlobStore
from storage.control import load_announcement
from storage.models import describe_upload
from storage.open import open_store
from storage.tensors import encode, from_arrays

WEIGHTS = "weights"
"""The one field of a description that stays here: the models that are uploaded say what came of it."""

File = Annotated[Path, typer.Argument(help="a job description, TOML (docs/jobs.md)")]


@dataclass(frozen=True)
class Description:
    """A job description as written, without `weights`; `spec` is what it means."""

    document: Mapping[str, Any]
    spec: JobSpec
    weights: str | None

    @classmethod
    def of(cls, spec: JobSpec, weights: str | None) -> Description:
        return cls(json.loads(spec.to_json()), spec, weights)


def read(file: Path) -> Description:
    """Exits with every error, each with its field's name."""
    try:
        document = json.loads(json.dumps(tomllib.loads(file.read_text()), default=_to_json))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        fail(f"{file}: {exc}")
    weights = document.pop(WEIGHTS, None)
    spec, errors = read_spec(document)
    if weights is not None and not isinstance(weights, str):
        errors.append(f"{WEIGHTS}: must be the name of a file, or of weights of torchvision's")
    if spec is None or errors:
        fail(*errors)
    return Description(document, spec, weights and _beside(file, weights))


def _to_json(value: object) -> str:
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON")


def _beside(file: Path, weights: str) -> str:
    """A file's name counts from the folder of the description."""
    path = file.parent / weights
    return str(path) if path.suffix in FILES or path.is_file() else weights


def submit(
    file: File,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "--pretrained",
            envvar="FEDQUEUE_CLI_WEIGHTS",
            help="first weights, of which is taken what fits: a file (.pth, .safetensors), or torchvision's own by "
            "name, downloaded (`fedqueue model archs` lists them); none: what the description names, or random",
        ),
    ] = None,
    wait_s: WaitS = 60.0,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Make initial weights, upload them, and ask the server for the job: as a site, or as an operator.

    A site is whoever has `site` in the settings. The answer is the job's id, or everything that is wrong.

    Example: fedqueue job submit job.toml --weights backbone.pth
    """
    settings = load(broker_url=broker_url, store_url=store_url)
    described = read(existing(file, "job description"))
    chosen = Description(described.document, described.spec, weights or described.weights)
    try:
        with console.status("making initial weights and waiting for the server"):
            answer = send_job(settings, open_store(settings), chosen, wait_s, report=_say)
    except FedqueueError as exc:
        fail(exc)
    show(answer)


def check(file: File) -> None:
    """Say whether a job description is one, and everything that is wrong with it. Sends nothing.

    Example: fedqueue job check job.toml
    """
    spec = read(existing(file, "job description")).spec
    _say(
        f"job {spec.id}: no mistakes found; {spec.arch} and first weights are looked at when it is submitted"
    )


def schema() -> None:
    """Print the JSON Schema of a job description, for editors and other programs.

    Example: fedqueue job schema > job.schema.json
    """
    found = JobSpec.model_json_schema()
    found["properties"][WEIGHTS] = {
        "type": "string",
        "description": "first weights: a file, from this one's folder, or torchvision's by name; it is not sent",
    }
    typer.echo(json.dumps(found, indent=2))


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def send_job(
    settings: Settings,
    store: BlobStore,
    description: Description,
    wait_s: float,
    alive: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda line: None,
) -> Answer:
    """Make the weights, upload them, send the request and wait for the answer.

    `report` gets lines about the weights. `alive` is called while waiting, and may raise. Raises BadJob, BadMessage
    if the description is too large; Transient if nobody has answered in `wait_s` seconds.
    """
    spec, who = description.spec, who_asks(settings)
    if taken := load_announcement(store, spec.id):  # the server says so, too, but after an upload
        raise BadJob(f"id: there is a job {spec.id!r} already, of {taken.submitted_by}: choose another")
    made = first_weights(spec, description.weights)
    for line in made.report:
        report(line)
    everything = encode(from_arrays(made.arrays))
    exchanged = encode(from_arrays({name: made.arrays[name] for name in made.exchanged}))
    initial = describe_upload(spec.id, who, everything)
    first = initial if exchanged == everything else describe_upload(spec.id, who, exchanged)
    asked = SubmitJob(document=dict(description.document), initial=initial, first=first)
    request = new_request(settings, asked)
    if who != SERVER:
        encode_request(request)  # too large: before anything is uploaded
    store.put_if_absent(initial.key, everything)
    store.put_if_absent(first.key, exchanged)
    send(settings, request)
    return wait(store, request, wait_s, alive)
