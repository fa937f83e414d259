"""`fedqueue site list` and `site show`: which sites are there, what they do, and what they did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli.joblist import Json
from cli.options import LiveUrl, StoreUrl, console, errors, fail, load, printable
from cli.status import account_json
from cli.units import age_text, bytes_text, ratio_text, used_text
from federation import keys
from federation.errors import FedqueueError, Transient
from federation.governance import Invitation, Member
from federation.settings import Settings
from federation.types import Machine, SiteStatus
from storage.account import Account, accounts
from storage.blob import BlobStore
from storage.control import load_invitation, load_member
from storage.jobs import list_jobs
from storage.liveness import Seen, open_liveness
from storage.log import VersionLog
from storage.open import open_store


@dataclass(frozen=True)
class Part:
    """What the store says of a site in one job."""

    job: str
    closed: str | None
    member: Member | None
    invitation: Invitation | None
    account: Account | None


def list_sites(as_json: Json = False, live_url: LiveUrl = None) -> None:
    """Show every site that was there in the last 30 days: its condition, what it does, and how busy its computer is.

    Example: fedqueue site list
    """
    settings = load(live_url=live_url)
    try:
        sites = open_liveness(settings).sites()
    except FedqueueError as exc:
        fail(exc)
    if as_json:
        typer.echo(json.dumps([_seen_json(seen, settings) for seen in sites], indent=1))
        return
    if not sites:
        _say(
            "no heartbeat in the last 30 days, or since the view of sites was lost: `fedqueue site run` sends them"
        )
        return
    table = Table(
        *(
            "site",
            "condition",
            "state",
            "job",
            "from",
            "step",
            "load of",
            "memory GB",
            "GPU GB",
            "outbox",
            "seen",
        ),
        box=None,
    )
    for seen in sites:
        status, machine = seen.status, seen.status.machine or Machine()
        gpu = machine.gpu
        table.add_row(
            status.site,
            seen.condition(settings.heartbeat_s, settings.heartbeat_ttl_s),
            status.state,
            status.job or "",
            "" if status.base_version is None else str(status.base_version),
            f"{status.step}/{status.steps}" if status.steps else "",
            _load(machine),
            used_text(machine.memory_used_bytes, machine.memory_total_bytes),
            "" if gpu is None else used_text(gpu.memory_used_bytes, gpu.memory_total_bytes),
            str(status.outbox),
            age_text(seen.age_s),
        )
    console.print(table)
    for seen in sites:
        if seen.status.problem_at is not None:
            _say(f"{seen.status.site}: {_problem(seen.status)}")


def show_site(
    site: Annotated[str, typer.Argument(envvar="FEDQUEUE_CLI_SITE", help="the site's name")],
    as_json: Json = False,
    live_url: LiveUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Everything that is known of one site: its last heartbeat, the jobs that it joined or declined, what it gave them.

    Example: fedqueue site show north
    """
    settings = load(live_url=live_url, store_url=store_url)
    try:
        seen = {seen.status.site: seen for seen in _sites(settings)}
        with console.status("reading the logs"):
            parts = site_parts(open_store(settings), site)
    except FedqueueError as exc:
        fail(exc)
    if site not in seen and not parts:
        fail(f"nothing is known of a site {site!r}; heartbeats came from: {', '.join(seen) or 'none'}")
    known = seen.get(site)
    if as_json:
        document = {
            "site": site,
            "seen": None if known is None else _seen_json(known, settings),
            "jobs": [_part_json(part) for part in parts],
        }
        typer.echo(json.dumps(document, indent=1))
        return
    console.print(f"[bold]{escape(site)}[/]", highlight=False)
    if known is None:
        _say("no heartbeat in the last 30 days, or since the view of sites was lost")
    else:
        table = Table.grid(padding=(0, 2))
        for name, value in _facts(known, settings):
            table.add_row(name, escape(printable(value)))
        console.print(table)
    if parts:
        console.print()
        console.print(_parts_table(parts))
        for part in parts:
            if part.member is not None and part.member.reason:
                _say(f"{part.job}: {part.member.answer}: {printable(part.member.reason)}")


