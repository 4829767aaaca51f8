"""One registered model: its run, engine and trainer, and a training step from end to end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI

from gspo.backend.base import TrainResult
from gspo.backend.replay import UpdateRecord
from gspo.backend.run import Run
from gspo.dev import InternalModelConfig
from gspo.policy.load import Policy, load_policy
from gspo.policy.precision import RolloutPolicy, refresh
from gspo.policy.probe import choose_packing
from gspo.serve.batcher import Batcher
from gspo.serve.server import PortServer
from gspo.serve.torch_engine import TorchEngine
from gspo.timing import timed
from gspo.train.checkpoint import (
    checkpoint_name,
    load_trainer_state,
    save_checkpoint,
    steps_saved,
    understood,
    verify_checkpoint,
)
from gspo.train.rollouts import RolloutBatch
from gspo.train.settings import Settings
from gspo.train.trainer import Trainer
from gspo.trajectory import TrajectoryGroup

log = logging.getLogger("gspo")


@dataclass
class Service:
    """A registered trainable model.

    Engine and trainer share one copy of the weights, unless `rollout_dtype` gives the engine
    its own.
    """

    run: Run
    base_model: str
    engine: TorchEngine
    trainer: Trainer
    batcher: Batcher
    client: AsyncOpenAI
    server: PortServer | None

    def train(
        self,
        groups: Sequence[TrajectoryGroup],
        batch: RolloutBatch,
        settings: Settings,
        keep_checkpoints: int | None,
    ) -> TrainResult:
        """Update, log, save. Blocking; `groups` are those that `batch` was made of."""
        record = self._record(settings)
        self.run.trackers.configure("train", settings.as_config())
        try:
            out = self.trainer.train(batch, settings)
        finally:
            # Also after a NumericsError: earlier minibatches have moved the weights by then.
            published = self._publish()
        step = self.trainer.step
        metrics = {f"train/{name}": value for name, value in means(groups).items()}
        metrics |= out.metrics.compute()
        metrics["time/publish"] = published
        if metrics["time/train"] > 0:
            rate = metrics.get("tokens/trained", 0.0) / metrics["time/train"]
            metrics["throughput/trained_tokens_per_second"] = rate
        if out.skipped is not None:
            metrics["train/skipped"] = 1.0
            log.warning("step %d of %s is skipped: %s", step, self.run.folder, out.skipped)
        started = time.perf_counter()
        with self.run.writing():
            # Logged before the checkpoint: a resume drops the lines beyond the step that it finds.
            try:
                self.run.log(step, metrics)
                advantages = _advantages(groups, batch)
                self.run.log_trajectories(groups, "train", step, advantages, out.traces, record)
            finally:  # whatever became of the log: the weights have moved
                path = save_checkpoint(self.run.checkpoints, self.trainer)
            if keep_checkpoints is not None:
                saved = steps_saved(self.run.checkpoints)
                self.run.delete_checkpoints(set(saved[-keep_checkpoints:]))
            metrics["time/checkpoint"] = time.perf_counter() - started
            self.run.log(step, {"time/checkpoint": metrics["time/checkpoint"]})
        return TrainResult(step, metrics, path, out.skipped)

    def _record(self, settings: Settings) -> UpdateRecord:
        policy = self.trainer.policy
        dtype = str(policy.compute_dtype).removeprefix("torch.")
        return UpdateRecord.of(
            settings, version=policy.version, context=policy.context, dtype=dtype
        )

    @timed("publish")
    def _publish(self) -> float:
        """Give the engine's copy, where it has one, the trainer's weights; seconds it took."""
        started = time.perf_counter()
        if isinstance(self.engine.policy, RolloutPolicy):
            refresh(self.engine.policy, self.trainer.policy)
        return time.perf_counter() - started


def load_trainer(run: Run, base_model: str, config: InternalModelConfig) -> Trainer:
    """Weights, optimizer and step of the run's last checkpoint, or of the base model.

    Raises:
        ModelError: the base model cannot be loaded.
        CheckpointError: the checkpoint is damaged.
    """
    saved = steps_saved(run.checkpoints)
    checkpoint = run.checkpoints / checkpoint_name(saved[-1]) if saved else None
    if checkpoint is None:
        policy = load_policy(base_model, config)
    else:
        verify_checkpoint(checkpoint)
        with understood(checkpoint, "the model"):
            policy = load_policy(base_model, config, checkpoint=checkpoint)
    choose_packing(policy)

    def load_reference() -> Policy:
        frozen = load_policy(base_model, config)
        frozen.packing, frozen.shares_prefixes = policy.packing, policy.shares_prefixes
        frozen.lm.requires_grad_(False)
        return frozen

    trainer = Trainer(policy, load_reference)
    if checkpoint is not None:
        load_trainer_state(checkpoint, trainer)
        log.info("%s goes on from step %d", run.folder, trainer.step)
    run.forget_after(trainer.step)
    return trainer


def means(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Mean reward, the means of the metrics that rollouts gave, and how many failed."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for trajectory in group:
            for name, value in {"reward": trajectory.reward, **trajectory.metrics}.items():
                values.setdefault(name, []).append(float(value))
    out = {name: sum(items) / len(items) for name, items in values.items()}
    if groups:
        out["exceptions"] = float(sum(len(group.exceptions) for group in groups))
    return out


def _advantages(groups: Sequence[TrajectoryGroup], batch: RolloutBatch) -> list[list[float | None]]:
    """A_i of each trajectory, None for one that was dropped."""
    known = {samples[0].trajectory_id: samples[0].advantage for samples in batch.samples}
    out, number = [], 0
    for group in groups:
        out.append([known.get(number + i) for i in range(len(group))])
        number += len(group)
    return out
