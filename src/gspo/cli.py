"""The command line: thin verbs over the library."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gspo.errors import ConfigError, GspoError

if TYPE_CHECKING:
    from gspo.lab.compare.session import GridPlan
    from gspo.lab.compare.spec import CompareSpec
    from gspo.lab.spec import Spec

app = typer.Typer(
    help="Sequence-level reinforcement learning (GSPO) for language models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)

PathOption = Annotated[str, typer.Option("--path", help="Folder of the runs.")]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Tell where the steps' time goes: <run>/profile.json.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON object as the last line.")]


def main() -> None:
    """Run the command line; errors of gspo's own are one line, without a traceback."""
    try:
        app()
    except GspoError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def demo(
    path: PathOption = ".gspo",
    steps: Annotated[int | None, typer.Option(min=1, help="Rollout batches.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and sampling.")] = 0,
    profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the embedded Mixture-of-Experts model to sort digits, and show that it learned."""
    from gspo.lab.demo import STEPS, demo_spec

    _run(lambda: demo_spec(path, steps or STEPS, seed), as_json, profile)


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(help="The run, as TOML.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value; dotted keys reach tables.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run and its sizes, and stop.")
    ] = False,
    profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train from a file. The same command goes on where a killed run stopped."""
    from gspo.lab.spec import read_spec

    if dry_run and profile:
        raise ConfigError("--profile times the run that --dry-run doesn't make: leave one out")
    resolved = read_spec(spec, overrides or [])
    if dry_run:
        _dry_run(resolved)
    else:
        _run(lambda: resolved, as_json, profile)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="embedded:<task>, a folder or a hub id.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Loopback unless you say otherwise.")] = "127.0.0.1",
    name: Annotated[str, typer.Option(help="The model's name in requests.")] = "",
) -> None:
    """Serve a model or a checkpoint with OpenAI's API."""
    from gspo.lab.serving import serve_model

    serve_model(model, host, port, name or model)


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the named methods: formula, defaults and source."""
    from gspo.lab.listing import preset_rows, print_presets

    if as_json:
        print(json.dumps(preset_rows()))
    else:
        print_presets()


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="embedded:<task>, a folder or a hub id.")],
    rollout_dtype: Annotated[
        str, typer.Option(help="The engine's: float32, bfloat16, float16, int8 or int4.")
    ] = "float32",
    task: Annotated[str | None, typer.Option(help="Default: the embedded model's own.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of the task.")] = 64,
    completions: Annotated[int, typer.Option(min=1, help="Per prompt.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the task's.")] = None,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 1.0,
    epsilon_low: Annotated[float | None, typer.Option(help="Default: GSPO's 3e-4.")] = None,
    epsilon_high: Annotated[float | None, typer.Option(help="Default: GSPO's 4e-4.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell whether the clip range is wider than the noise between engine and trainer."""
    from gspo.lab.audit import AuditSpec, run_audit
    from gspo.lab.audit_picture import draw_audit
    from gspo.lab.audit_text import render
    from gspo.lab.picture import require_plotting

    spec = AuditSpec(
        model=model,
        rollout_dtype=rollout_dtype,  # pyright: ignore[reportArgumentType]  # it checks
        task=task,
        prompts=prompts,
        completions=completions,
        max_tokens=max_tokens,
        temperature=temperature,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
    )
    if picture is not None:
        require_plotting()
    report, noise = run_audit(spec)
    print(render(report), end="")
    if picture is not None:
        print(f"picture            {draw_audit(report, noise.log_ratios, picture)}")
    if as_json:
        print(json.dumps(report.as_json()))


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    step: Annotated[int | None, typer.Option(min=1, help="Default: the last one.")] = None,
    weights: Annotated[str, typer.Option(help="before or after the step, or both.")] = "both",
    presets: Annotated[str | None, typer.Option(help="Some of them, as a,b,c.")] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Also print the cosines of all pairs.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Write a PNG of the cosines here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every method's loss, gradient and clipping on a batch that a run has stored."""
    from gspo.lab.inspection import InspectSpec, inspect_run
    from gspo.lab.inspection_picture import draw_inspection
    from gspo.lab.inspection_text import render
    from gspo.lab.picture import require_plotting

    names = None if presets is None else [name.strip() for name in presets.split(",")]
    spec = InspectSpec(
        run=run,
        step=step,
        weights=weights,  # pyright: ignore[reportArgumentType]  # it checks
        presets=names,  # pyright: ignore[reportArgumentType]  # it checks
    )
    if picture is not None:
        require_plotting()
    found = inspect_run(spec)
    print(render(found, matrix=matrix), end="")
    if picture is not None:
        print(f"picture: {draw_inspection(found, picture)}")
    if as_json:
        print(json.dumps(found.as_json()))


