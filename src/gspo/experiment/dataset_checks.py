"""What is refused of a user's dataset and rewards before anything is trained on them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from gspo.backend.metrics_file import read_metrics
from gspo.core.errors import ConfigError, DataError, RequestError, SampleTooLongError
from gspo.core.files import strict_json, write_whole
from gspo.experiment.rollout import plain_prompt
from gspo.experiment.spec import Spec
from gspo.experiment.user_error import users_errors
from gspo.serve.chat import ChatFormat
from gspo.tasks import Split, Task
from gspo.tasks.dataset import DatasetTask
from gspo.train.checkpoint import steps_saved

FILE = "dataset.json"
"""In the run's folder: which rows it is trained on."""


async def check_dataset(spec: Spec, task: Task | None) -> None:
    """Refuse other rows than the run began with, and try the rewards on the first row.

    Nothing is loaded for it. A task that is no dataset passes.

    Raises:
        DataError: the rows have changed, none is held out, or a reward is no number.
        RolloutError: a reward raised.
    """
    if not isinstance(task, DatasetTask):
        return
    if spec.eval_prompts and not task.problems["heldout"]:
        raise DataError(
            f"no row of {task.name} is held out: give data.heldout, or eval_prompts = 0"
        )
    path = spec.folder / FILE
    try:
        stored = json.loads(path.read_bytes()) if path.exists() else _about(task)
    except ValueError:
        stored = f"a damaged {FILE}"
    if stored != _about(task) and read_metrics(spec.folder / "metrics.jsonl"):
        raise DataError(
            f"{task.name} has changed since the run {spec.folder} began: it had {stored}, now "
            f"{_about(task)}. Give the rows that it began with, or another name for a new run"
        )
    if task.rewards:
        problem = task.problem("train", 0, spec.seed)
        saved = max(steps_saved(spec.folder / "checkpoints"), default=0)
        with users_errors("train", 0, saved):
            await task.grade(problem, [problem.answer, ""])


def check_prompts(spec: Spec, task: Task | None, tokenizer: Any, context: int | None) -> None:
    """Refuse prompts that the model's chat template refuses, or that its context has no room for.

    Args:
        context: of the model, in tokens; None: no limit.

    Raises:
        ConfigError: a variable that the model's chat template doesn't have.
        DataError: the template refuses a row.
        SampleTooLongError: the first row that is too long, and how many there are.
    """
    if not isinstance(task, DatasetTask) or spec.rollout is not None:
        return
    chat, limit = ChatFormat(tokenizer, spec.model), spec.max_tokens or task.max_tokens
    plain = tokenizer.chat_template is None
    if missing := [name for name in task.template_kwargs or () if not chat.mentions(name)]:
        told = f"{spec.model!r} has no chat template with a variable {missing[0]!r}"
        raise ConfigError(f"data.chat_template_kwargs: {told}")
    render = plain_prompt if plain else partial(chat.render, template_kwargs=task.template_kwargs)
    too_long: list[tuple[str, int]] = []
    steps = {"train": spec.steps * spec.prompts * (3 if spec.dynamic_sampling else 1)}
    split: Split
    for split, problems in task.problems.items():
        for index in range(min(len(problems), steps.get(split, spec.eval_prompts))):
            problem = task.problem(split, index, spec.seed)
            try:
                text = render(task.messages(problem))
            except (RequestError, TypeError, KeyError) as error:
                raise DataError(f"{problem.where}: {error}") from None
            length = len(tokenizer(text, add_special_tokens=plain)["input_ids"])
            if context is not None and length + limit > context:
                too_long.append((problem.where, length))
    if too_long:
        where, length = too_long[0]
        more = f" (and {len(too_long) - 1} more rows)" if len(too_long) > 1 else ""
        raise SampleTooLongError(
            f"{where}{more}: the prompt has {length} tokens, which with max_tokens = {limit} is "
            f"more than the context of {context}: leave it out, or lower max_tokens"
        )


def remember_dataset(spec: Spec, task: Task | None) -> list[str]:
    """Write to the run's folder which rows it is trained on; returns a line that says it."""
    if not isinstance(task, DatasetTask):
        return []
    write_whole(spec.folder / FILE, strict_json(_about(task), indent=1) + "\n")
    return [how_often(spec, task)]


def how_often(spec: Spec, task: DatasetTask) -> str:
    """How many rows there are, and how often each is trained on."""
    train, heldout = (len(problems) for problems in task.problems.values())
    steps = spec.steps - bool(spec.sft)
    return (
        f"{train:,} rows to train on and {heldout:,} held out: {steps} steps of "
        f"{spec.prompts} prompts go over them {steps * spec.prompts / train:.3g} x"
    )


def _about(task: DatasetTask) -> dict[str, Any]:
    counts = {split: len(problems) for split, problems in task.problems.items()}
    return {**counts, "sha256": task.digest}
