"""The base of every noun: a frozen value that is checked when it is made, and knows its JSON."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from federation.errors import Rejected


class Value(BaseModel):
    """An immutable, validated value. Unknown fields are an error: a misspelt field must not be silence."""

    # strict: "5" is not 5, and 5.0 is not 5. Infinity and NaN have no JSON and no meaning here.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def to_json(self) -> bytes:
        """UTF-8 JSON without spaces."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, raw: bytes | str, error: type[Rejected] = Rejected) -> Self:
        """Parse and check; raises `error` naming every wrong field."""
        try:
            return cls.model_validate_json(raw)
        except ValidationError as exc:
            raise error(f"{cls.__name__}: {describe(exc)}") from exc


def describe(exc: ValidationError) -> str:
    """All findings of a ValidationError in one line, inputs left out."""
    return "; ".join(findings(exc))


def findings(exc: ValidationError) -> list[str]:
    """Each finding of a ValidationError, `field.sub: message`, inputs left out.

    A validator of ours that looks at a whole value may find several things: a line each, with the field's name.
    """
    found = []
    for e in exc.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in e["loc"])
        if e["type"] == "value_error":
            found += [f"{where}: {line}" if where else line for line in str(e["ctx"]["error"]).splitlines()]
        elif e["type"] == "extra_forbidden":
            found.append(f"{where}: there is no such field")
        else:
            found.append(f"{where or 'value'}: {e['msg']}")
    return found
