"""`fedqueue release …`: giving a version away outside, when the sites whose work is in it consent. docs/release.md."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from aggregator.consent import Standing, judge
from aggregator.lineage import lineage
from cli.asking import WaitS, ask
from cli.options import BrokerUrl, JobArgument, StoreUrl, console, fail, load, printable
from cli.release_check import Checked, check
from federation import keys
from federation.errors import FedqueueError, NotFound
from federation.governance import Card
from federation.jobs import Job
from federation.requests import MAX_REASON, AnswerRelease, Consent, ProposeRelease
from federation.settings import Settings, env_name
from federation.signatures import fingerprint, is_fingerprint
from storage.blob import BlobStore
from storage.channels import check_wanted, resolve
from storage.control import announced, load_key
from storage.files import replace_durably
from storage.jobs import load_job
from storage.log import VersionLog
from storage.open import open_store
from storage.releases import (
    MAX_SUMS_BYTES,
    SUMS,
    Release,
    is_released,
    load_release,
    parse_sums,
    proposed_versions,
)

app = typer.Typer(
    help="Give a version away outside, when the sites whose work is in it consent.", no_args_is_help=True
)

Number = Annotated[int, typer.Argument(envvar="FEDQUEUE_CLI_VERSION", min=0, help="the version's number")]
Wanted = Annotated[
    str, typer.Argument(envvar="FEDQUEUE_CLI_VERSION", help="latest, best, stable, or the version's number")
]
SiteName = Annotated[
    str | None, typer.Option(envvar=env_name("site"), help="this site's name; none: an operator")
]
StateFolder = Annotated[
    Path | None, typer.Option(envvar=env_name("site_state"), help="folder of this site's key")
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        envvar="FEDQUEUE_CLI_KEYS",
        help="SITE=FINGERPRINT, as that site told you another way; may be repeated",
    ),
]
RELEASED = "released"
PRINTED = 12
"""Digits of a digest in a line for people."""


@app.command()
def propose(
    job: JobArgument,
    version: Wanted,
    purpose: Annotated[
        str, typer.Option(envvar="FEDQUEUE_CLI_PURPOSE", help="to whom and what for; the sites sign it, too")
    ] = "",
    wait_s: WaitS = 60.0,
    site: SiteName = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Ask every site whose work is in a version whether it may be given away. Of the job's submitter, or an operator.

    Example: fedqueue release propose street best --purpose "pilot at the city of Graz, until June"
    """
    purpose = _short("purpose", purpose.strip())
    settings = load(site=site, broker_url=broker_url, store_url=store_url)
    try:
        store = open_store(settings)
        number = _number(store, job, version)
    except FedqueueError as exc:
        fail(exc)
    ask(settings, store, ProposeRelease(job=job, version=number, purpose=purpose), wait_s)


@app.command("list")
def list_proposals(
    everything: Annotated[
        bool, typer.Option("--all", envvar="FEDQUEUE_CLI_ALL", help="also what is answered or released")
    ] = False,
    site: SiteName = None,
    store_url: StoreUrl = None,
) -> None:
    """The proposals that wait for this site's answer; of an operator, those that are not released yet.

    Example: fedqueue release list
    """
    settings = load(site=site, store_url=store_url)
    table = Table("job", "version", "proposed (UTC)", "state", "we", "purpose", box=None)
    try:
        store = open_store(settings)
        with console.status("reading the proposals"):
            for job_id in announced(store):
                for version in proposed_versions(store, job_id):
                    release = load_release(store, job_id, version)
                    if release is None:
                        continue
                    stage, standing = _stage(store, load_job(store, job_id), release)
                    waits = stage != RELEASED and (settings.site is None or settings.site in standing.waiting)
                    if everything or waits:
                        table.add_row(
                            job_id,
                            str(version),
                            _minute(release.proposal.at),
                            stage,
                            _our_answer(release, settings.site),
                            escape(printable(release.proposal.purpose)),
                        )
    except FedqueueError as exc:
        fail(exc)
    if table.row_count:
        console.print(table)
    else:
        console.print("nothing waits" if not everything else "nothing was proposed")


