"""What happens, act by act. Every line with a prompt is a command that is run; each is held to what the story says."""

from __future__ import annotations

from examples.three_companies.companies import Cast
from examples.three_companies.stage import Stage
from federation.types import Head, LogRecord, Published
from storage.channels import best_version
from storage.control import list_members
from storage.log import VersionLog
from storage.open import open_store
from storage.releases import is_released

STREET, NIGHT = "street", "night"

FIRST_TRY = """\
id = "street"
classes = []
[plan]
image_size = 128
lerning_rate = 0.005
[stop]
max_versions = 0
"""

STREET_JOB = """\
id = "street"
classes = ["car", "person", "bicycle", "cart"]
[plan]
image_size = 128
batch_size = 8
local_steps = 6
learning_rate = 0.005
warmup_steps = 3
schedule = "constant"
augmentation = "none"
[aggregation]
alpha = 0.8
[evaluation]
every = 4
[stop]
max_versions = 400
target = 0.6
[participation]
min_interval_s = 3.0  # on a fast computer the job would end before the story does
[release]
approvals = "all"
"""

NIGHT_JOB = """\
id = "night"
classes = ["car", "person"]
[plan]
image_size = 96
batch_size = 8
local_steps = 4
[participation]
mode = "invited"
concurrency = 1
max_load = 100.0  # all companies share this computer, so each looks busy to the others
min_sites = 2
lease_s = 60
[stop]
max_versions = 4
"""


