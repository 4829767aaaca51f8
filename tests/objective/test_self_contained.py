"""The objective can be lifted out: it imports torch, jaxtyping and itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import gspo.objective

FILES = sorted(Path(next(iter(gspo.objective.__path__))).glob("*.py"))
ALLOWED = {"torch", "jaxtyping"} | sys.stdlib_module_names


def imported(path: Path) -> list[str]:
    """The top-level names that a file imports, lazily or for types only too."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path.name} imports from above its folder"
            out += [(node.module or "").split(".")[0]] if node.level == 0 else []
    return out


def test_there_are_files() -> None:
    assert len(FILES) > 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_nothing_of_gspo(path: Path) -> None:
    assert set(imported(path)) <= ALLOWED


def test_every_public_name_exists_and_is_sorted() -> None:
    names = gspo.objective.__all__
    assert all(hasattr(gspo.objective, name) for name in names)
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert len(set(names)) == len(names)