@app.command()
def show(job: JobArgument, version: Wanted, site: SiteName = None, store_url: StoreUrl = None) -> None:
    """A proposal: what was asked, who answered what and why, and whether the job's rule is met.

    Example: fedqueue release show street 41
    """
    settings = load(site=site, store_url=store_url)
    try:
        store = open_store(settings)
        number = _number(store, job, version)
        the_job, release = load_job(store, job), _proposed(store, job, number)
        stage, standing = _stage(store, the_job, release)
        parts = lineage(VersionLog(store, job).history(), number).parts
        pinned = {name: load_key(store, name) for name in release.proposal.contributors}
    except FedqueueError as exc:
        fail(exc)
    proposal = release.proposal
    _say(f"{job}, version {number}: {stage}; {standing.describe()}")
    _say(f"purpose: {proposal.purpose or 'none was stated'}")
    _say(f"proposed by {proposal.by} at {_minute(proposal.at)} UTC")
    _say(f"rule: {the_job.spec.release.approvals} of the contributors must approve")
    _say(f"file: {proposal.file_bytes} bytes, sha256 {proposal.file_sha256}")
    table = Table("site", "share", "updates", "answer", "named", "at (UTC)", "key", box=None)
    newest = release.newest
    for name in proposal.contributors:
        part, told = parts.get(name), pinned[name]
        answer = newest.get(name)
        consent = answer.consent.consent() if answer is not None else None
        table.add_row(
            name,
            f"{part.share:.1%}" if part else "?",
            str(part.updates) if part else "?",
            consent.answer if consent else "",
            ("yes" if consent.site else "no") if consent and consent.answer == "approve" else "",
            _minute(consent.at) if consent else "",
            fingerprint(told.public_key)[:9] + "…" if told else "not told",
        )
    console.print(table)
    for answer in release.answers:
        consent, counts = answer.consent.consent(), newest[answer.site] is answer
        if consent.reason or not counts:
            _say(
                f"{'' if counts else 'before: '}{answer.site} {consent.answer}d at {_minute(consent.at)} UTC"
                + (f": {consent.reason}" if consent.reason else "")
            )
    if set(parts) != set(proposal.contributors):
        fail(f"by the log the contributors are {', '.join(parts)}: the proposal does not ask the same sites")


