"""Errors name the thing, its value and the remedy."""

from __future__ import annotations

import pytest

from gspo.core.errors import ConfigError, check_arguments, check_whole, shown, suggestion


def test_a_suggestion_is_near_or_nothing():
    assert suggestion("sequnce", ["token", "sequence"]) == " Did you mean 'sequence'?"
    assert suggestion("xyz", ["token", "sequence"]) == ""
    assert suggestion("tokne", ["token"], cutoff=0.99) == ""


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [None, "x" * 10_000, [[]] * 1000, 10**5000, Rude()], ids=range(5))
def test_every_value_can_be_shown_in_short(value: object):
    assert type(value).__name__ in shown(value) and len(shown(value)) < 200


def test_whole_numbers_and_their_range():
    check_whole("port", 0, 0, 65535)
    for value, message in ((True, "True"), (1.5, r"1\.5"), (-1, "from 0 to 65535"), ("1", "'1'")):
        with pytest.raises(ConfigError, match=rf"port = .*{message}"):
            check_whole("port", value, 0, 65535)


def test_unknown_arguments_are_named_with_the_nearest_or_the_reason():
    check_arguments("f", [], ["a"], {})
    with pytest.raises(ConfigError, match=r"f: unknown argument 'seeed'. Did you mean 'seed'"):
        check_arguments("f", ["seeed"], ["seed"], {})
    with pytest.raises(ConfigError, match=r"f: 'old' is not supported: use new\."):
        check_arguments("f", ["old"], ["new"], {"old": "use new."})
