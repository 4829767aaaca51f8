"""Training with shared prompts computed once, against without: the same step, on the CPU.

    python benchmarks/run.py prefix

One optimizer step of `Trainer.train` with `share_prefixes` on and off, in turns in one process, on
the embedded MoE with a longer context. Microbatches have the default token budget; each of two
threads computes one.
Before a figure is believed: same loss, same gradient, same number of trained tokens.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import run
import torch
from harness import paired, say, stamp
from openai.types.chat.chat_completion import Choice
from torch import Tensor
from trl_jobs import long_embedded

import gspo as art
from gspo.dev import InternalModelConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.old_logprobs import with_trainer_logprobs
from gspo.train.settings import Settings, resolve
from gspo.train.trainer import Trainer

CONTEXT = 2048
LOSS_GAP, GRADIENT_GAP = 1e-6, 1e-3
"""What both sides may differ by; the gradients' difference in norm, relative to the gradient's."""


@dataclass(frozen=True)
class Case:
    """Groups of G trajectories behind a prompt each.

    A trajectory has several turns of `thought` + `answer` sampled tokens. The next turn's prompt
    holds the answer and what the user says then, but not the thought, as chat templates of
    reasoning models leave it out. So each turn is a sample of its own.

    Attributes:
        what: in words.
        user: tokens of the user between two turns.
        goal: the ratio that is aimed at.
    """

    what: str
    groups: int
    size: int
    prompt: int
    answer: int
    turns: int = 1
    thought: int = 0
    user: int = 0
    goal: float | None = None
    threads: int = 2

    @property
    def shape(self) -> str:
        """For the table."""
        sampled = f"{self.thought} + {self.answer}" if self.thought else f"{self.answer}"
        turns = f" x {self.turns} turns" if self.turns > 1 else ""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        size = f"{self.groups} groups: a prompt of {self.prompt:,} x {self.size}{turns}"
        return f"{size} of {sampled}, {threads}"


def cases(tiny: bool = False) -> list[Case]:
    """One turn behind a long prompt, and an agent's many turns."""
    if tiny:
        return [
            Case("one long prompt", 2, 3, prompt=24, answer=4, threads=1),
            Case("turns", 2, 2, prompt=8, answer=3, turns=3, thought=2, user=2, threads=1),
        ]
    return [
        Case("one long prompt", 2, 16, prompt=1024, answer=64, goal=8),
        Case("turns", 2, 8, prompt=256, answer=32, turns=6, thought=32, user=16),
    ]


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        model = long_embedded(Path(folder), CONTEXT)
        return [_row(case, model, repeats or 5) for case in cases(tiny)]


def _row(case: Case, model: Path, repeats: int) -> dict[str, Any]:
    say(f"  {case.what}, {case.shape}")
    policy = load_policy(str(model), InternalModelConfig(threads=case.threads))
    choose_packing(policy)
    assert policy.shares_prompts, "this model does not share prompts"
    trainer = Trainer(policy)
    batch = make_batch(case, policy)
    on, off = settings(share=True), settings(share=False)
    detail = check(observed(trainer, batch, on), observed(trainer, batch, off))
    pairs = paired(step(trainer, batch, on), step(trainer, batch, off), repeats=repeats)
    return stamp(
        name="prefix",
        what=case.what,
        shape=case.shape,
        other="share_prefixes=False",
        **pairs.fields(),
        goal=case.goal,
        detail=detail,
        command="python benchmarks/run.py prefix",
    ).as_dict()


def settings(*, share: bool) -> Settings:
    """One update of the whole batch, so small that both sides stay at the same weights."""
    options = DevTrainConfig(algorithm="gspo", minibatches=1, share_prefixes=share)
    return resolve(art.TrainConfig(learning_rate=1e-12), options)


def step(trainer: Trainer, batch: RolloutBatch, chosen: Settings) -> Callable[[], None]:
    """What is timed: packing, forward, backward and the optimizer, as `model.train` calls it."""

    def call() -> None:
        assert trainer.train(batch, chosen).updates == 1

    return call


