"""What a user names as module:name is found in a file, in the working directory, or installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo.core.byname import beside, load_object, optional
from gspo.core.errors import ConfigError, MissingDependencyError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a module; what is imported is forgotten again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_here.py").write_text("Thing = 3\nimport neighbour_here\n")
    (tmp_path / "neighbour_here.py").write_text("")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_of_the_working_directory(folder: Path):
    assert load_object("mine_here:Thing", "task") == 3


def test_a_file_by_its_path_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    name = f"{folder / 'mine_here.py'}:Thing"
    assert load_object(name, "task") == 3
    assert load_object(name, "task") == 3


def test_a_file_beside_the_toml_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    assert beside("mine_here:Thing", folder) == f"{folder / 'mine_here.py'}:Thing"
    assert beside("nothing_here:Thing", folder) == "nothing_here:Thing"
    assert beside("sort", folder) == "sort"


def test_a_library_of_the_same_name_keeps_it(folder: Path):
    import json

    (folder / "json.py").write_text("Thing = 4\n")
    assert load_object("json:Thing", "task") == 4
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_here", "write 'module:name'"),
        ("mine_here:", "write 'module:name'"),
        ("mine_here:Thin", "Did you mean 'Thing'"),
        (
            "nothing_here:Thing",
            "cannot import nothing_here: there is no nothing_here.py beside the TOML file",
        ),
        ("nowhere/file.py:Thing", "there is no file"),
    ],
)
def test_mistakes_are_named(folder: Path, name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_object(name, "task")


def test_a_package_that_is_not_installed_is_named_with_its_extra():
    assert optional("json.decoder", "json", "none", "a test").__name__ == "json.decoder"
    told = r"^a test \(No module named 'no_such'\) needs the package 'no-such'.*\[x\]"
    with pytest.raises(MissingDependencyError, match=told):
        optional("no_such.module", "no-such", "x", "a test")
