"""`fedqueue server …`: what an operator does once: queues, bucket, accounts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from broker.accounts import definitions as broker_definitions
from broker.open import declare
from cli.options import BrokerUrl, StoreUrl, console, fail, load
from federation.errors import FedqueueError
from federation.ids import is_name
from storage.access import site_policy
from storage.open import create_bucket, open_store
from storage.probe import probe

app = typer.Typer(help="Set up broker and bucket.", no_args_is_help=True)

Sites = Annotated[
    list[str] | None,
    typer.Option("--site", envvar="FEDQUEUE_CLI_SITES", help="a site's name; may be repeated"),
]


@app.command()
def init(site: Sites = None, broker_url: BrokerUrl = None, store_url: StoreUrl = None) -> None:
    """Declare exchanges and queues, create the bucket, and prove that the store is safe. Repeatable.

    Example: fedqueue server init --site north --site harbour
    """
    settings = load(broker_url=broker_url, store_url=store_url)
    try:
        create_bucket(settings)
        probe(open_store(settings))
        declare(settings, site or ())
    except FedqueueError as exc:
        fail(exc)
    console.print(
        f"queues declared{f', control queues for {len(site)} sites' if site else ''}; bucket is there and"
    )
    console.print("honours put-if-absent")


@app.command()
def definitions(
    site: Annotated[
        list[str] | None,
        typer.Option("--site", envvar="FEDQUEUE_CLI_SITE_ACCOUNTS", help="NAME:PASSWORD; may be repeated"),
    ] = None,
    server: Annotated[
        str, typer.Option(envvar="FEDQUEUE_CLI_SERVER_ACCOUNT", help="NAME:PASSWORD of ingress and workers")
    ] = "",
) -> None:
    """Print a RabbitMQ definitions file: accounts and their rights, exchanges, queues and bindings.

    Example: fedqueue server definitions --server fedqueue:secret --site north:secret > definitions.json
    """
    if not server:
        fail("--server NAME:PASSWORD is missing: the account of ingress and workers")
    sites = dict(_account(text) for text in site or [])
    for name in sites:
        if not is_name(name):
            fail(f"{name!r} cannot name a site: use lower-case letters, digits and hyphens")
    settings = load()
    name, password = _account(server)
    typer.echo(
        json.dumps(
            broker_definitions(sites, {name: password}, delivery_limit=settings.delivery_limit), indent=2
        )
    )


@app.command()
def bucket_policy(
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site", envvar="FEDQUEUE_CLI_SITE_ARNS", help="NAME=ARN of the site's S3 user; repeatable"
        ),
    ] = None,
    server: Annotated[
        str,
        typer.Option(
            envvar="FEDQUEUE_CLI_SERVER_ARN", help="ARN of the server's S3 user, to read what sites wrote"
        ),
    ] = "",
    store_url: StoreUrl = None,
) -> None:
    """Print the bucket policy that lets each site read models and write its own updates, and nothing else.

    Example: fedqueue server bucket-policy --site north=arn:aws:iam:::user/north --server arn:aws:iam:::user/server
    """
    settings = load(store_url=store_url)
    sites = {}
    for text in site or []:
        name, _, arn = text.partition("=")
        if not is_name(name):
            fail(f"{text!r} is not NAME=ARN (an empty ARN: a policy to attach to that one user)")
        sites[name] = arn
    try:
        typer.echo(json.dumps(site_policy(settings.store_url, sites, server), indent=2))
    except FedqueueError as exc:
        fail(exc)


def _account(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not name or not colon or not password:
        fail("an account is NAME:PASSWORD")
    return name, password
