"""`fedqueue settings`: every setting, its environment variable, its meaning and its value here."""

from __future__ import annotations

from pydantic import SecretStr
from rich.table import Table

from cli.options import console, load
from federation.settings import env_name


def settings() -> None:
    """Show every setting: environment variable, meaning with unit, value in force. Secrets stay hidden.

    Example: FEDQUEUE_HEARTBEAT_S=2 fedqueue settings
    """
    current = load()
    table = Table("environment variable", "meaning, unit", "value here", box=None)
    for name, field in type(current).model_fields.items():
        value = getattr(current, name)
        shown = "(hidden)" if isinstance(value, SecretStr) and value.get_secret_value() else str(value)
        table.add_row(env_name(name), field.description, shown)
    console.print(table)
