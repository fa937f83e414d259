"""Fixtures for all tests: the real servers, each started once per session, on demand."""

from __future__ import annotations

import hypothesis

pytest_plugins: list[str] = ["tests.servers.rgw", "tests.servers.redis", "tests.servers.rabbitmq"]

# A busy machine is no failure: properties are judged by what they find, never by how long it takes.
hypothesis.settings.register_profile(
    "fedqueue", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fedqueue")
