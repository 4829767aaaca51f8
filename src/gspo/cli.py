"""The command line: thin verbs over the library. Those of the lab are in lab/commands.py."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gspo
from gspo.core.compute import leave
from gspo.core.errors import ConfigError, GspoError, RolloutError
from gspo.core.files import strict_json
from gspo.experiment import run_commands
from gspo.experiment.run_commands import JsonOption, PathOption, say_loading, show_json
from gspo.lab import commands

if TYPE_CHECKING:
    from gspo.experiment.spec import Spec

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Tell where the steps' time goes: <run>/profile.json.")
]


def main() -> None:
    """Run the command line. An error that gspo raises on purpose is shown without a traceback."""
    try:
        app()
    except GspoError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RolloutError) else 2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gspo {gspo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and stop."
        ),
    ] = False,
) -> None:
    """Sequence-level reinforcement learning (GSPO) for language models."""


@app.command()
def demo(
    path: PathOption = ".gspo",
    steps: Annotated[int | None, typer.Option(min=1, help="Rollout batches.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of sampling.")] = 0,
    profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the embedded Mixture-of-Experts model to sort digits, and show that it learned."""
    say_loading("embedded:sort")
    from gspo.experiment.whole_run import DEMO_STEPS, demo_spec

    _run(demo_spec(path, steps or DEMO_STEPS, seed), profile, as_json)


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(help="The run, as TOML.")],
    overrides: commands.SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run and its sizes, and stop.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Completions of each step to print.")] = 0,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Roll out for the next step while one trains.")
    ] = False,
    profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train from a file. The same command goes on where a killed run stopped."""
    from gspo.experiment.run_file import read_spec

    if dry_run and profile:
        raise ConfigError("--profile times the run that --dry-run doesn't make: leave one out")
    resolved = read_spec(spec, [*(overrides or []), *["pipeline=true"] * pipeline])
    if profile and resolved.pipeline:
        raise ConfigError("--profile times one thing at once, pipeline does two: leave one out")
    say_loading(resolved.model)
    if dry_run:
        from gspo.experiment.plan import check_dataset, make_plan

        task = resolved.make_task()
        plan = make_plan(resolved, task)
        asyncio.run(check_dataset(resolved, task))
        print(f"{strict_json(resolved.model_dump(), indent=2)}\n\n{plan}")
    else:
        _run(resolved, profile, as_json, samples)


@app.command()
def sft(
    data: Annotated[Path, typer.Argument(help='JSONL, rows of {"messages": [...]}.')],
    model: Annotated[str, typer.Option(help="embedded:<task>, a folder or a hub id.")],
    project: Annotated[str, typer.Option(help="Names the run's folder, with --name.")] = "gspo",
    name: Annotated[str, typer.Option(help="A run that is there is trained on.")] = "sft",
    path: PathOption = ".gspo",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an optimizer step.")] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak. Default: by the model's size.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest row. Default: the model's context.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the rows' order.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Supervised fine-tuning on the assistant's turns of conversations."""
    say_loading(model)
    from gspo.experiment.stop import run_until_signal
    from gspo.experiment.whole_run import tune

    sizes = {"epochs": epochs, "batch_size": batch_size, "lr_schedule": "linear"}
    config = gspo.TrainSFTConfig(learning_rate=learning_rate, seed=seed, **sizes)
    load = gspo.dev.InternalModelConfig(max_context=max_tokens)
    tuned = gspo.TrainableModel(name=name, project=project, base_model=model, _internal_config=load)
    try:
        done = run_until_signal(tune(data, tuned, config, path))
    except SystemExit as stopped:
        print("stopped: nothing of this call is saved; give it again", file=sys.stderr)
        leave(int(stopped.code or 0))
    told = done.metrics
    print(
        f"SFT loss of the first batch {told['sft/loss_first']:.4f}, of the last "
        f"{told['sft/loss_last']:.4f}; {told['sft/batches']:.0f} batches, "
        f"{told['sft/tokens']:,.0f} trained tokens"
    )
    print(f"step {done.step}; checkpoint in {done.checkpoint_path}")
    show_json(as_json, {"step": done.step, "checkpoint": str(done.checkpoint_path), **told})


