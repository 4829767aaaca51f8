"""What a spec will do, said before anything is loaded or written."""

from __future__ import annotations

from typing import Any

import torch

from gspo.backend.trackers import check_loggers
from gspo.core.byname import find_module
from gspo.core.errors import ConfigError
from gspo.experiment.spec import Spec
from gspo.kernels.kv_cache import kv_bytes
from gspo.policy.embedded import PREFIX, build_model, build_tokenizer, embedded_task
from gspo.policy.source import read_config, read_tokenizer, resolve
from gspo.tasks import load_task
from gspo.train.defaults import default_learning_rate
from gspo.train.minibatches import activation_bytes, token_budget
from gspo.train.settings import Settings
from gspo.train.settings import resolve as resolve_settings

_COPY_BYTES = {None: 0, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 4, "int4": 4}
"""Bytes per parameter of the engine's own copy; int8 and int4 are rounded float32 numbers."""
_LARGEST_ROLLOUTS = 512
"""The most completions that are decoded at once."""


def make_plan(spec: Spec) -> str:
    """Check each name that the spec gives, and describe the run. Memory is an estimate.

    Raises:
        GspoError: a model, task, rollout or option that doesn't exist, or completions that the
            model's context has no room for.
    """
    settings = resolve_settings(spec.train_config(), spec.train)
    check_loggers(spec.logger)
    task = load_task(spec.task, spec.task_options) if spec.task else None
    if spec.rollout:
        find_module(spec.rollout, "rollout")
    config, parameters = _shape(spec.model, spec.load.trust_remote_code)
    limit = spec.max_tokens or (task.max_tokens if task else None)
    _check_room(spec, limit if spec.rollout is None else None, config)

    rate = spec.learning_rate or default_learning_rate(parameters, spec.load.lora is not None)
    by_size = " by the model's size" if spec.learning_rate is None else ""
    plain = "" if spec.rollout or _has_template(spec) else "no chat template: plain prompts\n"
    sequences = spec.prompts * spec.completions
    longest = "the model's context" if limit is None else f"{limit} tokens"
    return (
        f"{settings.algorithm}, {_clipping(settings, spec)}\n"
        f"{parameters:,} parameters, learning rate {rate:.2g}{by_size}\n"
        f"{plain}"
        f"{sequences} sequences per step, {-(-sequences // settings.minibatches)} per optimizer "
        f"step, {settings.minibatches * spec.train.epochs} optimizer steps per step\n"
        f"completions of up to {longest}; {_memory(spec, limit, config, parameters)}"
    )


def _check_room(spec: Spec, limit: int | None, config: Any) -> None:
    """Refuse completions that leave no room for a prompt.

    Raises:
        ConfigError: the limit is not below the model's context.
    """
    context = spec.load.max_context or getattr(config, "max_position_embeddings", None)
    if limit is not None and context is not None and limit >= context:
        raise ConfigError(
            f"max_tokens = {limit}: {spec.model!r} has a context of {context} tokens, prompt "
            f"included: give max_tokens = {context - 1} or less"
        )


def _clipping(settings: Settings, spec: Spec) -> str:
    objective = settings.objective
    if objective.surrogate != "clip":
        return "no ratios are clipped"
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    begin = ", to begin with" if spec.train.epsilon == "auto" else ""
    return f"ratios clipped to [{low:.6g}, {high:.6g}]{begin}"


def _memory(spec: Spec, limit: int | None, config: Any, parameters: int) -> str:
    """Tokens of a microbatch, and the memory of the parts of a run."""
    checkpointing = spec.load.activation_checkpointing
    tokens = spec.train.packed_sequence_length or token_budget(config, checkpointing)
    rollouts = min(_LARGEST_ROLLOUTS, spec.prompts * spec.completions)
    weights = 4 * parameters
    copy = _COPY_BYTES[spec.load.rollout_dtype] * parameters
    optimizer = 8 * (parameters if spec.load.lora is None else parameters // 50)
    activations = tokens * activation_bytes(config, checkpointing)
    cache = kv_bytes(rollouts, 2 * (limit or 256), config)
    gradients = weights
    total = weights + copy + optimizer + max(cache, activations + gradients)
    return (
        f"microbatches of up to {tokens} tokens\n"
        f"about {total / 2**20:,.0f} MiB: weights {weights / 2**20:,.0f}, engine's copy "
        f"{copy / 2**20:,.0f}, optimizer {optimizer / 2**20:,.0f}, activations up to "
        f"{activations / 2**20:,.0f}, KV cache {cache / 2**20:,.0f}"
    )


def _has_template(spec: Spec) -> bool:
    """Whether the model's tokenizer has a chat template."""
    if spec.model.startswith(PREFIX):
        return True
    trust = spec.load.trust_remote_code
    return read_tokenizer(resolve(spec.model), trust_remote_code=trust).chat_template is not None


def _shape(name: str, trust_remote_code: bool) -> tuple[Any, int]:
    """The model's text config and its number of parameters, without its weights."""
    from transformers import AutoModelForCausalLM

    if name.startswith(PREFIX):
        embedded_task(name)
        model = build_model(build_tokenizer(), 0)
    else:
        config = read_config(resolve(name), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.config.get_text_config(), sum(p.numel() for p in model.parameters())