@app.command()
def compare(
    spec: Annotated[Path | None, typer.Argument(help="The comparison, as TOML.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="GSPO and GRPO, two seeds, built in.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value; dotted keys reach tables.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and a rough cost, and stop.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at once. Default: one for each core.")
    ] = None,
    path: Annotated[
        str | None, typer.Option("--path", help="Folder of the comparisons. Default: the spec's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods under stressors, over seeds. The same command goes on where it stopped."""
    from gspo.lab.compare.session import plan_comparison
    from gspo.lab.compare.table import print_plan

    resolved = _comparison(spec, quick, overrides or [], path)
    plan = plan_comparison(resolved, workers)
    if dry_run:
        print_plan(plan)
        return
    content = _compare(resolved, plan, quick)
    if as_json:
        counts = {name: plan.count(name) for name in ("done", "failed", "refused")}
        print(json.dumps({"folder": str(resolved.folder), **counts, "paired": content["paired"]}))
    if plan.count("failed"):
        raise SystemExit(1)


def _comparison(
    spec: Path | None, quick: bool, overrides: list[str], path: str | None
) -> CompareSpec:
    from gspo.lab.compare.quick import quick_spec
    from gspo.lab.compare.spec import read_compare_spec, with_overrides

    if quick == (spec is not None):
        raise ConfigError("give a spec file, or --quick: gspo compare SPEC.toml")
    placed = [*overrides, *([f"path={json.dumps(path)}"] if path else [])]
    return with_overrides(quick_spec(), placed) if spec is None else read_compare_spec(spec, placed)


def _compare(resolved: CompareSpec, plan: GridPlan, quick: bool) -> dict[str, Any]:
    from gspo.lab.compare.quick import ADVICE
    from gspo.lab.compare.session import run_comparison
    from gspo.lab.compare.table import LiveGrid, print_result, summary_line

    print(summary_line(plan))
    with LiveGrid(plan) as watch:
        path, content = run_comparison(resolved, plan, watch, quick=quick)
    print_result(content)
    print(f"data: {path}")
    if quick:
        print(ADVICE)
    return content


def _run(make_spec: Callable[[], Spec], as_json: bool, profiled: bool) -> None:
    from gspo.lab import experiment
    from gspo.lab.picture import draw_run, require_plotting
    from gspo.lab.profile import Profile
    from gspo.lab.profile_text import render
    from gspo.lab.watch import LiveWatch
    from gspo.timing import timing

    require_plotting()
    profile = Profile() if profiled else None
    with LiveWatch() as watch, timing(profile and profile.clock):
        outcome = asyncio.run(experiment.run_experiment(make_spec(), watch, profile))
    picture = draw_run(outcome.run)
    if outcome.before and outcome.after:
        print(f"held-out reward before  {outcome.before}   (95 % interval)")
        print(f"held-out reward after   {outcome.after}   over {outcome.prompts} prompts")
    print(f"{outcome.steps} steps in {outcome.seconds:.0f} s; run in {outcome.run}")
    print(f"picture: {picture}")
    found = experiment.as_json(outcome) | {"picture": str(picture)}
    if profile is not None:
        report = profile.report()
        text = render(report)
        found["profile"] = str(report.write(outcome.run, text))
        print(f"\n{text}profile: {found['profile']}")
    if as_json:
        print(json.dumps(found))


def _dry_run(spec: Spec) -> None:
    from gspo.lab.plan import make_plan

    plan = make_plan(spec)
    print(json.dumps(spec.model_dump(), indent=2))
    ratios = "no ratios are clipped"
    if plan.clip_range is not None:
        ratios = "ratios clipped to [{:.6g}, {:.6g}]".format(*plan.clip_range)
        ratios += ", to begin with" if spec.train.epsilon == "auto" else ""
    limit = plan.longest_completion
    longest = "the model's context" if limit is None else f"{limit} tokens"
    print(
        f"\n{plan.algorithm}, {ratios}\n"
        f"{plan.parameters:,} parameters\n"
        f"{plan.sequences_per_step} sequences a step, {plan.sequences_per_update} an optimizer "
        f"step, {plan.updates_per_step} optimizer steps a step\n"
        f"completions of up to {longest}; packed rows of {plan.row_tokens} tokens\n"
        f"about {plan.memory / 2**20:,.0f} MiB: weights {plan.memory_weights / 2**20:,.0f}, "
        f"engine's copy {plan.memory_rollout_copy / 2**20:,.0f}, "
        f"optimizer {plan.memory_optimizer / 2**20:,.0f}, activations up to "
        f"{plan.memory_activations / 2**20:,.0f}, KV cache {plan.memory_kv_cache / 2**20:,.0f}"
    )


if __name__ == "__main__":
    main()
