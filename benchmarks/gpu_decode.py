"""Decoding on a GPU against the time that its memory needs to be read.

    python benchmarks/run.py gpu_decode          # --tiny: the same code on the CPU

8 prompts of 128 tokens x 8 completions of 256, dense 0.53B in bfloat16. `the other` is the floor:
for every decoded position all weights once, and the keys and values of every row so far, at the
bandwidth of the card's data sheet. The ratio is the share of that bandwidth which is reached. The
prefill is in the measured time and not in the floor.

Not run by the authors: no GPU was at hand.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import gpu
import run
from harness import stamp
from sides.forced import FORCED

from gspo.policy.precision import rollout_copy
from gspo.serve.engine import Request, SamplingParams
from gspo.serve.torch_engine import TorchEngine

PROMPTS, PROMPT, COMPLETIONS, LENGTH = 8, 128, 8, 256
_BYTES = 2  # bfloat16


def measure(repeats: int | None = None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """One row."""
    on = gpu.card(tiny=tiny)
    prompt, length = (4, 6) if tiny else (PROMPT, LENGTH)
    config = gpu.dense(tiny=tiny)
    engine = TorchEngine(rollout_copy(gpu.policy_of(config, on), "bfloat16"))
    params = SamplingParams(n=COMPLETIONS, max_tokens=length, **FORCED)
    rng = random.Random(0)
    requests = [
        Request(tuple(rng.randrange(config.vocab_size) for _ in range(prompt)), params)
        for _ in range(PROMPTS)
    ]
    rows = PROMPTS * COMPLETIONS

    def decode() -> None:
        done = engine.generate(requests)
        assert sum(len(c.token_ids) for own in done for c in own) == rows * length

    times = gpu.seconds(decode, on, repeats or 5)
    floor = bytes_read(config, rows, prompt, length) / on.bytes_per_s
    pairs = gpu.against_limit(times, floor)
    return [
        stamp(
            name="gpu_decode",
            what="dense 0.53B",
            shape=f"{PROMPTS} prompts of {prompt} x {COMPLETIONS} of {length}, bfloat16",
            other=f"memory floor at {on.bytes_per_s / 1e12:.3g} TB/s ({on.name})",
            **pairs.fields(),
            detail={"tokens_per_s": round(rows * length / pairs.fields()["ours_s"])},
            machine=gpu.machine_of(on),
            command="python benchmarks/run.py gpu_decode",
        ).as_dict()
    ]


def bytes_read(config: Any, rows: int, prompt: int, length: int) -> int:
    """Weights once a position, and the keys and values of every row before it."""
    width, head = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = 2 * width * heads * head + 2 * width * kv_heads * head
    layer += 3 * width * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * width
    positions = sum(prompt + at for at in range(1, length))
    kept = rows * positions * config.num_hidden_layers * 2 * kv_heads * head
    return _BYTES * (weights * (length - 1) + kept)


def main() -> None:
    """As `run.py gpu_decode`."""
    raise SystemExit(run.main(["gpu_decode", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
