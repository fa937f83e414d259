"""A server with held-out images measures the versions of a detector itself, and ends the job by what it finds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from cli.main import app
from detection import scenes
from federation.settings import env_name
from federation.types import SERVER, Closed
from storage.audit import audit
from storage.jobs import list_evaluations, load_evaluation
from storage.log import VersionLog
from tasks.replay import replay
from tests.factories import client_update
from tests.integration.servers import Server, embedded, running, until

# whatever the figures are, none is better by 1 than the one before
JOB = """
id = "measured"
classes = ["car", "person", "bicycle", "cart"]
[plan]
image_size = 64
[evaluation]
every = 1
[stop]
patience = 2
min_improvement = 1.0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    drawn = scenes.render(folder / "scenes", images_per_site=1, test_images=2, size=(96, 80))
    started = embedded(folder)
    started.environment |= {
        env_name("eval_annotations"): str(drawn.test),
        env_name("eval_images"): str(drawn.images),
        env_name("threads"): "1",
    }
    started.commands["evaluator"] = ["cli.main", "worker", "--queue", "evaluate"]
    with running(started):
        yield started


def contribute(server: Server, version: int) -> None:
    """An update that makes version `version`, whose weights are those of the one before."""
    head = server.head("measured")
    assert head is not None
    payload = server.store.get(head.current.model.key, max_bytes=head.current.model.nbytes)
    server.send(client_update(payload, job="measured", site="site-a", base_version=version - 1), payload)


def until_measured(server: Server, version: int) -> None:
    def is_measured() -> bool:
        return load_evaluation(server.store, "measured", version, SERVER) is not None

    until(f"what the server measures of version {version}", is_measured)


def test_a_job_closes_by_what_the_server_measured(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    description = tmp_path_factory.mktemp("job") / "job.toml"
    description.write_text(JOB)
    asked = CliRunner().invoke(app, ["job", "submit", str(description)], env=server.environment)
    assert asked.exit_code == 0, asked.output
    until_measured(server, 0)
    for version in (1, 2):
        contribute(server, version)
        until_measured(server, version)

    def closed() -> str | None:
        head = server.head("measured")
        return None if head is None else head.closed

    until("the end of the job", closed)
    records = list(VersionLog(server.store, "measured").history())
    assert [r.head.version for r in records if isinstance(r.event, Closed)] == [2]
    assert "2 measured versions in a row, 1 to 2, did not beat mAP@0.5" in (closed() or "")
    found = list_evaluations(server.store, "measured")
    assert [(e.version, e.who, e.num_images) for e in found] == [(v, SERVER, 2) for v in (0, 1, 2)]
    assert all(step.equal for step in replay(server.store, "measured"))
    assert [found for found in audit(server.store, "measured") if found.level == "error"] == []
