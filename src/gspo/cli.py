"""The command line: thin verbs over the library."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gspo.errors import GspoError

if TYPE_CHECKING:
    from gspo.lab.spec import Spec

app = typer.Typer(
    help="Sequence-level reinforcement learning (GSPO) for language models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)

PathOption = Annotated[str, typer.Option("--path", help="Folder of the runs.")]
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
    as_json: JsonOption = False,
) -> None:
    """Train the embedded Mixture-of-Experts model to sort digits, and show that it learned."""
    from gspo.lab.demo import STEPS, demo_spec

    _run(lambda: demo_spec(path, steps or STEPS, seed), as_json)


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(help="The run, as TOML.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value; dotted keys reach tables.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run and its sizes, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train from a file. The same command goes on where a killed run stopped."""
    from gspo.lab.spec import read_spec

    resolved = read_spec(spec, overrides or [])
    if dry_run:
        _dry_run(resolved)
    else:
        _run(lambda: resolved, as_json)


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
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or one folder of a comparison.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Default: <RUN>/report.html. Needed for several runs.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep it up to date until no run is alive.")
    ] = False,
) -> None:
    """Write a run, or several side by side, as one HTML file that needs no network."""
    from gspo.lab.report.command import make_report

    path, keep_up = make_report(runs, out, watch)
    print(f"report: {path}")
    keep_up()


def _run(make_spec: Callable[[], Spec], as_json: bool) -> None:
    from gspo.lab import experiment
    from gspo.lab.picture import draw_run, require_plotting
    from gspo.lab.report.live import LiveReport
    from gspo.lab.watch import LiveWatch

    require_plotting()
    with LiveWatch() as watch, LiveReport(watch) as live:
        outcome = asyncio.run(experiment.run_experiment(make_spec(), live))
    picture = draw_run(outcome.run)
    if outcome.before and outcome.after:
        print(f"held-out reward before  {outcome.before}   (95 % interval)")
        print(f"held-out reward after   {outcome.after}   over {outcome.prompts} prompts")
    print(f"{outcome.steps} steps in {outcome.seconds:.0f} s; run in {outcome.run}")
    print(f"picture: {picture}")
    if live.path:
        print(f"report: {live.path}")
    if as_json:
        files = {"picture": str(picture), "report": live.path and str(live.path)}
        print(json.dumps(experiment.as_json(outcome) | files))


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
