"""What computing a shared prompt once saves in training, on a GPU.

    python benchmarks/run.py gpu_shared_prompt   # --tiny: the same code on the CPU

One group of 8 completions of 512 tokens behind one prompt of 4,096: an optimizer step through
`Trainer.train` with `share_prefixes` on and off, in turns in one process, rows of the same token
budget. Both sides get the same loss (checked). Counted in tokens, 36,864 against 8,192: 4.5 times.

Not run by the authors: no GPU was at hand.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import gpu
import run
from harness import Unavailable, paired, stamp

from gspo.config import TrainConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.train.rollouts import RolloutBatch
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer

GROUP, PROMPT, COMPLETION = 8, 4096, 512


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """One row.

    Raises:
        Unavailable: no CUDA device, or this version of gspo cannot share prompts.
    """
    on = gpu.card(tiny=tiny)
    if "share_prefixes" not in DevTrainConfig.model_fields:
        raise Unavailable("this version of gspo has no dev.TrainConfig(share_prefixes=...)")
    prompt, completion = (32, 8) if tiny else (PROMPT, COMPLETION)
    config = gpu.dense(tiny=tiny)
    trainer = Trainer(gpu.policy_of(config, on))
    batch = make_batch(trainer, prompt, completion)
    losses: dict[bool, float] = {}

    def side(share: bool) -> Callable[[], None]:
        options: dict[str, Any] = {"share_prefixes": share}
        settings = resolve(
            TrainConfig(learning_rate=1e-9),  # both sides stay at the same weights
            DevTrainConfig(
                importance_sampling_level="sequence",
                minibatches=1,
                packed_sequence_length=2 * (prompt + completion),
                **options,
            ),
        )

        def step() -> None:
            out = trainer.train(batch, settings)
            gpu.synchronize(on)
            losses[share] = out.metrics.compute()["loss/policy"]

        return step

    pairs = paired(side(True), side(False), repeats=repeats or 7, warmup=2)
    gap = abs(losses[True] - losses[False])
    assert gap < 1e-2, f"the losses differ by {gap:.2g}"
    return [
        stamp(
            name="gpu_shared_prompt",
            what="one group, dense 0.53B",
            shape=f"prompt of {prompt}, {GROUP} completions of {completion}, bfloat16",
            other="share_prefixes=False",
            **pairs.fields(),
            detail={"loss_gap": gap},
            machine=gpu.machine_of(on),
            command="python benchmarks/run.py gpu_shared_prompt",
        ).as_dict()
    ]


def make_batch(trainer: Trainer, prompt: int, completion: int) -> RolloutBatch:
    """One group behind one prompt."""
    rng = random.Random(0)
    vocabulary = trainer.policy.head.weight.shape[0]
    shared = [rng.randrange(vocabulary) for _ in range(prompt)]
    samples = [
        gpu.sample(
            shared, [rng.randrange(vocabulary) for _ in range(completion)], i, trainer.policy
        )
        for i in range(GROUP)
    ]
    return RolloutBatch(
        samples=tuple((own,) for own in samples),
        groups=(0,) * GROUP,
        rewards=tuple(float(own.advantage) for own in samples),
        dropped=0,
    )


def main() -> None:
    """As `run.py gpu_shared_prompt`."""
    raise SystemExit(run.main(["gpu_shared_prompt", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
