"""Base of every set of options: typed, frozen, and strict with a helpful error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from gspo.core.errors import ConfigError, check_names, suggestion

LARGEST_COUNT = 10**9
"""The largest count of steps or tokens; a larger one is a typing error."""

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
    """By option: the error for a wrong value, if pydantic's message does not say what is right."""

    def __init__(self, **data: Any) -> None:
        names = sorted(type(self).model_fields)
        check_names(title_of(type(self)), data, names, self.refused, "option")
        for name in (name for name, value in data.items() if isinstance(value, bool)):
            types = _types(type(self).model_fields[name].annotation)
            if bool not in types and (int in types or float in types):  # Python counts with them
                title = title_of(type(self))
                raise ConfigError(f"{title}: {name} = {data[name]}: must be a number.")
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error, data)) from None

    def _differs(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        field = type(self).model_fields[name]
        return getattr(self, name) != field.get_default(call_default_factory=True)


def _types(annotation: Any) -> list[Any]:
    """An annotation and all that it is made of, such as the float of `float | None`."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _types(part))]


def title_of(cls: type[Options]) -> str:
    """What errors call the options: `class Spec(Options, title="the run")`, else the class."""
    return cls.model_config.get("title") or "dev." * (cls.__module__ == "gspo.dev") + cls.__name__


def _explain(cls: type[Options], error: ValidationError, data: Mapping[str, Any]) -> str:
    """One line per field; if a union has several complaints, the one with a suggestion."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        option = str(problem["loc"][0]) if problem["loc"] else ""
        value = problem.get("input")
        message = problem["msg"].removeprefix("Value error, ")
        misspelt = problem["type"] == "literal_error" and isinstance(value, str)
        near = suggestion(value, re.findall(r"'([^']+)'", message)) if misspelt else ""
        if option in cls.fixed:  # it speaks of the whole value, pydantic of a part of it
            message, value = cls.fixed[option], data.get(option)
        line = f"{option} = {value!r}: {message}" if option else message
        if problem["type"] == "missing" and len(problem["loc"]) == 1:
            line = f"give {option}=..."
        if near or option not in lines:
            # A check that has made a suggestion itself ends in a question mark.
            lines[option] = f"{title_of(cls)}: {line}{'' if line.endswith('?') else '.'}{near}"
    return "\n".join(lines.values())
