"""Tests mirror the source: whoever breaks a file knows where its tests are."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "gspo"

ACROSS: dict[str, str] = {
    "backend/test_concurrent_rollouts.py": "whole runs in exact mode, noisy tools, kills",
    "objective/test_self_contained.py": "the objective imports torch and nothing of gspo",
    "serve/test_load.py": "many clients at once over real sockets",
    "serve/test_malformed.py": "bodies that are wrong by the thousand, and by the document",
    "train/test_precision.py": "l_i in float32 over each hop from the engine to the objective",
    "train/test_shared_prompt_training.py": "weights and metrics are those without sharing",
}
"""Test files that belong to no single source file, and what they are about."""


def has_code(path: Path) -> bool:
    """Whether a module has a function or a class with a body; names and docstrings need no test."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) for node in ast.parse(path.read_text()).body)


MODULES = [path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py")) if has_code(path)]


def test_each_source_file_has_its_tests():
    missing = [
        str(wanted)
        for module in MODULES
        if module.name != "__init__.py"
        for wanted in [module.with_name(f"test_{module.name}")]
        if not (TESTS / wanted).exists()
    ]
    assert not missing, f"no tests at: {', '.join(missing)}"


def test_each_test_file_of_a_room_has_its_source():
    rooms = {module.parts[0] for module in MODULES if len(module.parts) > 1}
    strays = []
    for path in sorted(TESTS.rglob("test_*.py")):
        relative = path.relative_to(TESTS)
        if relative.parts[0] not in rooms or str(relative) in ACROSS:
            continue
        if not (SOURCE / relative.with_name(relative.name.removeprefix("test_"))).exists():
            strays.append(str(relative))
    assert not strays, f"tests of no source file: {', '.join(strays)}"


def test_a_file_name_occurs_once():
    names = Counter(p.name for p in SOURCE.rglob("*.py") if p.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
