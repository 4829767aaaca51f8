"""One tree of errors, and the words that they are made of."""

from __future__ import annotations

import pytest

from gspo import errors
from gspo.core.errors import GspoError, check_names, shown, suggestion


def test_the_tree_in_the_docstring_is_the_tree():
    kinds = {
        kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, GspoError)
    }
    assert kinds == {name for name in (errors.__doc__ or "").split() if name.endswith("Error")}


@pytest.mark.parametrize(("name", "near"), [("sequnce", " Did you mean 'sequence'?"), ("xyz", "")])
def test_only_a_near_name_is_suggested(name: str, near: str):
    assert suggestion(name, ["token", "sequence"]) == near


def test_a_value_is_shown_short_whatever_it_is():
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    assert len(shown("x" * 10_000)) < 100
    assert len(shown(list(range(10_000)))) < 100
    assert shown(Rude())
    assert shown(10**5000)


def test_an_argument_of_art_is_told_its_remedy():
    with pytest.raises(errors.ConfigError, match=r"'beta'.*use kl"):
        check_names("train", ["config", "beta"], ["config"], {"beta": "use kl."})
    check_names("train", ["config"], ["config"], {})
