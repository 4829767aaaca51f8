"""One optimizer step of the trainer: default microbatches, 2,048 to 65,536 tokens, shared prompts.

Timed is `Trainer.train` of one minibatch, with bfloat16 weights and float32 masters: packing,
forward and backward pass, AdamW, and the metrics, as of any minibatch but a batch's first. The
samples' old log-probs are the policy's, of the same microbatches, and the learning rate is too
small to move a weight, so that nothing is clipped: `ok` says that `clip_fraction` is 0. `mfu` is
the share of the data sheet's bfloat16 rate, of operations that the method needs.

Beside it, each from a step of its own: seconds by phase, with waits between them; kernels,
launches and waits under torch.profiler; casts from one float type to another; peak memory, of
which `activations` is what the step adds to what lay there before, gradients of all trained weights
taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_parts import models
from gpu_parts.bench import Bench, free
from gpu_parts.profiling import Casts, host_share, phases, profiled
from gspo.config import TrainConfig
from gspo.dev import LoraConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.train.minibatches import RolloutBatch, activation_bytes
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer

KINDS = {"dense": models.dense, "MoE": models.moe, "Gemma": models.gemma}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": LoraConfig()},
    "checkpointing": {"activation_checkpointing": True},
    "LoRA, checkpointing": {"lora": LoraConfig(), "activation_checkpointing": True},
}
ORDER = (
    ("dense", "full"),
    ("MoE", "full"),
    ("dense", "checkpointing"),
    ("Gemma", "LoRA, checkpointing"),
    ("dense", "LoRA"),
    ("MoE", "LoRA"),
    ("MoE", "checkpointing"),
)
SHARING = ORDER[0]
"""Where a prompt that is shared is measured against one that is not."""
LENGTHS = (8192, 16_384, 32_768, 2048)
"""Full training has all four. With LoRA and checkpointing the last two tell little more."""
LONG = (65_536, 16_384)
"""With checkpointing: the rows that do not fit without it."""
LONGEST = 163_840
"""Of Gemma's shape: timed once and not profiled, since a step takes seconds."""
STANDING = 1e-12
"""A learning rate that moves no float32 weight."""
SAME = 0.05
"""By how much gradient norms may differ that are equal but for bfloat16's rounding."""


def measure(bench: Bench) -> None:
    """What tells most comes first: a part that runs out of time leaves out the end."""
    for kind, mode in ORDER:
        trainer = None
        with bench.row(f"{kind}, {mode}: load") as row:
            config = KINDS[kind](tiny=bench.tiny)
            trainer = _load(bench, row, config, MODES[mode])
        for what, batch, changes in _work(bench, trainer, kind, mode):
            with bench.row(f"{kind}, {mode}, {what}") as row:
                _step(bench, row, trainer, batch, changes)
        if (kind, mode) == SHARING:
            _same_gradient(bench)
        del trainer
        free()


def _same_gradient(bench: Bench) -> None:
    """A prompt that is computed once, and once for each sample: the gradient's norm is the same."""
    with bench.row("gradient norms, shared prompts or not") as row:
        one, two = (other["grad_norm"] for other in bench.rows if "shared: " in other["what"])
        row["gap"] = abs(one / two - 1)
        row["ok"] = row["gap"] < SAME


def _load(bench: Bench, row: dict[str, Any], config: Any, options: dict[str, Any]) -> Trainer:
    made: list[Trainer] = []

    def load() -> None:
        made.append(Trainer(models.policy_of(config, bench.card, **options)))

    times = bench.time(load, repeats=1, warmup=0)
    policy = made[0].policy
    row |= {
        "seconds": times["median_s"],
        "includes": "weights drawn on the device; the probe of the packing, with its compiling",
        "packing": policy.packing,
        "parameters": sum(p.numel() for p in policy.lm.parameters()),
        "trained": sum(p.numel() for p in policy.trainable.values()),
    }
    return made[0]


