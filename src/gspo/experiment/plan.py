"""What a spec will do, and what is refused of it: checked before anything is loaded or trained."""

from __future__ import annotations

from functools import partial
from typing import Any

from gspo.backend.cluster_backend import check_divided, check_ranks
from gspo.backend.engines import dtype_of_servers
from gspo.backend.metrics_file import read_metrics
from gspo.backend.trackers import check_loggers
from gspo.core.byname import find_module
from gspo.core.errors import ConfigError, DataError, ModelError, RequestError, SampleTooLongError
from gspo.core.files import read_object, strict_json, write_whole
from gspo.environments import load_environment
from gspo.experiment.rollout import plain_prompt, users_errors
from gspo.experiment.spec import Spec
from gspo.kernels.kv_cache import kv_bytes
from gspo.policy.embedded import PREFIX, RECIPES, build_model, build_tokenizer, embedded_task
from gspo.policy.source import check_experts, empty_model, read_tokenizer, resolve
from gspo.serve.chat import ChatFormat
from gspo.tasks import Split, Task
from gspo.tasks.dataset import DatasetTask
from gspo.train.checkpoint import steps_saved
from gspo.train.defaults import default_learning_rate
from gspo.train.minibatches import activation_bytes, token_budget
from gspo.train.settings import Settings
from gspo.train.settings import resolve as resolve_settings
from gspo.utils.sft import read_trajectories
from gspo.weights.vllm_process import check_entries

FILE = "dataset.json"
"""In the run's folder: which rows it is trained on."""
_COPY_BYTES = {None: 0, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 4, "int4": 4}
"""Bytes per parameter of the engine's own copy; int8 and int4 are rounded float32 numbers."""
_LARGEST_ROLLOUTS = 512
"""The most completions that are decoded at once."""


def make_plan(spec: Spec, task: Task | None = None) -> str:
    """Check each name that the spec gives, and describe the run. Memory is an estimate.

    Args:
        task: the spec's, if it is loaded already.

    Raises:
        GspoError: a model, task, rollout or option that doesn't exist, or completions that the
            model's context has no room for.
    """
    settings = resolve_settings(spec.train_config(), spec.train)
    ranks = _check_names(spec)
    task = task or spec.make_task()
    played = (
        load_environment(spec.environment, spec.environment_options)() if spec.environment else None
    )
    model, tokenizer = _base_model(spec)
    check_experts(model, spec.model, spec.ep_size)
    config, parameters = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    limit = spec.max_tokens or getattr(task or played, "max_tokens", None)
    context = spec.load.max_context or getattr(config, "max_position_embeddings", None)
    if limit and context and limit >= context and spec.rollout is None:
        raise ConfigError(
            f"max_tokens = {limit}: {spec.model!r} has a context of {context} tokens, prompt "
            f"included: give max_tokens = {context - 1} or less"
        )
    check_prompts(spec, task, tokenizer, context)
    lines = [_method(spec, settings)]
    if spec.sft:
        rows = len(read_trajectories(spec.sft.data))
        lines.insert(0, f"first SFT on {rows} conversations, {spec.sft.epochs} x")
    if ranks > 1:
        lines.append(f"trained by {ranks} processes; memory is that of one process alone")
    if spec.engines:
        named = str(dtype_of_servers(spec.load)).removeprefix("torch.")
        lines.append(f"sampled by vLLM in {named}: {', '.join(spec.engines)}")
    rate = spec.learning_rate or default_learning_rate(parameters, spec.load.lora is not None)
    by_size = " by the model's size" if spec.learning_rate is None else ""
    lines.append(f"{parameters:,} parameters, learning rate {rate:.2g}{by_size}")
    if spec.rollout is None and tokenizer.chat_template is None:
        lines.append("no chat template: plain prompts")
    sequences, longest = spec.prompts * spec.completions, limit or context or "any number of"
    lines.append(
        f"{sequences} sequences per step, {-(-sequences // settings.minibatches)} per optimizer "
        f"step; optimizer steps per step: {settings.minibatches * spec.train.epochs}"
    )
    if played:
        lines.append(f"episodes of up to {spec.max_turns or played.max_turns} turns")
    if isinstance(task, DatasetTask):
        lines.append(how_often(spec, task))
    tokens = spec.train.packed_sequence_length
    tokens = tokens or token_budget(config, spec.load.activation_checkpointing)
    lines.append(f"completions of up to {longest} tokens; microbatches of up to {tokens} tokens")
    return "\n".join([*lines, _memory(spec, tokens, limit or 256, config, parameters)])


def _check_names(spec: Spec) -> int:
    """Refuse processes, trackers, servers, a teacher or a rollout that cannot be. Returns how many
    processes train."""
    check_loggers(spec.logger)
    check_entries(spec.engines)
    if spec.train.kl_reference is not None:
        try:
            resolve(spec.train.kl_reference)
        except ModelError as error:
            raise ModelError(f"kl_reference, the teacher: {error}") from None
    if spec.rollout:
        find_module(spec.rollout, "rollout")
    sizes = {"cp_size": spec.cp_size, "ep_size": spec.ep_size}
    ranks = check_ranks(spec.nproc, sizes)
    if ranks > 1:
        check_divided(spec.load, spec.ep_size, spec.engines)
    return ranks


def _method(spec: Spec, settings: Settings) -> str:
    objective = settings.objective
    if objective.surrogate != "clip":
        return f"{settings.algorithm}, no ratios are clipped"
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    begin = ", to begin with" if spec.train.epsilon == "auto" else ""
    return f"{settings.algorithm}, ratios clipped to [{low:.6g}, {high:.6g}]{begin}"


def _base_model(spec: Spec) -> tuple[Any, Any]:
    """The model, of which only shapes are used, and its tokenizer. No weights are read."""
    if spec.model.startswith(PREFIX):
        recipe = RECIPES[embedded_task(spec.model)]
        return build_model(recipe.get("context")), build_tokenizer()
    source, trust = resolve(spec.model), spec.load.trust_remote_code
    tokenizer = read_tokenizer(source, trust_remote_code=trust)
    return empty_model(source, trust_remote_code=trust), tokenizer


def _memory(spec: Spec, tokens: int, limit: int, config: Any, parameters: int) -> str:
    """The memory of the parts of a run, as if all were there at once.

    Args:
        tokens: of a microbatch.
        limit: tokens of the longest completion; its prompt is taken to be as long.
        config: the model's text config.
        parameters: of the model.
    """
    rollouts = min(_LARGEST_ROLLOUTS, spec.prompts * spec.completions)
    trained = parameters if spec.load.lora is None else parameters // 50
    half = spec.load.dtype == "bfloat16"
    parts = {
        "weights": 2 * parameters + 4 * trained if half else 4 * parameters,
        "engine's copy": _COPY_BYTES[spec.load.rollout_dtype] * parameters,
        "optimizer": 8 * trained,
        "gradients": 4 * trained,
        "activations": tokens * activation_bytes(config, spec.load.activation_checkpointing),
        "KV cache": kv_bytes(rollouts, 2 * limit, config),
    }
    sizes = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    return f"up to {sum(parts.values()) / 2**20:,.0f} MiB: {sizes}"


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
    path, now = spec.folder / FILE, _about(task)
    stored = (read_object(path) or f"a damaged {FILE}") if path.exists() else now
    if stored != now and read_metrics(spec.folder / "metrics.jsonl"):
        raise DataError(
            f"{task.name} has changed since the run {spec.folder} began: it had {stored}, now "
            f"{now}. Give the rows that it began with, or another name for a new run"
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
