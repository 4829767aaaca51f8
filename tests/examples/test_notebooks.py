"""The notebooks of examples/notebooks run from their first cell to their last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat: Any = pytest.importorskip("nbformat")
nbclient: Any = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def texts(name: str) -> list[str]:
    """What each cell of code prints; a cell that raises fails the test."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        "".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout")
        for cell in cells
    ]


def test_quick_start():
    *_, trained, shown = texts("quick_start")
    assert [line.split()[0] for line in trained.splitlines()] == ["1", "2"]
    assert "assistant" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tool_agent", "langgraph"])
def test_an_agents_notebook(name: str):
    if name == "langgraph":
        pytest.importorskip("langgraph")
    *_, trained, shown = texts(name)
    assert trained.split()[0] == "1"
    assert "assistant" in shown


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
