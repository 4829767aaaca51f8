"""`gspo presets`: the named methods."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from gspo.objective import PRESETS, Preset


def preset_rows() -> list[dict[str, Any]]:
    """Name, formula, defaults and source of each preset."""
    return [
        {
            "name": preset.name,
            "formula": preset.formula,
            "defaults": _defaults(preset),
            "source": preset.source,
        }
        for preset in PRESETS.values()
    ]


def _defaults(preset: Preset) -> dict[str, Any]:
    objective = preset.objective
    out: dict[str, Any] = {"ratio": objective.level, "advantage": preset.advantage}
    if objective.has_range:
        out |= {"epsilon": objective.epsilon_low, "epsilon_high": objective.epsilon_high}
    return out | dict(objective.constants) | {"minibatches": preset.minibatches}


def print_presets(console: Console | None = None) -> None:
    """One paragraph a preset."""
    console = console or Console(highlight=False)
    for row in preset_rows():
        defaults = ", ".join(f"{name}={value}" for name, value in row["defaults"].items())
        console.print(f"[bold]{row['name']}[/bold]")
        for text in (row["formula"], defaults, row["source"]):
            console.print(f"  {text}", markup=False, soft_wrap=True)
