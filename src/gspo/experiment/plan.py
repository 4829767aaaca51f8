"""What a spec will do, told before anything is loaded or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gspo.backend.trackers import check_loggers
from gspo.experiment.rollout import check_rollout
from gspo.experiment.spec import Spec
from gspo.kernels.kv_cache import kv_bytes
from gspo.policy.embedded import PREFIX, build_model, build_tokenizer, embedded_task
from gspo.policy.source import read_config, read_tokenizer, resolve
from gspo.tasks import load_task
from gspo.train.budget import activation_bytes, row_budget
from gspo.train.defaults import default_learning_rate
from gspo.train.settings import Settings
from gspo.train.settings import resolve as resolve_settings

# Bytes a parameter of the engine's own copy; int8 and int4 are rounded float32 numbers.
_COPY_BYTES = {None: 0, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 4, "int4": 4}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. Memory is an estimate, in bytes."""

    algorithm: str
    clip_range: tuple[float, float] | None
    parameters: int
    learning_rate: float
    chat_template: bool
    sequences_per_step: int
    sequences_per_update: int
    updates_per_step: int
    longest_completion: int | None
    row_tokens: int
    memory_weights: int
    memory_rollout_copy: int
    memory_optimizer: int
    memory_activations: int
    memory_kv_cache: int

    @property
    def memory(self) -> int:
        """All of it."""
        sampling = self.memory_kv_cache
        training = self.memory_activations + self.memory_weights  # gradients
        kept = self.memory_weights + self.memory_rollout_copy + self.memory_optimizer
        return kept + max(sampling, training)


def make_plan(spec: Spec) -> Plan:
    """Check every name that the spec gives, and work out its sizes.

    Raises:
        GspoError: a model, task, rollout or option that doesn't exist.
    """
    settings = resolve_settings(spec.train_config(), spec.train)
    check_loggers(spec.logger)
    task = load_task(spec.task, spec.task_options) if spec.task else None
    if spec.rollout:
        check_rollout(spec.rollout)
    trust = spec.load.trust_remote_code
    config, parameters = _shape(spec.model, trust)
    text = config.get_text_config()
    limit = spec.max_tokens or (task.max_tokens if task else None)
    rows = min(512, spec.prompts * spec.completions)
    sequences = spec.prompts * spec.completions
    checkpointing = spec.load.activation_checkpointing
    row = spec.train.packed_sequence_length or row_budget(text, checkpointing)
    trained = parameters if spec.load.lora is None else parameters // 50
    return Plan(
        algorithm=settings.algorithm,
        clip_range=_clip_range(settings),
        parameters=parameters,
        learning_rate=spec.learning_rate
        or default_learning_rate(parameters, spec.load.lora is not None),
        chat_template=_has_template(spec.model, trust),
        sequences_per_step=sequences,
        sequences_per_update=-(-sequences // settings.minibatches),
        updates_per_step=settings.minibatches * spec.train.epochs,
        longest_completion=limit,
        row_tokens=row,
        memory_weights=4 * parameters,
        memory_rollout_copy=_COPY_BYTES[spec.load.rollout_dtype] * parameters,
        memory_optimizer=8 * trained,
        memory_activations=row * activation_bytes(text, checkpointing),
        memory_kv_cache=kv_bytes(rows, 2 * (limit or 256), text),
    )


def _clip_range(settings: Settings) -> tuple[float, float] | None:
    """Where ratios are clipped; None where the method clips no ratios."""
    objective = settings.objective
    if objective.surrogate != "clip":
        return None
    return 1 - objective.epsilon_low, 1 + objective.epsilon_high


def _has_template(name: str, trust_remote_code: bool) -> bool:
    """Whether the model's tokenizer has a chat template."""
    if name.startswith(PREFIX):
        return True
    tokenizer = read_tokenizer(resolve(name), trust_remote_code=trust_remote_code)
    return tokenizer.chat_template is not None


def _shape(name: str, trust_remote_code: bool) -> tuple[Any, int]:
    """The model's config and its number of parameters, without its weights."""
    from transformers import AutoModelForCausalLM

    if name.startswith(PREFIX):
        embedded_task(name)
        model = build_model(build_tokenizer(), 0)
    else:
        config = read_config(resolve(name), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.config, sum(p.numel() for p in model.parameters())