def site_parts(store: BlobStore, site: str) -> list[Part]:
    """By job, of the jobs that the site has to do with. Raises CorruptLog, StoreUnavailable."""
    found = []
    for job in list_jobs(store):
        member, invitation = load_member(store, job, site), load_invitation(store, job, site)
        sent = next(iter(store.list(f"{keys.updates_prefix(job)}{site}/")), None)
        if member is None and invitation is None and sent is None:
            continue  # whoever contributed without a word of joining has payloads as long as they are kept
        records = list(VersionLog(store, job).history())
        account = accounts(records).get(site)
        found.append(Part(job, records[-1].head.closed, member, invitation, account))
    return found


def _sites(settings: Settings) -> list[Seen]:
    """None of them if liveness is down: the store has the rest."""
    try:
        return open_liveness(settings).sites()
    except Transient as exc:
        errors.print(f"no heartbeats: {exc}", markup=False, highlight=False, soft_wrap=True)
        return []


def _load(machine: Machine) -> str:
    if machine.load is None:
        return ""
    return f"{machine.load:.1f}" + (f"/{machine.cores}" if machine.cores else "")


def _problem(status: SiteStatus) -> str:
    return f"{status.problem_at:%Y-%m-%d %H:%M:%S}: {printable(status.problem)}"


def _facts(seen: Seen, settings: Settings) -> list[tuple[str, str]]:
    status, machine = seen.status, seen.status.machine or Machine()
    gpu = machine.gpu
    condition = seen.condition(settings.heartbeat_s, settings.heartbeat_ttl_s)
    facts = {
        "condition": condition,
        "state" if condition == "connected" else "last state": status.state,
        "last seen": f"{seen.seen_at:%Y-%m-%d %H:%M:%S} UTC, {age_text(seen.age_s)}",
        "its clock then": f"{status.at:%Y-%m-%d %H:%M:%S}",
        "detail": status.detail,
        "job": status.job or "",
        "from version": "" if status.base_version is None else str(status.base_version),
        "step": f"{status.step} of {status.steps}" if status.steps else "",
        "epochs so far": f"{status.epoch:.2f}",
        "outbox": f"{status.outbox} updates finished and not confirmed",
        "sent": f"{status.updates} updates since it started",
        "attempts dropped": str(status.dropped),
        "problem": "" if status.problem_at is None else _problem(status),
        "agent version": status.agent_version,
        "load of cores": _load(machine),
        "CPU": "" if machine.cpu is None else f"{machine.cpu:.0%}",
        "memory GB": used_text(machine.memory_used_bytes, machine.memory_total_bytes),
        "GPU GB": ""
        if gpu is None
        else f"{used_text(gpu.memory_used_bytes, gpu.memory_total_bytes)}, {gpu.name}",
    }
    return [(name, value) for name, value in facts.items() if value]


def _parts_table(parts: list[Part]) -> Table:
    table = Table(
        *(
            "job",
            "answer",
            "images",
            "invited until (UTC)",
            "merged",
            "rejected",
            "last merged (UTC)",
            "travelled",
        ),
        "ratio",
        box=None,
    )
    for part in parts:
        member, account = part.member, part.account or Account()
        last = account.last
        table.add_row(
            part.job if part.closed is None else f"{part.job} (closed)",
            "" if member is None else member.answer,
            str(member.num_images) if member is not None and member.num_images else "",
            "" if part.invitation is None else f"{part.invitation.expires_at:%m-%d %H:%M:%S}",
            str(account.merged),
            str(account.rejected),
            "" if last is None else f"v{last.version}, τ {last.staleness}, {account.last_at:%m-%d %H:%M}",
            bytes_text(account.travelled_bytes) if account.travelled_bytes else "",
            ratio_text(account.ratio),
        )
    return table


def _seen_json(seen: Seen, settings: Settings) -> dict[str, Any]:
    machine = seen.status.machine
    return {
        "site": seen.status.site,
        "condition": seen.condition(settings.heartbeat_s, settings.heartbeat_ttl_s),
        "seen_at": seen.seen_at.isoformat(),
        "age_s": seen.age_s,
        "load_per_core": None if machine is None else machine.load_per_core,
        "status": seen.status.model_dump(mode="json"),
    }


def _part_json(part: Part) -> dict[str, Any]:
    return {
        "job": part.job,
        "closed": part.closed,
        "member": None if part.member is None else part.member.model_dump(mode="json"),
        "invitation": None if part.invitation is None else part.invitation.model_dump(mode="json"),
        "account": None if part.account is None else account_json(part.account),
    }


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
