"""Fixtures for all tests: the real servers, each started once per session, on demand."""

from __future__ import annotations

pytest_plugins: list[str] = ["tests.servers.rgw", "tests.servers.redis"]
