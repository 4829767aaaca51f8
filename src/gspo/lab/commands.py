"""The verbs that look at runs and compare them, and what `gspo train` shows of the lab.

Nothing is imported before it is needed: the libraries of the extra `lab` may not be installed.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gspo.core.errors import ConfigError
from gspo.experiment.run_commands import JsonOption, PathOption, RunArgument, say_loading, show_json

if TYPE_CHECKING:
    from gspo.core.timing import Clock

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value; dotted keys reach tables.")
]
PictureOption = Annotated[
    Path | None, typer.Option(help="Write a picture here: .html; .png needs kaleido, Chrome.")
]


def audit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="embedded:<task>, a folder or a hub id.")],
    rollout_dtype: Annotated[str, typer.Option(help="The engine's, such as int4.")] = "float32",
    task: Annotated[
        str | None, typer.Option(help="Or a run's TOML. Default: the embedded model's own.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of the task.")] = 64,
    completions: Annotated[int, typer.Option(min=1, help="Per prompt.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the task's.")] = None,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 1.0,
    epsilon_low: Annotated[float | None, typer.Option(help="Default: GSPO's 3e-4.")] = None,
    epsilon_high: Annotated[float | None, typer.Option(help="Default: GSPO's 4e-4.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Tell which parts can be equal to the bit instead.")
    ] = False,
    picture: PictureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell whether the clip range is wider than the noise between engine and trainer."""
    if exact:
        _audit_exact(context, model, as_json)
        return
    say_loading(model)
    from gspo.lab.audit import run_audit
    from gspo.lab.audit_report import render
    from gspo.lab.pictures import draw_audit, require_plotly

    if picture is not None:
        require_plotly()
    options = {k: v for k, v in context.params.items() if k not in ("exact", "picture", "as_json")}
    report, log_ratios = run_audit(**options)
    print(render(report), end="")
    if picture is not None:
        print(f"picture            {draw_audit(report, log_ratios, picture)}")
    show_json(as_json, report)


def _audit_exact(context: typer.Context, model: str, as_json: bool) -> None:
    """`gspo audit --exact`, where --rollout-dtype is that of engine and trainer alike."""
    for name in context.params.keys() - {"model", "exact", "rollout_dtype", "as_json"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} says nothing with --exact: leave it out")
    say_loading(model)
    from gspo.lab.audit import audit_exact, render_exact

    report = audit_exact(model, context.params["rollout_dtype"])
    print(render_exact(report))
    show_json(as_json, report)


def inspect(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(min=1, help="Default: the last one.")] = None,
    path: PathOption = ".gspo",
    weights: Annotated[str, typer.Option(help="before or after the step, or both.")] = "both",
    presets: Annotated[str | None, typer.Option(help="Some of them, as a,b,c.")] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Print the cosines of all.")] = False,
    picture: PictureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every method's loss, gradient and clipping on a batch that a run has stored."""
    say_loading(run)
    from gspo.experiment.saved_run import find_run
    from gspo.lab.inspect_batch import inspect_run, render
    from gspo.lab.pictures import draw_inspection, require_plotly

    if picture is not None:
        require_plotly()
    names = presets and [name.strip() for name in presets.split(",")]
    inspection = inspect_run(find_run(run, path).folder, step, weights, names or None)
    print(render(inspection, matrix=matrix), end="")
    if picture is not None:
        print(f"picture: {draw_inspection(inspection, picture)}")
    show_json(as_json, inspection)


def compare(
    spec: Annotated[Path | None, typer.Argument(help="The comparison, as TOML.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small one, built in.")] = False,
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List cells and cost.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="At once. Default: the cores.")] = None,
    path: Annotated[str | None, typer.Option(help="Its folder. Default: the spec's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods under stressors, over seeds. The same command goes on where it stopped."""
    if quick == (spec is not None):
        raise ConfigError("give a spec file, or --quick: gspo compare SPEC.toml")
    say_loading("the comparison")
    from gspo.experiment.heldout import require_scipy
    from gspo.experiment.plan import check_dataset
    from gspo.lab.compare import read_compare_spec
    from gspo.lab.compare_cells import make_cells
    from gspo.lab.compare_runs import default_workers, run_comparison
    from gspo.lab.compare_tables import QUICK_ADVICE, print_cells, result_text, summary_line

    require_scipy()
    placed = [*(overrides or []), *([f"path={json.dumps(path)}"] if path else [])]
    resolved = read_compare_spec(spec, placed)
    cells = make_cells(resolved)
    workers = workers or default_workers(cells)
    if dry_run:
        tried = {id(cell.task): (cell.spec, cell.task) for cell in cells if cell.spec}
        for run, task in tried.values():  # each reward, as `gspo train --dry-run` does
            asyncio.run(check_dataset(run, task))
        print_cells(cells, workers)
        return
    print(summary_line(cells, workers))
    try:
        content = run_comparison(resolved, cells, workers, quick=quick)
    except KeyboardInterrupt:
        done = f"{sum(cell.status == 'done' for cell in cells)} of {len(cells)} cells are done"
        print(f"stopped: {done}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    print(f"{result_text(content)}data: {resolved.folder / 'comparison.json'}")
    page = draw(resolved.folder)
    if quick:
        print(QUICK_ADVICE)
    count = Counter(cell.status for cell in cells)
    statuses = {status: count[status] for status in ("done", "failed", "refused")}
    told = {"folder": str(resolved.folder), **page, **statuses, "paired": content["paired"]}
    show_json(as_json, told)
    if count["failed"]:
        raise SystemExit(1)


def report(
    runs: Annotated[list[str], typer.Argument(help="Runs, or the folder of one comparison.")],
    out: Annotated[Path | None, typer.Option(help="Default: <RUN>/report.html.")] = None,
    path: PathOption = ".gspo",
) -> None:
    """Write a run, or several side by side, as one HTML file that needs no network."""
    from gspo.experiment.saved_run import find_run
    from gspo.lab.report.write import make_report

    folders = [Path(run) if Path(run).is_dir() else find_run(run, path).folder for run in runs]
    print(f"report: {make_report(folders, out)}")


def draw(folder: Path) -> dict[str, str | None]:
    """Write the report of a finished run or comparison; if that fails, print why.

    Returns:
        `report`, as `--json` prints it; None if there is none.
    """
    from gspo.lab.report.write import make_report

    try:
        page = str(make_report([folder]))
    except Exception as error:  # whatever it is: a run of hours is worth more than its page
        print(f"no report: {error}")
        return {"report": None}
    print(f"report: {page}")
    return {"report": page}


def print_profile(clock: Clock, run: Path) -> str:
    """Print where the time of the steps went, and write it to the run. Returns the file."""
    from gspo.lab.profiling import make_report, render, write_profile

    report = make_report(clock)
    path = write_profile(report, run)
    print(f"\n{render(report)}profile: {path}")
    return str(path)
