"""Run the study, or go on with it: every spec file beside this one, then its data.

    python docs/study/run.py              # all of it
    python docs/study/run.py a d          # two parts
    python docs/study/run.py --dry-run    # what is left; once a cell is done, how long it takes

Cells that parts have in common run once. What the figures need of each part goes to
docs/study/data/<part>.json; the runs themselves stay in .gspo/study. Then: docs/study/figures.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from gspo.lab.compare import read_compare_spec
from gspo.lab.compare_cells import make_cells
from gspo.lab.compare_runs import default_workers, run_comparison
from gspo.lab.compare_tables import result_text, summary_line

HERE = Path(__file__).parent


def main() -> None:
    """Run the parts; the exit code is 1 where a cell failed."""
    parser = argparse.ArgumentParser(description="Run the study, or go on with it.")
    parser.add_argument("parts", nargs="*", help="first letters of the spec files; default: all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--path", help="instead of the spec files'")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    failed = 0
    overrides = [f"path={json.dumps(arguments.path)}"] if arguments.path else []
    for path in sorted(HERE.glob("*.toml")):
        if arguments.parts and path.stem[0] not in arguments.parts:
            continue
        spec = read_compare_spec(path, overrides)
        cells = make_cells(spec)
        workers = arguments.workers or default_workers(cells)
        print(f"{path.stem}: {summary_line(cells, workers)}", flush=True)
        if arguments.dry_run:
            continue
        content = run_comparison(spec, cells, workers)
        print(result_text(content), end="")
        failed += sum(cell.status == "failed" for cell in cells)
        arguments.data.mkdir(exist_ok=True)
        data = json.dumps(essence(content), separators=(",", ":"))
        (arguments.data / f"{path.stem}.json").write_text(data + "\n")
    raise SystemExit(1 if failed else 0)


def essence(content: dict[str, Any]) -> dict[str, Any]:
    """A comparison without its step-by-step curves: means, and the held-out reward."""
    kept = {
        key: content[key] for key in ("name", "spec", "versions", "machine", "paired", "summary")
    }
    return kept | {"cells": [_cell(row) for row in content["cells"]]}


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    curves = row["curves"]
    out = {key: value for key, value in row.items() if key != "curves"}
    if row["status"] != "done":
        return out
    held_out = curves["val/reward"]
    spent = list(itertools.accumulate(curves["tokens/completion"]["value"], initial=0.0))
    out["val/reward"] = held_out | {"tokens": [int(spent[step]) for step in held_out["step"]]}
    out["means"] = {name: round(statistics.fmean(c["value"]), 8) for name, c in curves.items()}
    out["ends"] = {name: curve["value"][-1] for name, curve in curves.items()}
    return out


if __name__ == "__main__":
    main()