def _work(
    bench: Bench, trainer: Trainer | None, kind: str, mode: str
) -> Iterator[tuple[str, RolloutBatch, dict[str, Any]]]:
    """Yield for each row of results: what is computed, its batch, and the options of the step."""
    if trainer is None:
        return
    policy = trainer.policy
    if mode == "full" or (kind, mode) == ("dense", "LoRA"):
        sizes = bench.size((4, 4, 128, 256), (2, 2, 8, 24))
        yield "default microbatches", models.make_batch(policy, **_sizes(*sizes)), {}
    lengths = LENGTHS if mode == "full" else LENGTHS[:2]
    lengths = (lengths[0], LONGEST) if kind == "Gemma" else lengths
    lengths = LONG if mode == "checkpointing" else lengths
    for length in bench.size(lengths, (64, 32)):
        size = min(1024, length // 4)
        batch = models.make_batch(policy, **_sizes(length // size, 1, size // 8, size - size // 8))
        yield f"microbatch of {length}", batch, {"packed_sequence_length": length}
    if (kind, mode) == SHARING:
        sizes = bench.size((1, 8, 4096, 512), (1, 4, 32, 8))
        batch = models.make_batch(policy, **_sizes(*sizes))
        budget = 2 * (sizes[2] + sizes[3])
        for share in (True, False):
            options = {"packed_sequence_length": budget, "share_prefixes": share}
            yield f"prompt of {sizes[2]} x {sizes[1]}, shared: {share}", batch, options


def _sizes(groups: int, size: int, prompt: int, completion: int) -> dict[str, int]:
    return {"groups": groups, "size": size, "prompt": prompt, "completion": completion}


def _step(
    bench: Bench,
    row: dict[str, Any],
    trainer: Trainer | None,
    batch: RolloutBatch,
    options: dict[str, Any],
) -> None:
    assert trainer is not None
    policy, card = trainer.policy, bench.card
    settings = resolve(
        TrainConfig(learning_rate=STANDING),
        DevTrainConfig(importance_sampling_level="sequence", minibatches=1, **options),
    )
    trainer.optimizer.clear()  # a row that failed may have left gradients
    batch = models.with_logprobs(batch, trainer.train(batch, settings))
    metrics: dict[str, float] = {}

    def step() -> None:
        out = trainer.train(batch, settings)
        assert out.updates == 1, out.skipped
        metrics.update(out.metrics.compute())

    longest = options.get("packed_sequence_length") == LONGEST
    row |= bench.time(step, repeats=1 if longest else 3)
    row["clip_fraction"] = metrics["ratio/clip_fraction"]
    row["grad_norm"] = metrics["optim/grad_norm"]
    row["ok"] = row["clip_fraction"] == 0
    before = card.memory()["now"]
    card.reset_peak()
    with phases(card) as measured:
        step()
    peak = card.memory()["peak"]
    microbatches = measured["microbatches"]
    tokens = sum(microbatch.token_count for microbatch in microbatches)
    row |= {
        "microbatches": len(microbatches),
        "tokens": tokens,
        "largest_microbatch": max(microbatch.token_count for microbatch in microbatches),
        "sample_tokens": sum(microbatch.sample_tokens for microbatch in microbatches),
        "tokens_per_s": tokens / row["median_s"],
        "microbatch_tokens": policy.microbatch_tokens,
    }
    row |= _rates(bench, row["median_s"], models.step_flops(policy, microbatches))
    row["memory"] = _memory(trainer, before, peak, row["largest_microbatch"])
    row["phases_s"] = measured["seconds"]
    if longest:
        return
    row["profile"] = profiled(step, card)
    if policy.packing != "flex":  # torch compiles that kernel anew under any mode, and fails
        with Casts(policy) as casts:
            step()
        row["casts"] = {"count": casts.count, "elements": casts.elements, "weights": casts.weights}
    row["host_share"] = host_share(row["profile"], row["median_s"])


def _rates(bench: Bench, seconds: float, flops: dict[str, float]) -> dict[str, Any]:
    total = sum(flops.values())
    peak = bench.card.flops
    return {
        "flops": flops,
        "tflops_per_s": total / seconds / 1e12,
        "mfu": None if peak is None else total / seconds / peak,
    }


def _memory(
    trainer: Trainer, before: int | None, peak: int | None, largest: int
) -> dict[str, int | None]:
    """Bytes; `estimated` is what gspo would count on for the largest microbatch on a CPU."""
    policy = trainer.policy
    gradients = sum(4 * p.numel() for p in policy.trainable.values())  # in float32
    config = policy.lm.config.get_text_config()
    added = None if before is None or peak is None else peak - before
    return {
        "before": before,
        "peak": peak,
        "gradients": gradients,
        "activations": None if added is None else added - gradients,
        "estimated": largest * activation_bytes(config, policy.checkpointing),
    }