@app.command()
def approve(
    job: JobArgument,
    version: Number,
    name_us: Annotated[
        bool,
        typer.Option(
            "--name-us/--anonymous",
            envvar="FEDQUEUE_CLI_NAME_US",
            help="whether the model card may name this site, its share and its figures",
        ),
    ] = False,
    reason: Annotated[
        str, typer.Option(envvar="FEDQUEUE_CLI_REASON", help="a remark for the other participants")
    ] = "",
    wait_s: WaitS = 60.0,
    site: SiteName = None,
    state: StateFolder = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Consent to a proposal, signed with this site's key. Until it is released, a site may still change its mind.

    Example: fedqueue release approve street 41 --name-us
    """
    settings = load(site=site, site_state=state, broker_url=broker_url, store_url=store_url)
    _answer(settings, job, version, "approve", reason, name_us, wait_s)


@app.command()
def refuse(
    job: JobArgument,
    version: Number,
    reason: Annotated[
        str,
        typer.Option(envvar="FEDQUEUE_CLI_REASON", help="why, for the other participants; it is recorded"),
    ],
    wait_s: WaitS = 60.0,
    site: SiteName = None,
    state: StateFolder = None,
    broker_url: BrokerUrl = None,
    store_url: StoreUrl = None,
) -> None:
    """Refuse a proposal, signed with this site's key. Until it is released, a site may still change its mind.

    Example: fedqueue release refuse street 41 --reason "our contract covers pilots only"
    """
    settings = load(site=site, site_state=state, broker_url=broker_url, store_url=store_url)
    _answer(settings, job, version, "refuse", reason, False, wait_s)


def _answer(
    settings: Settings,
    job: str,
    version: int,
    answer: Literal["approve", "refuse"],
    reason: str,
    name_us: bool,
    wait_s: float,
) -> None:
    if settings.site is None:
        fail(
            "only a site answers, and only for itself: --site or FEDQUEUE_SITE, on the machine that has its key"
        )
    _short("reason", reason)
    from producers.site_key import site_key

    try:
        store = open_store(settings)
        release = _proposed(store, job, version)
        _check_question(store, release, settings.site)
        key = site_key(settings.site_state)
    except FedqueueError as exc:
        fail(exc)
    proposal = release.proposal
    signed = (
        Consent(
            kind="release-consent",
            job=job,
            version=version,
            model_sha256=proposal.model_sha256,
            file_sha256=proposal.file_sha256,
            purpose=proposal.purpose,
            answer=answer,
            reason=reason,
            site=settings.site if name_us else None,
            at=datetime.now(UTC),
        )
        .to_json()
        .decode()
    )
    _say(f"signing with the key {fingerprint(key.public_key)}:")
    _say(signed)
    what = AnswerRelease(
        job=job, version=version, signed=signed, public_key=key.public_key, signature=key.sign(signed)
    )
    ask(settings, store, what, wait_s)


def _check_question(store: BlobStore, release: Release, site: str) -> None:
    """What is asked must agree with the log, which says what the version is. Exits if it does not."""
    proposal = release.proposal
    log = VersionLog(store, proposal.job)
    if log.version(proposal.version).model.sha256 != proposal.model_sha256:
        fail(
            f"the proposal names another model than version {proposal.version} in the log: ask the operator why"
        )
    contributors = lineage(log.history(), proposal.version).parts
    if site not in contributors:
        fail(
            f"no work of {site} is in version {proposal.version} of {proposal.job}: nobody needs your consent"
        )
    if set(contributors) != set(proposal.contributors):
        fail(
            f"by the log the contributors are {', '.join(contributors)}, but asked were "
            f"{', '.join(proposal.contributors)}: ask the operator why"
        )


@app.command()
def fetch(
    job: JobArgument,
    version: Wanted,
    out: Annotated[
        Path, typer.Option(envvar="FEDQUEUE_CLI_OUT", help="folder for the bundle; made, or empty")
    ],
    key: Keys = None,
    store_url: StoreUrl = None,
) -> None:
    """Download a bundle and check it: digests, signatures, rule.

    Example: fedqueue release fetch street 41 --out street-41
    """
    settings = load(store_url=store_url)
    known = _known_keys(key)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"{out} is there and is not an empty folder")
    try:
        store = open_store(settings)
        number = _number(store, job, version)
        if not is_released(store, job, number):
            _proposed(store, job, number)
            fail(
                f"version {number} of {job} is not released: `fedqueue release show {job} {number}` says why"
            )
        with console.status("downloading"):
            _download(store, job, number, out)
    except FedqueueError as exc:
        fail(exc)
    except OSError as exc:
        fail(f"{out} cannot be written: {exc}")
    _tell(out, check(out, known))


def _download(store: BlobStore, job: str, version: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data = store.get(keys.bundle_key(job, version, SUMS), max_bytes=MAX_SUMS_BYTES)
    for name, digest in parse_sums(data).items():
        source = keys.bundle_key(job, version, name)
        store.get_to_file(source, out / name, nbytes=store.size(source), sha256=digest)
    replace_durably(out / SUMS, data)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a bundle, as `fedqueue release fetch` wrote it")],
    key: Keys = None,
) -> None:
    """Check a bundle without store or network: its files, the sites' signatures, the job's rule.

    Without --key it shows the fingerprints to ask the sites for: what they tell you themselves no forger can replace.

    Example: fedqueue release verify street-41 --key north=0f3a-5c11-99ab-d210-7e52-4c01-aa3f-6b90
    """
    _tell(folder, check(folder, _known_keys(key)))


def _known_keys(given: list[str] | None) -> dict[str, str]:
    known = {}
    for text in given or []:
        site, _, told = text.partition("=")
        told = told.strip().lower()
        if not is_fingerprint(told):
            fail(
                f"--key {text}: write SITE=FINGERPRINT, eight groups of four digits as `fedqueue site key` shows it"
            )
        known[site.strip()] = told
    return known


def _tell(folder: Path, checked: Checked) -> None:
    for approval in checked.approvals:
        who = approval.site or (f"{approval.known_as}, not named," if approval.known_as else "a participant")
        how = "the key that you gave" if approval.known_as else "compare it with what the site tells you"
        _say(f"approved by {who} with {approval.fingerprint} ({how})")
    if checked.problems or checked.card is None:
        fail(f"{folder} is not what was released: " + "; ".join(checked.problems))
    card: Card = checked.card
    _say(f"for the purpose: {card.purpose or 'none was stated'}")
    _say(
        f"{folder}: {card.job} version {card.version}, sha256 {card.file_sha256[:PRINTED]}…: every file is whole, "
        f"and {card.approved} of {card.contributors} contributors approved"
    )
    if card.onnx_sha256 is None:
        _say(f"no ONNX file: {card.onnx_problem}")


def _number(store: BlobStore, job: str, wanted: str) -> int:
    """The number of a version as it may be asked for. Raises NotFound. Exits if it is no such word."""
    try:
        return resolve(store, job, check_wanted(wanted)).current.version
    except ValueError as exc:
        fail(str(exc))


def _proposed(store: BlobStore, job: str, version: int) -> Release:
    """Raises NotFound."""
    release = load_release(store, job, version)
    if release is None:
        raise NotFound(
            f"nobody has proposed to release version {version} of {job}: `fedqueue release propose {job} {version}`"
        )
    return release


def _stage(store: BlobStore, job: Job, release: Release) -> tuple[str, Standing]:
    """Where it stands, in a few words, and what the answers come to."""
    proposal = release.proposal
    standing = judge(job.spec.release, proposal.contributors, release.approves)
    if is_released(store, job.id, proposal.version):
        return RELEASED, standing
    if standing.met and release.decision is None:
        withdrawn = VersionLog(store, job.id).head().head.withdrawn(proposal.version)
        if withdrawn is not None:
            return f"approved, not written because it is {withdrawn}", standing
    if release.decision is not None or standing.met:
        return "approved, waits for an evaluation worker", standing
    return "refused" if standing.blocked else "waits for answers", standing


def _minute(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


def _our_answer(release: Release, site: str | None) -> str:
    answer = release.newest.get(site or "")
    return answer.consent.consent().answer if answer is not None else ""


def _short(what: str, text: str) -> str:
    """`text`, which is signed or recorded as it is, never cut. Exits if it is too long."""
    if len(text) > MAX_REASON:
        fail(f"--{what}: {len(text)} characters, at most {MAX_REASON} can be recorded")
    return text


def _say(line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
