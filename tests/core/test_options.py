"""The base of all options: frozen, typed, and an error that names the nearest right name."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from gspo.core.errors import ConfigError
from gspo.core.options import Options


class Soup(Options):
    refused: ClassVar = {"fork": "take a spoon."}
    fixed: ClassVar = {"hot": "cold soup is another dish", "salt": "two numbers"}

    kind: Literal["tomato", "onion"] = "tomato"
    litres: float = 1.0
    hot: Literal[True] = True
    stirs: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    salt: tuple[float, float] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"knd": "onion"},
            r"unknown option 'knd'\. Did you mean 'kind'",
        ),
        ({"kind": "tomat"}, r"kind = 'tomat': .* Did you mean 'tomato'\?"),
        ({"litres": True}, "litres = True: must be a number"),
        ({"stirs": True}, "stirs = True: must be a number"),
        ({"salt": (0.5,)}, r"salt = \(0\.5,\): two numbers"),
        ({"salt": (0.5, "x")}, r"salt = \(0\.5, 'x'\): two numbers"),
        ({"litres": float("nan")}, "litres = nan: .*finite"),
        ({"fork": 1}, "'fork' is not supported: take a spoon"),
        ({"hot": False}, "cold soup is another dish"),
    ],
)
def test_what_is_wrong_is_named(given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Soup(**given)


def test_each_wrong_field_has_a_line():
    with pytest.raises(ConfigError) as error:
        Soup(kind="x", litres="y")  # pyright: ignore[reportArgumentType]
    assert len(str(error.value).splitlines()) == 2


def test_options_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        Soup().litres = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_default_that_is_made_anew_is_a_default():
    class Named(Options):
        size: int = 1
        names: list[str] = Field(default_factory=list)

    assert not Named()._differs("names") and not Named(names=[])._differs("names")
    assert Named(names=["a"])._differs("names") and Named(size=2)._differs("size")
