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
    """All findings of a ValidationError in one line: `field.sub: message; …`, inputs left out."""
    return "; ".join(
        f"{'.'.join(str(part) for part in e['loc']) or 'value'}: {e['msg']}"
        for e in exc.errors(include_url=False, include_context=False, include_input=False)
    )
