"""What ART has and gspo has not says why."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import gspo as art
from gspo import absent


@pytest.mark.parametrize("name", absent.MODULES)
def test_modules(name: str):
    with pytest.raises(ModuleNotFoundError, match=rf"gspo has no module '{name}': \w+"):
        importlib.import_module(f"gspo.{name}")


def test_a_module_that_is_there_is_found_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(absent.MODULES, "core.draws", "it is there.")
    monkeypatch.delitem(sys.modules, "gspo.core.draws")
    importlib.import_module("gspo.core.draws")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'gspo\.nothing'$"):
        importlib.import_module("gspo.nothing")


def test_attributes(tmp_path: Path):
    model = art.Model(name="m", project="p")
    owners = (art, absent.NAMES), (art.dev, absent.DEV), (model, absent.MODEL)
    for owner, names in (*owners, (art.LocalBackend(tmp_path), absent.BACKEND)):
        for name, reason in names.items():
            with pytest.raises(AttributeError) as caught:
                getattr(owner, name)
            assert reason in str(caught.value)
            assert not hasattr(owner, name)
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            getattr(owner, "nothing_of_this_name")  # noqa: B009
