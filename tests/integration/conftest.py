"""`server`: a running fedqueue server, once embedded and once over RabbitMQ, Redis and S3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.servers import Server, embedded, real, running


@pytest.fixture(
    scope="module",
    params=[
        "embedded",
        pytest.param("real", marks=[pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.s3]),
    ],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    if request.param == "embedded":
        made = embedded(folder)
    else:
        made = real(
            folder,
            request.getfixturevalue("rabbitmq_server"),
            request.getfixturevalue("redis_server"),
            request.getfixturevalue("s3_server"),
        )
    with running(made) as started:
        yield started
