"""DESIGN.md's budget: new capability is paid for by what is simplified."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("size", ROOT / "tools" / "size.py")
assert spec is not None and spec.loader is not None
size = importlib.util.module_from_spec(spec)
sys.modules["size"] = size
spec.loader.exec_module(size)


def test_the_source_stays_within_its_budget():
    files = size.sizes()
    assert sum(files.values()) <= size.LIMIT
    assert size.by_room(files)["lab"] <= size.LAB_LIMIT


def test_only_code_counts():
    text = '"""A."""\n\nimport os  # why\n\n\ndef f(x):\n    """B."""\n    return (\n        x)\n'
    assert size.code_lines(text) == 4  # import, def, and two of the return
    assert size.code_lines('LIMIT = 1\n"""The sentence below a constant."""\n') == 1
    assert size.code_lines("x = '''two\nlines'''\n") == 2


def test_rooms_add_up():
    files = {"cli.py": 2, "lab/a.py": 3, "lab/report/b.py": 4}
    assert size.by_room(files) == {"lab": 7, "top level": 2}
