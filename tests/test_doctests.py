"""The examples in docstrings are true.

They are read from the source: doctest's own finder overlooks functions that the import hook wraps.
"""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import gspo

SOURCE = Path(gspo.__path__[0])
MODULES = [
    ".".join(("gspo", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    runner = doctest.DocTestRunner()
    parser = doctest.DocTestParser()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            where = getattr(node, "name", name)
            line = getattr(node, "lineno", 0)
            scope = {"torch": torch} | vars(module)
            text = ast.get_docstring(node) or ""
            runner.run(parser.get_doctest(text, scope, where, module.__file__, line))
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 0
    assert runner.tries >= source.count(">>> ")
