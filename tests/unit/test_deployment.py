"""A deployed folder follows its channel, holds one whole model at every moment, and goes back if a check says no."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aggregator.transitions import roll_back
from federation.errors import BadSettings, NotFound, StoreUnavailable, Transient
from federation.types import Promoted, RolledBack
from producers.deployed import CURRENT, PREVIOUS, DeployedFolder, Manifest, Note, read_note
from producers.deployment import Deployment, Outcome
from producers.offline import OfflineModels
from producers.postcheck import CheckFailed, CheckStopped, Command
from storage.tensors import decode
from tests.factories import job_spec, payload_of, toy_arrays
from tests.integration.servers import ROOT, until
from tests.killed_calls import kills
from tests.unit.test_offline import NORM, URL, Federation

YES, NO = "true", "false"


@dataclass
class Site:
    """A site whose processes end after each look: nothing is remembered but on disk."""

    folder: Path
    federation: Federation = field(default_factory=Federation)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def out(self) -> Path:
        return self.folder / "deployed"

    def promote(self, number: int) -> None:
        log = self.federation.log
        newest = log.head()
        if newest.head.version < number:
            self.federation.publish(number)
            newest = log.head()
        version = log.version(number)
        log.append(newest, Promoted(version=number), newest.head.model_copy(update={"stable": version}))

    def look(self, check: str | None = None, *, retry: bool = False, channel: str = "stable") -> Outcome:
        folder = DeployedFolder(self.out, "toy")
        deployment = Deployment(
            folder,
            channel,
            OfflineModels(URL, "toy", self.folder / "cache", self.folder / "site"),
            self.federation.connect,
            self.stop,
            check=None if check is None else Command.parse(check, 10),
        )
        with folder.locked():
            deployment.begin(retry=retry)
            return deployment.look()

    def versions(self) -> tuple[int | None, int | None]:
        """What a reader finds at `current` and `previous`, each whole."""
        return served(self.out, CURRENT), served(self.out, PREVIOUS)


(RECIPE,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)
READER: dict[str, Any] = {}
exec(RECIPE, READER)


def served(out: Path, link: str = CURRENT) -> int | None:
    """What is read as docs/deploy.md says. Every weight is its version's number."""
    path = READER["look"](out) if link == CURRENT else os.path.realpath(out / link)
    if path is None or not os.path.lexists(out / link):
        assert not os.path.lexists(out / link), "a link leads nowhere"
        return None
    manifest, data = READER["read"](path)
    assert float(decode(data).arrays()["conv.weight"].flat[0]) == manifest["version"]
    return int(manifest["version"])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_is_promoted_is_deployed_with_all_that_a_program_must_know(site: Site) -> None:
    with pytest.raises(NotFound, match="fedqueue model promote toy"):
        site.look()
    site.promote(1)
    site.federation.measure(1, 0.5)
    outcome = site.look()
    assert (outcome.state, site.versions()) == ("deployed", (1, None))
    manifest = Manifest.from_json((site.out / "current" / "manifest.json").read_bytes())
    assert (manifest.job, manifest.channel, manifest.previous) == ("toy", "stable", None)
    assert (manifest.arch, manifest.classes, manifest.image_size) == ("toy", ("thing",), 256)
    assert manifest.metrics == {"server": {"mAP@0.5": 0.5}}
    assert os.readlink(site.out / "current") == "versions/1", "relative: the folder may be mounted elsewhere"
    again = site.look()
    assert (again.state, site.versions()) == ("up-to-date", (1, None))


def test_two_versions_are_kept(site: Site) -> None:
    for number in (1, 2, 3):
        site.promote(number)
        assert site.look().state == "deployed"
    assert site.versions() == (3, 2)
    assert {path.name for path in (site.out / "versions").iterdir()} == {"2", "3"}
    manifest = DeployedFolder(site.out, "toy").deployed()
    assert manifest is not None
    assert manifest.previous == 2


def test_a_channel_that_moves_back_takes_the_model_back(site: Site) -> None:
    for number in (1, 2, 3, 2, 1, 2):
        site.promote(number)
        assert site.look().state == "deployed"
        assert served(site.out) == number
    assert site.versions() == (2, 1)
    assert [entry.version for entry in _note(site).history] == [1, 2, 3, 2, 1, 2]


def test_who_uses_a_version_that_the_job_has_rolled_back_is_told(site: Site) -> None:
    for number in (1, 2):
        site.promote(number)
    assert "note" not in site.look().message
    log = site.federation.log
    newest = log.head()
    log.append(newest, RolledBack(to=1), roll_back(job_spec(), newest.head, log.version(1), ()))
    outcome = site.look()
    assert (outcome.state, site.versions()) == ("up-to-date", (2, None)), "stable is what was promoted"
    assert "note that the job says of version 2: rolled back" in outcome.message


