"""The house of DESIGN.md: a floor imports only floors below it, or its own folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gspo"

FLOORS = {
    "__init__": 13,
    "cli": 14,
    "lab": 12,
    "experiment": 11,
    "environments": 10,
    "rewards": 9,
    "sizing": 13,
    "langgraph": 10,
    "capture": 9,
    "model": 8,
    "backend": 7,
    "train": 6,
    "serve": 6,
    "weights": 5,
    "policy": 4,
    "kernels": 3,
    "data": 2,
    "gather": 2,
    "objective": 1,
    "tasks": 1,
    "trajectories": 1,
    "dev": 2,
    "config": 2,
    "absent": 1,
    "local": 8,
    "mcp": 2,
    "metrics": 1,
    "utils": 3,
    "core": 0,
}
PUBLIC = {("experiment", "__init__"), ("lab", "__init__")}
"""The loop reads as a user's program: `import gspo as art`."""


def room(path: Path) -> str:
    """The folder, or the file at the top, that a module belongs to."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path, source: Path = SOURCE) -> set[str]:
    """Rooms that a module imports anywhere: lazily and under TYPE_CHECKING too."""
    rooms = set()
    package = ("gspo", *path.relative_to(source).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [
                f"{module}.{alias.name}" if module == "gspo" else module for alias in node.names
            ]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "gspo":
                first = rest.partition(".")[0] or "__init__"
                rooms.add(first if first in FLOORS else "__init__")
    return rooms


MODULES = sorted(SOURCE.rglob("*.py"))


def test_every_room_has_a_floor():
    assert {room(path) for path in MODULES} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path):
    own = room(path)
    if own == "__init__":
        return
    for other in imported_rooms(path) - {own}:
        below = FLOORS[other] < FLOORS[own]
        assert below or (own, other) in PUBLIC, f"{own} imports {other}, which is above"


def test_objective_imports_nothing_of_gspo():
    for path in (SOURCE / "objective").glob("*.py"):
        assert imported_rooms(path) <= {"objective"}


def test_an_upward_import_would_be_seen(tmp_path: Path):
    module = tmp_path / "train" / "bad.py"
    module.parent.mkdir()
    module.write_text("def f():\n    from gspo.backend.local import LocalBackend\n")
    assert imported_rooms(module, tmp_path) == {"backend"}


def test_files_stay_small():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 310, path
