"""Base of every set of options: typed, frozen, and strict with a helpful error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gspo.core.errors import ConfigError, suggestion

_NUMBERS = (int, float, int | None, float | None)
LARGEST_COUNT = 10**9
"""No count of steps or tokens is larger: one that is, is a slip of the keyboard."""

TEMPERATURES = (1e-3, 100.0)
"""Lowest and highest temperature that is sampled at and trained on: logits of a few hundred,
divided by less, would leave float32. (0 is greedy decoding, whose log-probs are taken at 1.)"""


class Options(BaseModel):
    """A frozen pydantic model that raises `ConfigError`, naming the nearest right name or value.

    `refused` maps names that another library knows, and that have no meaning here, to the reason
    and the remedy. They are never accepted and ignored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[Mapping[str, str]] = {}
    """Why an option has one value alone; told to whoever gives another."""

    def __init__(self, **data: Any) -> None:
        check_names(type(self), data)
        _refuse_switches(type(self), data)
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def _differs(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return getattr(self, name) != type(self).model_fields[name].default


def check_names(cls: type[Options], data: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for the first name in `data` that `cls` doesn't have."""
    title = _title(cls)
    for name in data:
        if name in cls.model_fields:
            continue
        if name in cls.refused:
            raise ConfigError(f"{title}: {name!r} is not supported: {cls.refused[name]}")
        known = ", ".join(sorted(cls.model_fields))
        raise ConfigError(
            f"{title}: unknown option {name!r}.{suggestion(name, cls.model_fields)} "
            f"Known options: {known}."
        )


def _refuse_switches(cls: type[Options], data: Mapping[str, Any]) -> None:
    """True and False are no numbers, though Python counts with them."""
    for name, value in data.items():
        if isinstance(value, bool) and cls.model_fields[name].annotation in _NUMBERS:
            raise ConfigError(f"{_title(cls)}: {name} = {value}: must be a number.")


def _title(cls: type[Options]) -> str:
    return f"dev.{cls.__name__}" if cls.__module__ == "gspo.dev" else cls.__name__


def _explain(cls: type[Options], error: ValidationError) -> str:
    """One line a field; of a union's several complaints, the one with a suggestion."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        where = str(problem["loc"][0]) if problem["loc"] else ""
        value = problem.get("input")
        message = problem["msg"].removeprefix("Value error, ")
        near = ""
        if problem["type"] == "literal_error" and isinstance(value, str):
            expected = str(problem.get("ctx", {}).get("expected", ""))
            near = suggestion(value, [part.strip("' ") for part in _split_choices(expected)])
        message = cls.fixed.get(where, message)
        line = f"{where} = {value!r}: {message}" if where else message
        if near or where not in lines:
            stop = "" if line.endswith("?") else "."  # a suggestion of the check's own
            lines[where] = f"{_title(cls)}: {line}{stop}{near}"
    return "\n".join(lines.values())


def _split_choices(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").split(",")
