"""The chaos run. CHAOS_SECONDS (600) and CHAOS_SEED choose it; the report goes to runs/chaos-<seed>.md.

Whatever fails is collected, so that the report is written in any case; the test fails with it at the end.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from federation.errors import Transient
from storage.liveness import open_liveness
from tests.chaos import accounting, report
from tests.chaos.deployment import INGRESSES, JOB, SITE_SETTINGS, SITES, WORKERS, Deployment, deployment
from tests.chaos.killer import Killer
from tests.chaos.plan import OUTAGES, plan
from tests.integration.servers import ROOT, until

log = logging.getLogger("fedqueue.chaos")

SECONDS = float(os.environ.get("CHAOS_SECONDS") or 600)
SEED = int(os.environ.get("CHAOS_SEED") or 1)
RECOVERY_LIMIT_S = 120.0
"""From the last fault until everybody works again."""
START_S = 15.0
"""So long after an outage a process may still end because of it: it began to start before."""
DRAIN_LIMIT_S = 240.0
"""From the sites' last training until every update has its fate and every site knows it."""
COMMAND_LIMIT_S = 400.0


@pytest.mark.chaos
@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.s3
@pytest.mark.timeout(SECONDS + 900)
def test_nothing_lost_nothing_counted_twice(tmp_path: Path) -> None:
    problems: list[str] = []
    with deployment(tmp_path, SEED) as its:
        until("every site's first publish", lambda: all(site.journal.read() for site in its.sites.values()))
        killer = Killer(its)
        killer.run(plan(SEED, SECONDS, WORKERS, INGRESSES, SITES), SECONDS)
        problems += all_at_work(its, since=time.time())
        settled = time.time()
        log.info("everybody works again")
        its.idle.touch()
        problems += all_told(its)
        log.info("every update has its fate")
        problems += stayed_up(its, killer, settled)
        problems += ended_well(its)
        verdicts = {command: fedqueue(its, command, JOB) for command in ("audit", "replay")}
        run = account(its, killer, problems, verdicts)
    path = ROOT / "runs" / f"chaos-{SEED}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(run.markdown())
    print(f"\n{run.markdown()}\nlogs: {tmp_path}")
    assert not run.problems, "\n".join(run.problems)


# --- waiting for what must happen by itself ----------------------------------------------------------------------


def all_at_work(its: Deployment, since: float) -> Iterator[str]:
    """Wait until every process runs and reads its queue, every site publishes and is seen, and the log grows."""

    def idle() -> list[str]:
        found = [process.name for process in its.processes if not process.running()]
        found += [name for name, site in its.sites.items() if not site.journal.since(since)]
        found += [] if its.newest_record() > since else ["the log"]
        found += missing_heartbeats(its)
        return found or [f"{count} readers of {queue}" for queue, count in its.absent().items() if count]

    yield from waited(RECOVERY_LIMIT_S, idle, "after the last fault these did not work again")


def all_told(its: Deployment) -> Iterator[str]:
    """Wait until every update has its fate, and every site knows it."""

    def left() -> list[str]:
        head = its.server.head(JOB)
        assert head is not None
        found = [f"{len(head.pending)} updates pending"] if head.pending else []
        found += [
            f"{len(site.outbox())} in the outbox of {name}"
            for name, site in its.sites.items()
            if site.outbox()
        ]
        found += [f"{count} messages in {queue}" for queue, count in its.waiting().items() if count]
        return found or untold(its)

    yield from waited(DRAIN_LIMIT_S, left, "after the last training this was left")


def untold(its: Deployment) -> list[str]:
    """Sites that wait for the fate of an update. For one that became a dead letter they wait long, and rightly."""
    sent = {name: site.sent() for name, site in its.sites.items()}
    if not any(sent.values()):
        return []
    dead = accounting.dead_letters(its.server.store).ids
    return [
        f"{name} does not know what became of {len(ids - dead)}" for name, ids in sent.items() if ids - dead
    ]


