"""The command line: thin verbs over the library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gspo
from gspo import cli_lab
from gspo.core.errors import ConfigError, GspoError, RolloutError
from gspo.core.files import strict_json

if TYPE_CHECKING:
    from gspo.experiment.spec import Spec
    from gspo.experiment.stop import Stop

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PathOption = Annotated[str, typer.Option("--path", help="Folder of the runs.")]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Tell where the steps' time goes: <run>/profile.json.")
]


def main() -> None:
    """Run the command line; errors of gspo's own are told without a traceback."""
    try:
        app()
    except RolloutError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except GspoError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gspo {gspo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version, and stop.",
        ),
    ] = False,
) -> None:
    """Sequence-level reinforcement learning (GSPO) for language models."""


@app.command()
def demo(
    path: PathOption = ".gspo",
    steps: Annotated[int | None, typer.Option(min=1, help="Rollout batches.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and sampling.")] = 0,
    profile: ProfileOption = False,
    as_json: cli_lab.JsonOption = False,
) -> None:
    """Train the embedded Mixture-of-Experts model to sort digits, and show that it learned."""

    def spec() -> Spec:
        from gspo.experiment.demo import STEPS, demo_spec

        return demo_spec(path, steps or STEPS, seed)

    _run(spec, "embedded:sort", as_json, profile)


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
    as_json: cli_lab.JsonOption = False,
) -> None:
    """Train from a file. The same command goes on where a killed run stopped."""
    from gspo.experiment.spec import read_spec

    if dry_run and profile:
        raise ConfigError("--profile times the run that --dry-run doesn't make: leave one out")
    resolved = read_spec(spec, overrides or [])
    if dry_run:
        _dry_run(resolved)
    else:
        _run(lambda: resolved, resolved.model, as_json, profile)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="embedded:<task>, a folder or a hub id.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Loopback unless you say otherwise.")] = "127.0.0.1",
    name: Annotated[str, typer.Option(help="The model's name in requests.")] = "",
) -> None:
    """Serve a model or a checkpoint with OpenAI's API."""
    cli_lab.say_loading(model)
    from gspo.experiment.serving import serve_model

    serve_model(model, host, port, name or model)


@app.command()
def presets(as_json: cli_lab.JsonOption = False) -> None:
    """List the named methods: formula, defaults and source."""
    from gspo.experiment.listing import preset_rows, print_presets

    if as_json:
        print(strict_json(preset_rows()))
    else:
        print_presets()


# In the order of the help: what a newcomer needs stands first.
for verb in (cli_lab.audit, cli_lab.inspect, cli_lab.compare, cli_lab.report):
    app.command()(verb)


def _run(make_spec: Callable[[], Spec], model: str, as_json: bool, profiled: bool) -> None:
    cli_lab.say_loading(model)  # before the imports, which take seconds

    from gspo.core.timing import timing
    from gspo.experiment import loop as experiment
    from gspo.experiment.watch import LiveWatch
    from gspo.lab.profile import Profile
    from gspo.lab.profile_text import render
    from gspo.lab.report.write import try_report

    spec = make_spec()
    profile = Profile() if profiled else None
    with _ended_in_order(spec) as stop, LiveWatch() as watch, timing(profile and profile.clock):
        outcome = stop.run(experiment.run_experiment(spec, watch, profile))
    if outcome.before and outcome.after:
        print(f"held-out reward before  {outcome.before}   (95 % interval)")
        print(f"held-out reward after   {outcome.after}   over {outcome.prompts} prompts")
    print(f"{outcome.steps} steps in {outcome.seconds:.0f} s; run in {outcome.run}")
    page = try_report(outcome.run)
    if page is not None:
        print(f"report: {page}")
    found = experiment.as_json(outcome) | {"report": page and str(page)}
    if profile is not None:
        report = profile.report()
        text = render(report)
        found["profile"] = str(report.write(outcome.run, text))
        print(f"\n{text}profile: {found['profile']}")
    if as_json:
        print(strict_json(found))


@contextmanager
def _ended_in_order(spec: Spec) -> Iterator[Stop]:
    """End with a word on what is saved, where a signal ends the run."""
    from gspo.experiment.stop import Stop, leave
    from gspo.train.checkpoint import steps_saved

    stop = Stop()
    try:
        with stop:
            yield stop
    except SystemExit as error:
        if stop.signal is None:
            raise
        folder = Path(spec.path) / spec.project / spec.name
        saved = max(steps_saved(folder / "checkpoints"), default=0)
        print(
            f"stopped by {stop.signal.name}: {saved} of {spec.steps} steps are saved in {folder}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        leave(int(error.code or 0))


def _dry_run(spec: Spec) -> None:
    cli_lab.say_loading(spec.model)
    from gspo.experiment.plan import make_plan

    plan = make_plan(spec)
    print(strict_json(spec.model_dump(), indent=2))
    ratios = "no ratios are clipped"
    if plan.clip_range is not None:
        ratios = "ratios clipped to [{:.6g}, {:.6g}]".format(*plan.clip_range)
        ratios += ", to begin with" if spec.train.epsilon == "auto" else ""
    chosen = " by the model's size" if spec.learning_rate is None else ""
    prompts = "" if plan.chat_template or spec.rollout else "no chat template: plain prompts\n"
    limit = plan.longest_completion
    longest = "the model's context" if limit is None else f"{limit} tokens"
    print(
        f"\n{plan.algorithm}, {ratios}\n"
        f"{plan.parameters:,} parameters, learning rate {plan.learning_rate:.2g}{chosen}\n"
        f"{prompts}"
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
