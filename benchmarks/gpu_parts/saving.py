"""A checkpoint in bytes and seconds, and how long new weights take to reach the engine's copy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gpu_parts import models
from gpu_parts.bench import Bench, free
from gpu_parts.training import KINDS, MODES, STANDING
from gspo.config import TrainConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.train.checkpoint import verify_checkpoint
from gspo.train.checkpoint_writer import CheckpointWriter
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from gspo.weights.rollout_copy import RoundedCopy


def measure(bench: Bench) -> None:
    """The dense model fully trained, then with LoRA; the MoE's copy if time is left."""
    for mode in ("full", "LoRA"):
        policy = trainer = None
        with bench.row(f"dense, {mode}: one update") as row:
            policy = models.policy_of(KINDS["dense"](tiny=bench.tiny), bench.card, **MODES[mode])
            trainer = _updated(Trainer(policy))
            row["parameters"] = sum(p.numel() for p in policy.lm.parameters())
        if trainer is None:
            continue
        with bench.row(f"dense, {mode}: publish to a bfloat16 copy") as row:
            row |= _published(bench, trainer)
        with bench.row(f"dense, {mode}: checkpoint") as row:
            row |= _saved(bench, trainer)
        del policy, trainer
        free()
    with bench.row("MoE, full: publish to a bfloat16 copy") as row:
        policy = models.policy_of(KINDS["MoE"](tiny=bench.tiny), bench.card)
        row |= _published(bench, Trainer(policy))


def _updated(trainer: Trainer) -> Trainer:
    """After one optimizer step: AdamW's moments are there."""
    batch = models.make_batch(trainer.policy, groups=2, size=2, prompt=8, completion=24)
    options = DevTrainConfig(importance_sampling_level="sequence", minibatches=1)
    trainer.train(batch, resolve(TrainConfig(learning_rate=STANDING), options))
    return trainer


def _published(bench: Bench, trainer: Trainer) -> dict[str, Any]:
    """`median_s` is what each update costs; `first_s` what making the copy took."""
    policy = trainer.policy
    made = []
    first = bench.time(lambda: made.append(RoundedCopy(policy, "bfloat16")), repeats=1, warmup=0)
    (copy,) = made
    times = bench.time(lambda: copy.publish(policy), repeats=5, warmup=1)
    size = sum(p.numel() * p.itemsize for p in copy.policy.lm.parameters())
    return times | {"first_s": first["median_s"], "bytes": size}


def _saved(bench: Bench, trainer: Trainer) -> dict[str, Any]:
    """Once, to the folder of temporary files: weights, AdamW's moments and their digests; then
    read again and compared, as a resume does. Files may still be in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        made: list[Path] = []

        def save() -> None:
            writer = CheckpointWriter()
            made.append(writer.save(Path(folder), trainer))
            writer.wait()

        times = bench.time(save, repeats=1, warmup=0)
        (target,) = made
        files = {path.name: path.stat().st_size for path in target.iterdir()}
        verified = bench.time(lambda: verify_checkpoint(target), repeats=1, warmup=0)
    total = sum(files.values())
    return {
        "seconds": times["median_s"],
        "verify_s": verified["median_s"],
        "bytes": total,
        "gb_per_s": total / times["median_s"] / 1e9,
        "files": files,
    }