def missing_heartbeats(its: Deployment) -> list[str]:
    try:
        sites = open_liveness(its.server.settings).sites()
    except Transient:
        return ["Redis"]
    beats = SITE_SETTINGS["heartbeat_s"], SITE_SETTINGS["heartbeat_ttl_s"]
    connected = {seen.status.site for seen in sites if seen.condition(*beats) == "connected"}
    return [f"heartbeats of {name}" for name in its.sites if name not in connected]


def waited(limit_s: float, left: Callable[[], list[str]], what: str) -> Iterator[str]:
    """Ask for what is `left` until that is nothing; a problem if it never is."""
    deadline = time.monotonic() + limit_s
    while found := left():
        if time.monotonic() > deadline:
            yield f"{what}, in {limit_s:.0f} s: {', '.join(found)}"
            return
        time.sleep(0.5)


# --- what must be true at the end --------------------------------------------------------------------------------


def stayed_up(its: Deployment, killer: Killer, since: float) -> Iterator[str]:
    """Nobody dies after the last fault. Before, a server process may end because it cannot start without a server;
    a site never ends by itself."""
    away = [(one.began, one.ended + START_S) for one in killer.done if one.fault.kind in OUTAGES]
    sites = {site.process.name for site in its.sites.values()}
    for process in its.processes:
        for end in process.ends:
            if end.at > since:
                yield f"{process.name} ended with status {end.code} although all faults were over"
            elif end.killed:
                continue
            elif process.name in sites or not any(began < end.at < ended for began, ended in away):
                yield f"{process.name} ended by itself with status {end.code}"


def ended_well(its: Deployment) -> Iterator[str]:
    """SIGTERM ends every process in good order."""
    for name, code in its.supervisor.stop().items():
        if code != 0:
            yield f"{name} answered SIGTERM with status {code}"


def fedqueue(its: Deployment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The operator's command, with the server's settings."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=ROOT,
        env={**os.environ, **its.server.environment},
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
        check=False,
    )


def account(
    its: Deployment,
    killer: Killer,
    problems: list[str],
    verdicts: dict[str, subprocess.CompletedProcess[str]],
) -> report.Run:
    """Read everything and judge it."""
    failed = [
        f"fedqueue {command} ended with status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        for command, done in verdicts.items()
        if done.returncode
    ]
    journals = {name: site.journal.read() for name, site in its.sites.items()}
    confirmed = [words[0] for lines in journals.values() for _, words in lines]
    kept = set().union(*(site.outbox() | site.sent() for site in its.sites.values()))
    ledger = accounting.read(its.server.store, JOB)
    confirms = {name: [at for at, _ in lines] for name, lines in journals.items()}
    recovered = report.recoveries(killer.done, ledger.times, confirms)
    never = [
        f"never recovered from: {one.done.fault.kind} {one.done.target}"
        for one in recovered
        if one.seconds is None
    ]
    in_sites = Counter(" ".join(words) for site in its.sites.values() for _, words in site.faults.read())
    worker_logs = [worker.log.read_text(errors="replace") for worker in its.workers.values()]
    return report.Run(
        seed=SEED,
        seconds=SECONDS,
        recovered=recovered,
        missed=killer.missed,
        in_sites=in_sites,
        confirmed=confirmed,
        ledger=ledger,
        duplicates=sum(
            text.count(" is a duplicate") + text.count(" is a late duplicate") for text in worker_logs
        ),
        dropped_publishes=sum(text.count(": another worker published") for text in worker_logs),
        own_ends={p.name: n for p in its.processes if (n := sum(not end.killed for end in p.ends))},
        verdicts=[done.stdout.strip().rpartition("\n")[2] for done in verdicts.values()],
        problems=[*problems, *failed, *never, *accounting.problems(ledger, set(confirmed), kept)],
    )
