"""Fixtures for all tests: the real servers, each started once per session, on demand."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest

from federation.settings import ENV_PREFIX

pytest_plugins: list[str] = ["tests.servers.rgw", "tests.servers.redis", "tests.servers.rabbitmq"]

# A busy machine is no failure: properties are judged by what they find, never by how long it takes.
hypothesis.settings.register_profile(
    "fedqueue", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fedqueue")


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    """A command that ran in this process has told its settings to child processes: the next test has others."""
    before = {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)}
    yield
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that ran in this process has set up logging for itself: the next test must not see it."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)
