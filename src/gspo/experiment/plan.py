"""What a spec will do, checked and described before anything is loaded or written."""

from __future__ import annotations

from typing import Any

from gspo.backend.cluster_backend import check_divided, check_ranks
from gspo.backend.engines import dtype_of_servers
from gspo.backend.trackers import check_loggers
from gspo.core.byname import find_module
from gspo.core.errors import ConfigError, ModelError
from gspo.environments import load_environment
from gspo.experiment.dataset_checks import check_prompts, how_often
from gspo.experiment.spec import Spec
from gspo.kernels.kv_cache import kv_bytes
from gspo.policy.embedded import PREFIX, RECIPES, build_model, build_tokenizer, embedded_task
from gspo.policy.source import check_experts, empty_model, read_tokenizer, resolve
from gspo.tasks import Task
from gspo.tasks.dataset import DatasetTask
from gspo.train.defaults import default_learning_rate
from gspo.train.minibatches import activation_bytes, token_budget
from gspo.train.settings import resolve as resolve_settings
from gspo.utils.sft import read_trajectories
from gspo.weights.vllm_process import check_entries

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
    _check_names(spec)
    ranks = check_ranks(
        spec.nproc, {"cp_size": spec.cp_size, "ep_size": spec.ep_size}, spec.engines
    )
    if ranks > 1:
        check_divided(spec.load, spec.ep_size)
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
    clipping, objective = "no ratios are clipped", settings.objective
    if objective.surrogate == "clip":
        low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
        begin = ", to begin with" if spec.train.epsilon == "auto" else ""
        clipping = f"ratios clipped to [{low:.6g}, {high:.6g}]{begin}"
    rate = spec.learning_rate or default_learning_rate(parameters, spec.load.lora is not None)
    by_size = " by the model's size" if spec.learning_rate is None else ""
    sequences, longest = spec.prompts * spec.completions, limit or context or "any number of"
    tokens = spec.train.packed_sequence_length
    tokens = tokens or token_budget(config, spec.load.activation_checkpointing)
    lines = [
        f"{settings.algorithm}, {clipping}",
        f"{parameters:,} parameters, learning rate {rate:.2g}{by_size}",
        f"{sequences} sequences per step, {-(-sequences // settings.minibatches)} per optimizer "
        f"step; optimizer steps per step: {settings.minibatches * spec.train.epochs}",
        f"completions of up to {longest} tokens; microbatches of up to {tokens} tokens",
        _memory(spec, tokens, limit or 256, config, parameters),
    ]
    if spec.engines:
        named = str(dtype_of_servers(spec.load)).removeprefix("torch.")
        lines.insert(1, f"sampled by vLLM in {named}: {', '.join(spec.engines)}")
    if ranks > 1:
        lines.insert(1, f"trained by {ranks} processes; memory is that of one process alone")
    if isinstance(task, DatasetTask):
        lines.insert(3, how_often(spec, task))
    if played:
        lines.insert(3, f"episodes of up to {spec.max_turns or played.max_turns} turns")
    if spec.sft:
        rows = len(read_trajectories(spec.sft.data))
        lines.insert(0, f"first SFT on {rows} conversations, {spec.sft.epochs} x")
    if spec.rollout is None and tokenizer.chat_template is None:
        lines.insert(2, "no chat template: plain prompts")
    return "\n".join(lines)


def _check_names(spec: Spec) -> None:
    """Refuse trackers, servers, a teacher or a rollout that don't exist."""
    check_loggers(spec.logger)
    check_entries(spec.engines)
    if spec.train.kl_reference is not None:
        try:
            resolve(spec.train.kl_reference)
        except ModelError as error:
            raise ModelError(f"kl_reference, the teacher: {error}") from None
    if spec.rollout:
        find_module(spec.rollout, "rollout")


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