@app.command()
def serve(
    model: run_commands.ModelArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Loopback unless you say otherwise, which needs an API key.")
    ] = "127.0.0.1",
    name: Annotated[str, typer.Option(help="The model's name in requests.")] = "",
    api_key: Annotated[
        str, typer.Option(envvar="GSPO_API_KEY", help="What requests must bring.")
    ] = "",
    step: run_commands.StepOption = None,
    path: PathOption = ".gspo",
) -> None:
    """Serve a model or a checkpoint with OpenAI's API."""
    say_loading("the server")
    from gspo.experiment.talk import serve_model

    serve_model(model, host, port, name or model, api_key or None, step, path)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A hub id, a folder or embedded:<task>.")],
    gpus: Annotated[int, typer.Option(min=1, max=4096, help="How many there are.")] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind, such as h100 or a100-80gb.")] = "h100",
    completions: Annotated[int, typer.Option(min=1, help="Of a step.")] = 512,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Of a prompt.")] = 512,
    mean_tokens: Annotated[int, typer.Option(min=1, help="Of a completion, on average.")] = 2048,
    longest: Annotated[int | None, typer.Option(min=1, help="Completion; else 4 x mean.")] = None,
    lora: Annotated[int, typer.Option(min=1, help="Rank, where LoRA is considered.")] = 16,
    mfu: Annotated[float | None, typer.Option(min=0.001, max=1, help="Of peak FLOP/s.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, seconds of a step and the balance of GPUs, before you pay for them."""
    from gspo.sizing.cluster import Rollouts
    from gspo.sizing.report import make_report

    wanted = Rollouts(completions, prompt_tokens, mean_tokens, longest or 4 * mean_tokens)
    text, told = make_report(model, gpu, gpus, wanted, lora, mfu)
    print(text, end="")
    show_json(as_json, told)


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the named methods: formula, defaults and source."""
    from gspo.objective import PRESETS

    methods = []
    for preset in PRESETS.values():
        objective = preset.objective
        defaults: dict[str, Any] = {"ratio": objective.level, "advantage": preset.advantage}
        if objective.has_range:
            defaults |= {"epsilon": objective.epsilon_low, "epsilon_high": objective.epsilon_high}
        defaults |= {**dict(objective.constants), "minibatches": preset.minibatches}
        method = {"name": preset.name, "formula": preset.formula, "defaults": defaults}
        methods.append(method | {"source": preset.source})
        if not as_json:
            typer.secho(preset.name, bold=True)
            told = ", ".join(f"{name}={value}" for name, value in defaults.items())
            print(f"  {preset.formula}\n  {told}\n  {preset.source}")
    show_json(as_json, methods)


# In the order of the help: what a newcomer needs stands first.
_HANDLING = (run_commands.runs, run_commands.sample, run_commands.chat)
_HANDLING += (run_commands.export, run_commands.fork, run_commands.prune)
_LOOKING = (commands.audit, commands.inspect, commands.compare, commands.report)
for verb in (*_HANDLING, *_LOOKING):
    app.command()(verb)


def _run(spec: Spec, profiled: bool, as_json: bool, samples: int = 0) -> None:
    """Run an experiment, and show what it found."""
    from gspo.core.timing import timing
    from gspo.experiment.loop import run_experiment
    from gspo.experiment.stop import run_until_signal
    from gspo.experiment.watch import LiveWatch
    from gspo.lab.profiling import step_clock
    from gspo.train.checkpoint import steps_saved

    clock = step_clock() if profiled else None
    try:
        with LiveWatch(samples=samples) as watch, timing(clock):
            outcome = run_until_signal(run_experiment(spec, watch))
    except SystemExit as stopped:
        status = int(stopped.code or 0)
        saved = max(steps_saved(spec.folder / "checkpoints"), default=0)
        print(
            f"stopped by {signal.Signals(status - 128).name}: {saved} of "
            f"{spec.steps} steps are saved in {spec.folder}; the same command goes on from there",
            file=sys.stderr,
        )
        leave(status)
    if outcome.before and outcome.after:
        interval = "" if outcome.before.low is None else "   (95 % interval)"
        print(f"held-out reward before  {outcome.before}{interval}")
        if outcome.warm:
            print(f"held-out reward after SFT {outcome.warm}")
        print(f"held-out reward after   {outcome.after}   over {outcome.prompts} prompts")
    print(f"steps: {outcome.steps}, in {outcome.seconds:.0f} s; run in {outcome.run}")
    files = commands.draw(outcome.run)
    if clock is not None:
        files["profile"] = commands.print_profile(clock, outcome.run)
    show_json(as_json, outcome.as_json() | files)


if __name__ == "__main__":
    main()
