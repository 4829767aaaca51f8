"""The verbs that handle runs and their checkpoints. Nothing is imported before it is needed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gspo.core.errors import RunError
from gspo.core.files import strict_json

JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON object as the last line.")]
PathOption = Annotated[str, typer.Option("--path", help="Folder of the runs.")]
StepOption = Annotated[
    str | None, typer.Option(help="Of a run: best, latest or a number. Default: latest.")
]
ModelArgument = Annotated[
    str, typer.Argument(help="A run (folder or name), embedded:<task>, a folder or a hub id.")
]
RunArgument = Annotated[str, typer.Argument(help="Its folder, <project>/<name>, or <name>.")]
SystemOption = Annotated[str, typer.Option(help="The system turn.")]
MaxTokensOption = Annotated[int | None, typer.Option(min=1, help="Longest completion.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0: the likeliest tokens.")]


def say_loading(what: str) -> None:
    """Show a sign of life on stderr before the imports, which take seconds."""
    print(f"loading {what} ...", file=sys.stderr, flush=True)


def show_json(wanted: bool, value: Any) -> None:
    """Print the last line that `--json` asks for."""
    if wanted:
        print(strict_json(value))


def runs(
    path: Annotated[Path, typer.Argument(help="Folder of the runs, of a project or a run.")] = Path(
        ".gspo"
    ),
    as_json: JsonOption = False,
) -> None:
    """List runs: base model, method, step, held-out reward, checkpoints, size."""
    from gspo.experiment.run_table import describe_run, runs_text
    from gspo.experiment.saved_run import find_runs

    found = [describe_run(run) for run in find_runs(path)]
    if not found:
        raise RunError(f"no runs in {path}: give the folder that they are in")
    print(runs_text(found), end="")
    show_json(as_json, found)


def sample(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Default: held-out ones of its task."),
    ] = None,
    step: StepOption = None,
    path: PathOption = ".gspo",
    completions: Annotated[
        int, typer.Option("--completions", "-n", min=1, max=4096, help="Of each prompt.")
    ] = 1,
    system: SystemOption = "",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Print what a checkpoint or a model answers to prompts."""
    say_loading(model)
    from gspo.experiment import talk

    options = _options(temperature, max_tokens) | {"seed": seed}
    where: dict[str, Any] = {"step": step, "path": path, "system": system, "options": options}
    found = asyncio.run(talk.sample(model, prompts or [], completions=completions, **where))
    show_json(as_json, found)


def chat(
    model: ModelArgument,
    step: StepOption = None,
    path: PathOption = ".gspo",
    system: SystemOption = "",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = 1.0,
) -> None:
    """Talk with a checkpoint or a model on the terminal."""
    say_loading(model)
    from gspo.experiment import talk

    options = _options(temperature, max_tokens)
    talking = talk.chat(model, step=step, path=path, system=system, options=options)
    try:
        asyncio.run(talking)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def export(
    run: RunArgument,
    to: Annotated[Path | None, typer.Option(help="A folder that is empty or not there.")] = None,
    step: StepOption = None,
    path: PathOption = ".gspo",
    merge: Annotated[
        bool, typer.Option("--merge", help="Add a LoRA adapter to the weights of its model.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    push_to: Annotated[str | None, typer.Option(help="owner/name of a Hugging Face hub.")] = None,
) -> None:
    """Write a checkpoint, with a model card, for transformers, peft, vLLM or a hub."""
    say_loading(run)
    from gspo.experiment import export as job
    from gspo.experiment.saved_run import find_run

    found = find_run(run, path)
    what = job.Export(found, found.step(step or "latest"), merge, dtype)
    folder, url = job.export(what, to, push_to)
    for place in filter(None, (folder, url)):
        print(f"{found.name}, step {what.step}, in {place}")


def fork(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="Of the new run, in the same project.")],
    step: StepOption = None,
    path: PathOption = ".gspo",
) -> None:
    """Begin a new run with a checkpoint of another one; `gspo train --set name=` goes on."""
    say_loading(run)
    import gspo as art
    from gspo.backend.fork import fork_checkpoint
    from gspo.experiment.saved_run import find_run

    source = find_run(run, path)
    at, folder = source.step(step or "latest"), source.folder.resolve()
    if at == 0:
        raise RunError(f"step 0 of {source.name} is its base model: begin a run with that")
    model = art.TrainableModel(
        name=name,
        project=folder.parent.name,
        base_model=source.base_model,
        _internal_config=source.load,
    )
    fork_checkpoint(folder.parent.parent, model, folder.name, not_after_step=at)
    print(f"{folder.parent / name} goes on from step {at} of {source.name}")


def prune(
    run: RunArgument,
    keep: Annotated[int, typer.Option(min=1, help="How many of the latest stay.")] = 1,
    metric: Annotated[str, typer.Option(help="Its best step stays too.")] = "val/reward",
    path: PathOption = ".gspo",
) -> None:
    """Delete a run's checkpoints, but for the latest and the best."""
    from gspo.backend.run import Run
    from gspo.experiment.saved_run import find_run, listed
    from gspo.train.checkpoint import steps_saved

    found = find_run(run, path)
    folder = found.folder.resolve()
    held = Run(folder.parent.parent, folder.parent.name, folder.name, {})
    try:
        before = steps_saved(held.checkpoints)
        held.prune(keep, metric, required=True)
        after = steps_saved(held.checkpoints)
    finally:
        held.close()
    gone = [step for step in before if step not in after]
    print(f"{found.name}: deleted {listed(gone)}; kept {listed(after)}")


def _options(temperature: float, max_tokens: int | None) -> dict[str, Any]:
    """Options of a request; the server has defaults of its own."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {"temperature": temperature, **limit}
