"""Model FLOPs utilisation of the training step on a GPU, dense and MoE.

    python benchmarks/run.py gpu_train           # --tiny: the same code on the CPU

One optimizer step through `Trainer.train` on 8,192 packed tokens (8 samples of 128 + 896), bfloat16
compute with float32 weights. `the other` is the time that the card's data sheet allows for the
counted FLOPs, so that the ratio is the MFU. FLOPs are the model's (see `model_flops`): what is
computed twice, such as the vocabulary projection in the backward pass, is not counted twice.

Not run by the authors: no GPU was at hand.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import gpu
import run
from harness import stamp

from gspo.config import TrainConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.train.rollouts import RolloutBatch
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer

SAMPLES, PROMPT, COMPLETION = 8, 128, 896
DENSE_GOAL = 0.45


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """A row for the dense model and one for the MoE."""
    on = gpu.card(tiny=tiny)
    models = (
        ("dense, 0.53B", gpu.dense(tiny=tiny), DENSE_GOAL),
        ("MoE, 1.1B", gpu.moe(tiny=tiny), None),
    )
    return [_row(what, config, goal, on, repeats or 10, tiny) for what, config, goal in models]


def _row(
    what: str, config: Any, goal: float | None, on: gpu.Card, repeats: int, tiny: bool
) -> dict[str, Any]:
    prompt, completion = (4, 12) if tiny else (PROMPT, COMPLETION)
    trainer = Trainer(gpu.policy_of(config, on))
    batch = make_batch(trainer, prompt, completion)
    settings = resolve(
        TrainConfig(learning_rate=1e-6),
        DevTrainConfig(
            importance_sampling_level="sequence",
            minibatches=1,
            packed_sequence_length=SAMPLES * (prompt + completion),
        ),
    )

    def step() -> None:
        assert trainer.train(batch, settings).updates == 1

    times = gpu.seconds(step, on, repeats)
    flops = gpu.model_flops(config, [prompt + completion] * SAMPLES, SAMPLES * completion)
    return stamp(
        name="gpu_train",
        what=what,
        shape=f"{SAMPLES} samples of {prompt} + {completion}, one optimizer step, bfloat16",
        other=f"{flops:.3g} FLOPs at {on.flops / 1e12:.0f} TFLOP/s ({on.name})",
        **gpu.against_limit(times, flops / on.flops).fields(),
        goal=goal,
        detail={"flops": flops, "tokens": SAMPLES * (prompt + completion)},
        machine=gpu.machine_of(on),
        command="python benchmarks/run.py gpu_train",
    ).as_dict()


def make_batch(trainer: Trainer, prompt: int, completion: int) -> RolloutBatch:
    """Samples of random tokens; no two have a prompt in common."""
    rng = random.Random(0)
    policy = trainer.policy
    vocabulary = policy.head.weight.shape[0]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    samples = [gpu.sample(tokens(prompt), tokens(completion), i, policy) for i in range(SAMPLES)]
    return RolloutBatch(
        samples=tuple((own,) for own in samples),
        groups=(0,) * SAMPLES,
        rewards=tuple(float(own.advantage) for own in samples),
        dropped=0,
    )


def main() -> None:
    """As `run.py gpu_train`."""
    raise SystemExit(run.main(["gpu_train", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