def test_latest_follows_every_version(site: Site) -> None:
    for number in (1, 2):
        site.federation.publish(number)
        site.look(channel="latest")
        assert served(site.out) == number


def test_a_failed_check_brings_the_one_before_back_and_is_remembered(site: Site, tmp_path: Path) -> None:
    for number in (1, 2):
        site.promote(number)
        site.look()
    runs = tmp_path / "runs"
    check = f"sh -c 'echo {{dir}} >> {runs}; echo the picture is black; exit 3'"
    site.promote(3)
    outcome = site.look(check)
    assert outcome.state == "failed"
    assert "exit status 3: the picture is black" in outcome.message
    assert "rolled back" in outcome.message
    assert site.versions() == (2, 1)
    assert runs.read_text() == f"{site.out / 'current'}\n", "it judges what is served"
    again = site.look(check)
    assert (again.state, site.versions()) == ("failed", (2, 1))
    assert "--retry" in again.message
    assert len(runs.read_text().splitlines()) == 1, "it is not tried again"
    assert site.look(check, retry=True).state == "failed"
    assert len(runs.read_text().splitlines()) == 2
    assert site.look(YES, retry=True).state == "deployed"
    assert site.versions() == (3, 2)
    assert [entry.what for entry in _note(site).history] == ["deployed"] * 2 + ["failed"] * 2 + ["deployed"]


def test_a_newer_version_is_tried_though_one_before_it_failed(site: Site) -> None:
    site.promote(1)
    site.look()
    site.promote(2)
    assert site.look(NO).state == "failed"
    site.promote(3)
    assert site.look(YES).state == "deployed"
    assert site.versions() == (3, 1)


def test_a_first_version_that_fails_leaves_nothing(site: Site) -> None:
    site.promote(1)
    assert site.look(NO).state == "failed"
    assert site.versions() == (None, None)
    assert list((site.out / "versions").iterdir()) == []


def test_a_channel_that_moves_back_to_a_version_that_fails_now_changes_nothing(site: Site) -> None:
    for number in (1, 2):
        site.promote(number)
        site.look()
    site.promote(1)
    assert site.look(NO).state == "failed"
    assert site.versions() == (2, 1)


def test_what_is_deployed_stays_while_the_store_is_away(site: Site) -> None:
    site.federation.away = True
    with pytest.raises(StoreUnavailable, match="nothing to use without it"):
        site.look()
    site.federation.away = False
    site.promote(1)
    site.look()
    site.promote(2)
    site.federation.away = True
    outcome = site.look()
    assert (outcome.state, site.versions()) == ("away", (1, None))
    shutil.rmtree(site.out)
    assert site.look().state == "deployed", "from the cache, as the store said when it answered"
    assert site.versions() == (1, None)


def test_a_damaged_model_is_replaced(site: Site) -> None:
    site.promote(1)
    site.look()
    model = Path(os.path.realpath(site.out / "current" / "model.safetensors"))
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    assert site.look().state == "deployed"
    assert served(site.out) == 1


def test_a_site_that_keeps_its_norm_layers_gets_its_own(tmp_path: Path) -> None:
    site = Site(tmp_path, Federation(norm="local"))
    (tmp_path / "site").mkdir()
    own = {name: array for name, array in toy_arrays(5.0).items() if name in NORM}
    (tmp_path / "site" / "norm.safetensors").write_bytes(payload_of(own))
    site.promote(1)
    site.look()
    assert served(site.out) == 1
    manifest = DeployedFolder(site.out, "toy").deployed()
    assert manifest is not None
    assert manifest.own_norm
    arrays = decode((site.out / "current" / "model.safetensors").read_bytes()).arrays()
    assert arrays["norm.bias"].flat[0] == 5.0


def test_one_process_and_one_job_per_folder(site: Site) -> None:
    site.promote(1)
    with DeployedFolder(site.out, "toy").locked(), pytest.raises(BadSettings, match="another process"):
        site.look()
    site.look()
    with pytest.raises(BadSettings, match="holds job toy"):
        DeployedFolder(site.out, "street").note()


def test_a_folder_that_cannot_be_written_is_waited_for(site: Site) -> None:
    site.promote(1)
    site.look()
    (site.out / "previous").mkdir()  # what only a mistake could have made
    site.promote(2)
    with pytest.raises(Transient, match="cannot be used"):
        site.look()
    assert served(site.out) == 1


# --- kill -9 -------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


