"""docs/architecture.md is the map of the source; here it is compared with the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from test_floors import FLOORS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gspo"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)(?::(\w+))?`", PAGE)))


def defined(module: Path) -> set[str]:
    """Classes and functions at the top of a module."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(module.read_text()).body if isinstance(node, kinds)}


@pytest.mark.parametrize(("file", "name"), PLACES, ids=[":".join(place) for place in PLACES])
def test_each_place_is_there(file: str, name: str):
    if (ROOT / file).is_file() and not name:
        return
    assert (SOURCE / file).is_file(), file
    assert not name or name in defined(SOURCE / file)


def test_the_floors_are_those_that_are_held():
    rows = re.findall(r"(?m)^\| (\d+) \| ((?:`\w+`(?:, )?)+) \|", PAGE.split("## The hops")[0])
    told = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    named = {room: floor for room, floor in FLOORS.items() if room in told}
    assert told == named
    assert set(FLOORS) == set(told)


def test_each_hop_is_a_type_with_its_shapes_in_the_docstring():
    hops = re.findall(r"(?m)^\| \d+ \| `([\w/]+\.py):(\w+)`", PAGE.split("## The hops")[1])
    assert len(hops) == 12
    for file, name in hops:
        (node,) = (
            node
            for node in ast.parse((SOURCE / file).read_text()).body
            if isinstance(node, ast.ClassDef) and node.name == name
        )
        if file == "trajectories.py":  # a rollout fills it in: the one that is not frozen
            continue
        assert "Attributes:" in (ast.get_docstring(node) or ""), (file, name)
        assert any("frozen=True" in ast.unparse(d) for d in node.decorator_list), (file, name)
