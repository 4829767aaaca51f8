"""What exact mode costs: rollouts, a training step and the receipt, beside `exact=False`.

    python benchmarks/run.py exact

Both sides run in turns in one process on one thread, each with a model of its own and the same
weights: completions of a forced length are sampled, trained on with a learning rate near 0, and the
weights are proved to the engine. Seconds are of CPU time, so that other processes count little.
Before a figure is believed: exact mode's log-probs do not differ at all, and the others' do.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import run
import torch
from harness import Pairs, say, stamp
from prefix import choice
from sides.forced import FORCED
from transformers import LlamaConfig, LlamaForCausalLM

import gspo as art
from gspo.dev import InternalModelConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.policy.embedded import build_tokenizer
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.selfcheck import check_engine, make_exact
from gspo.serve.torch_engine import TorchEngine
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from gspo.weights.publisher import SharedMemory
from gspo.weights.receipt import Receipts

PARTS = ("rollout", "train", "receipt")


@dataclass(frozen=True)
class Case:
    """P prompts with G completions of a forced length each.

    Attributes:
        what: in words.
        model: `embedded:sort`, or the number of layers of a model of SmolLM2-135M's shape.
        goal: what the ratio of the whole is to be: 1 / the factor that exact mode may cost.
    """

    what: str
    model: str | int
    prompts: int
    prompt: int
    completions: int
    tokens: int
    goal: float

    @property
    def shape(self) -> str:
        """For the table."""
        layers = f", {self.model} layers" if isinstance(self.model, int) else ""
        size = f"{self.prompts} prompts of {self.prompt} x {self.completions} of {self.tokens}"
        return f"{size}{layers}, 1 thread"


def cases(tiny: bool = False) -> list[Case]:
    """The embedded MoE with short and with long completions, and a wide dense model."""
    if tiny:
        return [Case("embedded MoE, short", "embedded:sort", 2, 5, 3, 4, 0.89)]
    return [
        Case("embedded MoE, short", "embedded:sort", 32, 12, 16, 13, 0.89),
        Case("embedded MoE, long", "embedded:sort", 8, 66, 16, 200, 0.89),
        Case("SmolLM2's shape", 4, 2, 41, 8, 32, 0.93),
    ]


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """For each case a row of the whole, and one of rollouts and of training."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            row for case in cases(tiny) for row in _rows(case, _folder(case, folder), repeats or 5)
        ]


def _rows(case: Case, model: str, repeats: int) -> list[dict[str, Any]]:
    say(f"  {case.what}, {case.shape}")
    sides = {exact: Side(case, model, exact=exact) for exact in (True, False)}
    for exact, side in sides.items():
        _, gap = side.loop()
        assert (gap == 0) == exact, f"log-probs differ by {gap} with exact={exact}"
    seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(repeats):
        for exact in (True, False) if number % 2 == 0 else (False, True):
            seconds[exact].append(sides[exact].loop()[0])
    make = partial(stamp, name="exact", shape=case.shape, other="exact=False")
    rows = []
    for part, which in (("whole", PARTS), ("rollouts", PARTS[:1]), ("training", PARTS[1:2])):
        ours, other = (
            tuple(sum(taken[name] for name in which) for taken in seconds[exact])
            for exact in (True, False)
        )
        goal = case.goal if part == "whole" else None
        what, command = f"{case.what}: {part}", "python benchmarks/run.py exact"
        fields = Pairs(ours, other).fields()
        rows.append(make(what=what, goal=goal, command=command, **fields).as_dict())
    return rows


class Side:
    """A model with its engine and its trainer.

    Args:
        case, model: what it samples and trains, and with what.
        exact: with log-probs that are equal to the bit.
    """

    def __init__(self, case: Case, model: str, *, exact: bool):
        self._policy = load_policy(model, InternalModelConfig(threads=1))
        if isinstance(case.model, int):
            self._policy.entries = None  # the whole head, of which the tokenizer has few tokens
        choose_packing(self._policy)
        self._trainer = Trainer(self._policy)
        self._engine = TorchEngine(self._policy)
        check_engine(self._engine)
        if exact:
            make_exact(self._engine, required=True)
        self._receipts = Receipts(self._policy, self._policy, SharedMemory())
        rng = random.Random(0)
        size = min(self._policy.head.size, 100)
        params = SamplingParams(n=case.completions, max_tokens=case.tokens, **FORCED)
        self._requests = [
            Request(tuple(rng.randrange(6, size) for _ in range(case.prompt)), params)
            for _ in range(case.prompts)
        ]
        options = DevTrainConfig(algorithm="gspo", minibatches=1)
        self._settings = resolve(art.TrainConfig(learning_rate=1e-12), options)

    def loop(self) -> tuple[dict[str, float], float]:
        """Sample, train and prove once; seconds of `PARTS`, and the largest difference between the
        engine's log-probs and the trainer's."""
        began = time.process_time()
        self._receipts.publish(self._engine)
        published = time.process_time()
        answers = self._engine.generate(self._requests)
        sampled = time.process_time()
        groups = [
            art.TrajectoryGroup(
                art.Trajectory(
                    messages_and_choices=[
                        {"role": "user", "content": "?"},
                        choice(
                            list(request.prompt),
                            list(completion.token_ids),
                            list(completion.logprobs),
                            completion.policy_versions[0],
                        ),
                    ],
                    reward=float(number),
                )
                for number, completion in enumerate(answer)
            )
            for request, answer in zip(self._requests, answers, strict=True)
        ]
        batch = prepare(groups, context=self._policy.context)
        prepared = time.process_time()
        metrics = self._trainer.train(batch, self._settings).metrics.compute()
        trained = time.process_time()
        times = (sampled - published, trained - prepared, published - began)
        gap = metrics["mismatch/log_ratio_abs_max"]
        return dict(zip(PARTS, times, strict=True)), gap


def _folder(case: Case, folder: str) -> str:
    """The model: embedded, or random weights in a folder."""
    if isinstance(case.model, str):
        return case.model
    torch.manual_seed(0)
    path = Path(folder) / f"llama{case.model}"
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=case.model,
        vocab_size=49_152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def main() -> None:
    """As `run.py exact`."""
    raise SystemExit(run.main(["exact", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
