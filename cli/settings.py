"""`fedqueue settings`: every setting, its environment variable, its meaning and its value here."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr
from rich.table import Column, Table

from cli.options import console, load
from federation.settings import env_name


def settings() -> None:
    """Show every setting: environment variable, meaning with unit, range, value in force. Secrets stay hidden.

    Example: FEDQUEUE_HEARTBEAT_S=2 fedqueue settings
    """
    current = load()
    table = Table(
        Column("environment variable", no_wrap=True), "meaning, unit", "range", "value here", box=None
    )
    for name, field in type(current).model_fields.items():
        value = getattr(current, name)
        shown = "(hidden)" if isinstance(value, SecretStr) and value.get_secret_value() else str(value)
        table.add_row(env_name(name), field.description, _range(field.metadata), shown)
    console.print(table)


def _range(metadata: list[Any]) -> str:
    """The bounds among a field's constraints, as in 0 < x ≤ 1; empty if there are none."""
    bounds = {
        name: getattr(part, name)
        for part in metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(part, name)
    }
    low = f"{bounds['gt']} < " if "gt" in bounds else f"{bounds['ge']} ≤ " if "ge" in bounds else ""
    high = f" < {bounds['lt']}" if "lt" in bounds else f" ≤ {bounds['le']}" if "le" in bounds else ""
    return f"{low}x{high}" if bounds else ""
