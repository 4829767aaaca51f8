"""What several tests build: choices, trajectories and samples without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from openai.types.chat.chat_completion import Choice
from torch import Tensor

import gspo as art
from gspo.kernels import hf
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.app import create_app, one_engine
from gspo.serve.engine import Engine
from gspo.train.checkpoint import begin_checkpoint
from gspo.train.expert_replay import ExpertReplay
from gspo.train.minibatches import RolloutBatch
from gspo.train.observe import Observer
from gspo.train.settings import Settings
from gspo.train.trainer import Call, Trainer


def choice(
    tokens: Sequence[int],
    prompt: Sequence[int] = (1, 2, 3),
    logprobs: Sequence[float] | None = None,
    **extra: Any,
) -> Choice:
    """A Choice as gspo's server returns it."""
    fields = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "x"},
        "token_ids": list(tokens),
        "prompt_token_ids": list(prompt),
        "token_logprobs": [-1.0] * len(tokens) if logprobs is None else list(logprobs),
        "temperature": 1.0,
        "policy_version": 0,
    }
    return Choice.model_validate(fields | extra)


def trajectory(reward: float = 0.0, *choices: Choice) -> art.Trajectory:
    """A trajectory of the given turns."""
    items: list[Any] = [{"role": "user", "content": "?"}, *(choices or (choice([4, 5]),))]
    return art.Trajectory(messages_and_choices=items, reward=reward)


def recompute_layers(policy: Policy) -> None:
    """What loading does with `activation_checkpointing`."""
    hf.recompute_layers(policy.lm, policy.routers.recompute)


def random_groups(
    policy: Policy, *, groups: int = 3, size: int = 4, seed: int = 0, temperature: float = 1.0
) -> list[art.TrajectoryGroup]:
    """Groups of random tokens with random old log-probs: off-policy, lengths all different."""
    rng = random.Random(seed)
    vocabulary = policy.head.weight.shape[0]

    def one() -> art.Trajectory:
        prompt = [rng.randrange(6, vocabulary) for _ in range(rng.randint(1, 9))]
        tokens = [rng.randrange(6, vocabulary) for _ in range(rng.randint(1, 20))]
        logprobs = [-rng.uniform(0.1, 9.0) for _ in tokens]
        return trajectory(rng.random(), choice(tokens, prompt, logprobs, temperature=temperature))

    return [art.TrajectoryGroup([one() for _ in range(size)]) for _ in range(groups)]


def embedded(name: str = "embedded:sort", **config: Any) -> Policy:
    """An embedded model, ready for the trainer."""
    policy = load_policy(name, art.dev.InternalModelConfig(**config))
    choose_packing(policy)
    return policy


def save_checkpoint(folder: Path, trainer: Trainer) -> Path:
    """Write a checkpoint of what is now, and return when it is there."""
    target, write = begin_checkpoint(folder, trainer, copied=False)
    write()
    return target


def gradient_of(
    policy: Policy, batch: RolloutBatch, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradient and metrics of the whole batch as one optimizer step, which is not taken."""
    batch = batch if settings.preset.counts_flat else batch.with_signal()
    watch = Observer(policy, batch)
    experts = ExpertReplay(policy, settings, watch.metrics)
    call = Call(settings, [batch.samples], experts, watch)
    assert Trainer(policy).gradient(batch.samples, call)
    gradient = {n: p.grad for n, p in policy.trainable.items() if p.grad is not None}
    policy.lm.zero_grad(set_to_none=True)
    return gradient, watch.metrics.compute()


def app_of(engine: Engine) -> FastAPI:
    """A server's app with one model, `m`."""
    return create_app(one_engine(engine, lambda: ["m"]), lambda: ["m"])