class Story:
    """Acts in their order. `real`: over servers that run already, so ingress and workers are processes of their own."""

    def __init__(self, stage: Stage, cast: Cast, *, real: bool) -> None:
        self.stage, self.cast, self.real = stage, cast, real
        self.store = open_store(cast.settings)

    def play(self) -> None:
        """Raises Unexpected where it goes another way than it is told, Fatal if a process of it ends."""
        self.server_starts()
        self.b_submits()
        self.companies_join()
        self.who_is_there()
        self.night_is_invited()
        self.c_is_offline()
        self.versions_are_a_registry()
        self.it_converges()
        self.c_deploys()
        self.a_release()
        self.what_it_cost()

    # --- the acts ------------------------------------------------------------------------------------------

    def server_starts(self) -> None:
        stage, operator = self.stage, self.cast.operator
        stage.act(0, "The server")
        if self.real:
            stage.tell("RabbitMQ, Redis and S3 run already. The operator starts ingress and workers.")
            stage.start(operator, "ingress", "ingress")
            stage.start(operator, "worker --queue merge", "worker")
            stage.start(operator, "worker --queue evaluate", "evaluator")
        else:
            stage.tell("One process: queue, object store and liveness are files in this folder.")
            stage.start(operator, "worker", "server")

    def b_submits(self) -> None:
        stage, b = self.stage, self.cast.b
        stage.act(1, "B submits a job")
        (b.folder / "street.toml").write_text(FIRST_TRY)
        stage.tell("B's first try has mistakes, and the answer names all of them.")
        said = stage.run(b, "job submit street.toml", status=1)
        for mistake in ("classes", "lerning_rate", "max_versions"):
            if mistake not in said:
                stage.fail(f"the answer does not name {mistake}")
        (b.folder / "street.toml").write_text(STREET_JOB)
        stage.run(b, "job submit street.toml", says="job street is there, at version 0")

    def companies_join(self) -> None:
        stage, cast = self.stage, self.cast
        stage.act(2, "Sites join by their own policy, or decline with a reason")
        stage.tell('C\'s settings say site_submitters = ["company-b"]: it works for nobody else.')
        for company in (cast.a, cast.b, cast.c):
            stage.start(company, "site run")
        (cast.a.folder / "night.toml").write_text(NIGHT_JOB)
        stage.run(cast.a, "job submit night.toml", says="job night is there")
        stage.tell("The agents read what is announced, and answer.")
        stage.until("everybody's answer to street", lambda: len(list_members(self.store, STREET)) == 3)
        stage.until("everybody's answer to night", lambda: len(list_members(self.store, NIGHT)) == 3)
        stage.run(cast.b, "job show street", says="company-c joined", last=4)
        stage.run(
            cast.a, "job show night", says="policy: this site takes part in no job of company-a", last=4
        )

    def who_is_there(self) -> None:
        stage, operator = self.stage, self.cast.operator
        stage.act(3, "The operator sees its sites")
        stage.until("a merged update", lambda: self.head(STREET).version > 0)
        stage.run(operator, "site list", says="company-c")
        stage.run(operator, "site show company-c", says="declined")

    def night_is_invited(self) -> None:
        stage, a, operator = self.stage, self.cast.a, self.cast.operator
        stage.act(4, "A's job invites one site at a time")
        stage.until("the end of night", lambda: self.head(NIGHT).closed)
        stage.run(operator, "job invitations night", says="company-b")
        stage.run(a, "job history night", says="v4 published", last=6)

    def c_is_offline(self) -> None:
        stage, c = self.stage, self.cast.c
        stage.act(5, "C goes offline, and catches up from the store")
        stage.processes.end(c.name)
        before = self.head(STREET).version
        stage.tell(f"C's agent is stopped at version {before}. The others go on.")
        stage.until("three more versions", lambda: self.head(STREET).version >= before + 3)
        newest = self.head(STREET).version
        stage.start(c, "site run")
        stage.until("C's next update", lambda: self.bases_of(c.name, since=newest))
        base = self.bases_of(c.name, since=newest)[0]
        stage.tell(f"C has read what it missed and trained from version {base}; it asked nobody.")
        stage.run(self.cast.operator, "site show company-c", says="joined", last=8)

    def versions_are_a_registry(self) -> None:
        stage, b = self.stage, self.cast.b
        stage.act(7, "B promotes a version, and rolls back to it")
        stage.until("a measured version", lambda: self.measured() > 0)
        stage.run(b, "model promote street best", says="is stable now")
        stable = self.stable()
        stage.until("a newer version", lambda: self.head(STREET).version > stable)
        stage.run(b, "model rollback street stable --reason 'C has seen it fail at dusk'", says="again")
        stage.run(b, "model list street", says="rolled back", last=8)

    def it_converges(self) -> None:
        stage, b = self.stage, self.cast.b
        stage.act(6, "The job ends by itself")
        stage.tell("Its stop rule: mAP@0.5 on the operator's test images reaches 0.6.")
        stage.until("the target", lambda: self.head(STREET).closed)
        stage.run(b, "job status street", says="the target is 0.6")

    def c_deploys(self) -> None:
        stage, cast = self.stage, self.cast
        c = cast.c
        stage.act(8, "C's inference process follows what is stable")
        deploy = "site deploy --job street --channel stable --out deployed --once"
        old = self.stable()
        stage.run(c, deploy, says=f"version {old} (stable) is deployed")
        new = self.head(STREET).version
        stage.run(cast.b, "model promote street latest", says=f"version {new} of street is stable now")
        stage.tell(
            "C's own check says no, so the version before is back, and this one is not tried again by itself."
        )
        stage.run(
            c,
            f"{deploy} --check 'sh -c \"echo all pictures are black; exit 1\"'",
            status=1,
            says="rolled back",
        )
        stage.run(c, deploy, status=1, says="waits for --retry")
        stage.run(
            c, f"{deploy} --retry --check 'test -s {{model}}'", says=f"version {new} (stable) is deployed"
        )
        stage.run(c, "site deployed --out deployed", says=f"previous {old}")

    def a_release(self) -> None:
        stage, cast = self.stage, self.cast
        a, b, c = cast.a, cast.b, cast.c
        stage.act(9, "B wants to give the model away; A refuses, and later approves")
        version = self.head(STREET).version
        stage.run(b, f"release propose street {version} --purpose 'pilot at the city of Graz, until June'")
        stage.run(a, "release list", says=STREET)
        stage.run(a, f"release refuse street {version} --reason 'our contract covers pilots of a month only'")
        stage.run(b, f"release approve street {version} --name-us")
        stage.run(c, f"release approve street {version} --anonymous")
        stage.run(b, f"release show street {version}", says="our contract covers pilots of a month only")
        stage.run(b, f"release fetch street {version} --out bundle", status=1)
        stage.tell("The companies have talked: A approves.")
        stage.run(a, f"release approve street {version} --name-us --reason 'contract amended'")
        stage.until("the bundle", lambda: is_released(self.store, STREET, version))
        stage.run(b, f"release fetch street {version} --out bundle")
        stage.run(b, "release verify bundle")

    def what_it_cost(self) -> None:
        stage, cast = self.stage, self.cast
        stage.act(10, "What travelled, and what stayed at home")
        stage.run(cast.b, "job status street", says="company-c")
        stage.run(cast.operator, "job metrics street", says="company-c", last=5)

    # --- what is waited for --------------------------------------------------------------------------------

    def records(self, job: str) -> list[LogRecord]:
        return list(VersionLog(self.store, job).history())

    def head(self, job: str) -> Head:
        return VersionLog(self.store, job).head().head

    def measured(self) -> int:
        """The best version so far; 0: no trained one was measured."""
        best = best_version(self.store, STREET)
        return 0 if best is None else best.version

    def stable(self) -> int:
        stable = self.head(STREET).stable
        if stable is None:
            self.stage.fail("no version is stable")
        return stable.version

    def bases_of(self, site: str, since: int) -> list[int]:
        """Base versions, at least `since`, of what was merged of this site."""
        events = [record.event for record in self.records(STREET)]
        merged = [c.update for event in events if isinstance(event, Published) for c in event.merged]
        return [
            update.base_version for update in merged if update.site == site and update.base_version >= since
        ]