@dataclass(frozen=True)
class Observed:
    """A step's metrics, and the gradient that it left to the optimizer."""

    metrics: dict[str, float]
    gradient: dict[str, Tensor]


def observed(trainer: Trainer, batch: RolloutBatch, chosen: Settings) -> Observed:
    """One step, with its gradient copied before it is clipped."""
    gradient: dict[str, Tensor] = {}
    update = trainer.optimizer.step

    def watched(*arguments: Any) -> float:
        for name, parameter in trainer.policy.trainable.items():
            if parameter.grad is not None:
                gradient[name] = parameter.grad.clone()
        return update(*arguments)

    with mock.patch.object(trainer.optimizer, "step", watched):
        metrics = trainer.train(batch, chosen).metrics.compute()
    return Observed(metrics, gradient)


def check(on: Observed, off: Observed) -> dict[str, Any]:
    """What both sides agree on, and the tokens that each computed.

    Raises:
        AssertionError: they do not agree.
    """
    trained = [side.metrics["tokens/trained"] for side in (on, off)]
    assert trained[0] == trained[1], f"trained on {trained[0]:.0f} and {trained[1]:.0f} tokens"
    loss_gap = abs(on.metrics["loss/policy"] - off.metrics["loss/policy"])
    assert loss_gap <= LOSS_GAP, f"the losses differ by {loss_gap:.2g}"
    assert on.gradient.keys() == off.gradient.keys(), "gradients of different parameters"
    gap = _norm([on.gradient[name] - own for name, own in off.gradient.items()])
    gap /= _norm(list(off.gradient.values()))
    assert gap <= GRADIENT_GAP, f"the gradients differ by {gap:.2g} of their norm"
    computed = [side.metrics["tokens/computed"] for side in (on, off)]
    return {
        "trained_tokens": trained[0],
        "computed_tokens": {"ours": computed[0], "other": computed[1]},
        "tokens_ratio": computed[1] / computed[0],
        "loss_gap": loss_gap,
        "gradient_gap": gap,
    }


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def make_batch(case: Case, policy: Policy) -> RolloutBatch:
    """Random tokens with the policy's own log-probs: no sequence is clipped."""
    rng = random.Random(0)
    groups = [
        art.TrajectoryGroup([_trajectory(case, prompt, rng) for _ in range(case.size)])
        for prompt in (_tokens(case.prompt, rng) for _ in range(case.groups))
    ]
    batch = prepare(groups, context=policy.context)
    scored = with_trainer_logprobs(
        policy, batch.samples, resolve(options=art.dev.TrainConfig(share_prefixes=False))
    )
    samples = [
        tuple(dataclasses.replace(own, sampling_logprobs=own.old_logprobs) for own in trajectory)
        for trajectory in scored
    ]
    return dataclasses.replace(batch, samples=tuple(samples))


def _trajectory(case: Case, prompt: list[int], rng: random.Random) -> art.Trajectory:
    history, choices = list(prompt), []
    for _ in range(case.turns):
        thought, answer = _tokens(case.thought, rng), _tokens(case.answer, rng)
        choices.append(choice(history, [*thought, *answer]))
        history = [*history, *answer, *_tokens(case.user, rng)]
    asked: Any = {"role": "user", "content": "?"}
    return art.Trajectory(messages_and_choices=[asked, *choices], reward=rng.random())


def choice(
    prompt: list[int], tokens: list[int], logprobs: list[float] | None = None, version: int = 0
) -> Choice:
    """As gspo's server returns it."""
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "x"},
            "token_ids": tokens,
            "prompt_token_ids": prompt,
            "token_logprobs": logprobs or [-1.0] * len(tokens),
            "temperature": 1.0,
            "policy_version": version,
        }
    )


def _tokens(count: int, rng: random.Random) -> list[int]:
    return [rng.randint(6, 100) for _ in range(count)]


def main() -> None:
    """As `run.py prefix`."""
    raise SystemExit(run.main(["prefix", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
