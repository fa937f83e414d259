"""`fedqueue job invitations`: whom a job has invited, and what the others wait for."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.table import Table

from cli.options import JobArgument, LiveUrl, StoreUrl, console, errors, fail, load, no_job
from federation.errors import FedqueueError, NotFound, Transient
from federation.jobs import Job
from federation.settings import Settings
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.liveness import Seen, open_liveness
from storage.open import open_store
from tasks.invite import Place, places


def invitations(job: JobArgument, store_url: StoreUrl = None, live_url: LiveUrl = None) -> None:
    """Of a job that invites its sites: who was invited when, and what each site that has joined waits for.

    Example: fedqueue job invitations street
    """
    settings = load(store_url=store_url, live_url=live_url)
    try:
        store = open_store(settings)
        with console.status("reading invitations and log"):
            the_job = load_job(store, job)
            if the_job.spec.participation.mode != "invited":
                fail(f"job {job} is free-running: every site that has joined trains whenever it can")
            table = invitation_table(store, the_job, settings, datetime.now(UTC))
    except NotFound:
        no_job(store, job)
    except FedqueueError as exc:
        fail(exc)
    console.print(table)


def invitation_table(store: BlobStore, job: Job, settings: Settings, now: datetime) -> Table:
    """One line for each site that has joined; without liveness none is known to be connected.

    Raises NotFound, CorruptLog, StoreUnavailable.
    """
    seen: dict[str, Seen] = {}
    try:
        seen = {site.status.site: site for site in open_liveness(settings).sites()}
    except Transient as exc:
        errors.print(f"who is connected is not known: {exc}", markup=False, highlight=False, soft_wrap=True)
    table = Table("site", "images", "invited (UTC)", "until", "answered", "expected", "", box=None)
    for place in places(store, job, seen, settings, now):
        table.add_row(*_row(place))
    return table


def _row(place: Place) -> tuple[str, ...]:
    candidate, invitation = place.candidate, place.invitation
    return (
        candidate.site,
        str(candidate.num_images) if candidate.num_images else "?",
        f"{invitation.invited_at:%m-%d %H:%M:%S}" if invitation else "never",
        f"{invitation.expires_at:%H:%M:%S}" if invitation else "",
        f"{place.answered:%H:%M:%S}" if place.answered else "",
        f"{candidate.expected_s:.0f} s" if candidate.expected_s is not None else "",
        place.why,
    )