STORIES = {
    "first": ([], 1, None, YES, (1, None)),
    "newer": ([1, 2], 3, (2, 1), YES, (3, 2)),
    "back": ([1, 2], 1, (2, 1), YES, (1, 2)),
    "first fails": ([], 1, None, NO, (None, None)),
    "newer fails": ([1, 2], 3, (2, 1), NO, (2, 1)),
    "back fails": ([1, 2], 1, (2, 1), NO, (2, 1)),
}


@pytest.mark.usefixtures("no_waiting_for_the_disk")
@pytest.mark.parametrize("story", STORIES)
def test_killed_before_any_change_it_serves_the_old_or_the_new_and_the_next_process_ends_it(
    site: Site, tmp_path: Path, story: str
) -> None:
    before, number, old, check, expected = STORIES[story]
    for earlier in before:
        site.promote(earlier)
        site.look()
    site.out.mkdir(exist_ok=True)
    shutil.copytree(site.out, tmp_path / "saved", symlinks=True)
    site.promote(number)
    log = tmp_path / "checks"

    def work() -> None:
        site.look(f"sh -c 'echo >> {log}; {check}'")

    def prepare() -> None:
        shutil.rmtree(site.out)
        shutil.copytree(tmp_path / "saved", site.out, symlinks=True)

    allowed = {old[0] if old else None, number}
    times, seen = 0, set()
    for _ in kills(work, prepare):
        times += 1
        now = served(site.out)
        assert now in allowed
        seen.add(now)
        served(site.out, PREVIOUS)
        work()
        assert site.versions() == expected
        assert _note(site).trial is None
        assert bool(_note(site).failures) == (check == NO)
        kept = {path.name for path in (site.out / "versions").iterdir()}
        assert len(kept) == sum(version is not None for version in expected)
        assert not list(site.out.glob("~*"))
    assert times > 15
    assert seen == allowed, "it was killed before the swap and after it"


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_a_version_that_failed_is_not_tried_again_after_a_kill_in_its_rollback(
    site: Site, tmp_path: Path
) -> None:
    site.promote(1)
    site.look()
    shutil.copytree(site.out, tmp_path / "saved", symlinks=True)
    site.promote(2)
    runs = tmp_path / "runs"
    check = f"sh -c 'echo x >> {runs}; false'"

    def prepare() -> None:
        shutil.rmtree(site.out)
        shutil.copytree(tmp_path / "saved", site.out, symlinks=True)
        runs.unlink(missing_ok=True)

    noted = 0
    for _ in kills(lambda: site.look(check), prepare):
        if not _note(site).failures:
            continue
        noted += 1
        site.look(check)
        assert runs.read_text() == "x\n"
    assert noted > 5


# --- the command ---------------------------------------------------------------------------------------


def test_a_command_is_words_without_a_shell(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1:]); sys.exit(1)"
    command = Command.parse(f"{sys.executable} -c '{code}' {{model}} x={{manifest}} '{{dir}} $HOME'", 10)
    with pytest.raises(CheckFailed) as caught:
        command.run(tmp_path / "a b", threading.Event())
    words = [f"{tmp_path}/a b/model.safetensors", f"x={tmp_path}/a b/manifest.json", f"{tmp_path}/a b $HOME"]
    assert str(words) in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("", "needs a command"), ("'open", "No closing quotation")])
def test_what_is_no_command(text: str, words: str) -> None:
    with pytest.raises(BadSettings, match=words):
        Command.parse(text, 1)


def test_a_command_that_is_not_there_or_killed_has_failed(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="cannot be run"):
        Command.parse("/nowhere/smoke-test", 1).run(tmp_path, threading.Event())
    with pytest.raises(CheckFailed, match="signal SIGKILL"):
        Command.parse("sh -c 'kill -9 $$'", 10).run(tmp_path, threading.Event())


def test_a_command_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = Command.parse(f"sh -c 'sleep 600 & echo $! > {child}; echo started; wait'", 0.5)
    with pytest.raises(CheckFailed, match=r"had not ended after 0\.5 s: started"):
        command.run(tmp_path, threading.Event())
    until("the child to end", lambda: not _runs(int(child.read_text())))


def test_told_to_stop_it_leaves_the_one_before_and_no_failure(site: Site) -> None:
    site.promote(1)
    site.look()
    site.promote(2)
    site.stop.set()
    with pytest.raises(CheckStopped):
        site.look("sleep 600")
    assert site.versions() == (1, None)
    assert [entry.what for entry in _note(site).history] == ["deployed", "undone"]
    site.stop.clear()
    assert site.look(YES).state == "deployed"
    assert site.versions() == (2, 1)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _note(site: Site) -> Note:
    note = read_note(site.out)
    assert note is not None
    return note
