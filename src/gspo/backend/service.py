"""One registered model: its run, engine and trainer, and a training step from end to end."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ParamSpec

from openai import AsyncOpenAI

from gspo.backend.base import ModelLike, TrainResult
from gspo.backend.measured import best_step, check_logged, means
from gspo.backend.replay import UpdateRecord
from gspo.backend.run import Run
from gspo.core.draws import seed_of
from gspo.core.errors import RunError
from gspo.core.timing import timed
from gspo.data.check import plain_groups
from gspo.dev import InternalModelConfig
from gspo.policy.load import load_policy
from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from gspo.serve.batcher import Batcher
from gspo.serve.server import PortServer
from gspo.serve.torch_engine import TorchEngine
from gspo.train.checkpoint import (
    checkpoint_name,
    load_trainer_state,
    save_checkpoint,
    steps_saved,
    understood,
    verify_checkpoint,
)
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import Settings
from gspo.train.trainer import Trainer, TrainOutput
from gspo.trajectory import TrajectoryGroup
from gspo.weights.rollout_copy import RolloutPolicy, refresh

P = ParamSpec("P")

log = logging.getLogger("gspo")


@dataclass
class Service:
    """A registered trainable model.

    Engine and trainer share one copy of the weights, unless `rollout_dtype` gives the engine
    its own. `seed` is the backend's, of requests that have none.
    """

    run: Run
    base_model: str
    config: InternalModelConfig
    seed: int
    engine: TorchEngine
    trainer: Trainer
    batcher: Batcher
    client: AsyncOpenAI
    server: PortServer | None

    def check_same(self, model: ModelLike) -> None:
        """Refuse this model's name for another model, or for one that is loaded otherwise.

        Raises:
            RunError: what differs.
        """
        loaded = {"base_model": self.base_model, **self.config.model_dump()}
        wanted = {"base_model": model.source, **model.internal_config.model_dump()}
        for name, value in loaded.items():
            if wanted[name] != value:
                raise RunError(
                    f"model {model.name!r} of project {model.project!r} is registered with "
                    f"{name} {value!r}, not {wanted[name]!r}: give one of the two another name"
                )

    def checked(
        self, trajectory_groups: Any, settings: Settings
    ) -> tuple[list[TrajectoryGroup], RolloutBatch]:
        """The groups with plain values, and the batch to be trained on.

        Raises:
            DataError: anything that could not be trained on, or not be written afterwards.
        """
        groups = plain_groups(trajectory_groups)
        policy = self.trainer.policy
        batch = prepare(
            groups,
            context=policy.context,
            vocabulary=policy.head.size,
            advantage=settings.advantage,
            overlong=settings.overlong,
            drop_too_long=settings.options.on_too_long == "drop",
        )
        return groups, batch

    def train(
        self,
        groups: Sequence[TrajectoryGroup],
        batch: RolloutBatch,
        settings: Settings,
        keep_checkpoints: int | None,
    ) -> TrainResult:
        """Update, log, save. Blocking; `groups` are those that `batch` was made of."""
        version = self.trainer.policy.version
        try:
            out = self.trainer.train(batch, settings)
        finally:
            # Also after a NumericsError: earlier minibatches have moved the weights by then.
            published = self._publish()
        step = self.trainer.step
        # Here, so that no caller who gave up waiting leaves a trained step with the old seed.
        self.engine.reseed(sampling_seed(self.seed, step))
        self.run.trackers.configure("train", out.settings.as_config())
        metrics = means(groups, "train")
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
            failure = _failure(self._write, metrics, groups, batch, out, version)
            failed = "its metrics and trajectories could not be written"
            path = save_checkpoint(self.run.checkpoints, self.trainer)
            if failure is None:
                failure = _failure(self._tidy, metrics, started, keep_checkpoints)
                failed = "older checkpoints could not be deleted, or time/checkpoint not be written"
            if failure is not None:
                raise RunError(
                    f"step {step} is trained and its checkpoint {path} is saved, but {failed} in "
                    f"{self.run.folder}: {failure}. "
                    "Mend that and go on; training on this batch again would train on it twice"
                ) from failure
        return TrainResult(step, metrics, path, out.skipped)

    def _write(
        self,
        metrics: Mapping[str, float],
        groups: Sequence[TrajectoryGroup],
        batch: RolloutBatch,
        out: TrainOutput,
        version: int,
    ) -> None:
        """Log a step that began at this policy version."""
        step, record = self.trainer.step, self._record(out.settings, version)
        self.run.log(step, metrics)
        advantages = _advantages(groups, batch)
        self.run.log_trajectories(groups, "train", step, advantages, out.traces, record)

    def _tidy(self, metrics: dict[str, float], started: float, keep: int | None) -> None:
        """Delete older checkpoints, and log the seconds that all this writing took."""
        if keep is not None:
            self.run.delete_checkpoints(self._retained(keep))
        metrics["time/checkpoint"] = time.perf_counter() - started
        self.run.log(self.trainer.step, {"time/checkpoint": metrics["time/checkpoint"]})

    async def stop(self) -> None:
        """Stop serving, and let go of the engine."""
        if self.server is not None:
            await self.server.stop()
        await self.client.close()
        self.batcher.close()

    def _retained(self, latest: int) -> set[int]:
        """Steps whose checkpoints stay: the `latest` ones, and the best by val/reward so far."""
        saved = steps_saved(self.run.checkpoints)
        best = best_step(self.run.metrics(), "val/reward", saved)
        return {*saved[-latest:], *([] if best is None else [best])}

    def delete_all_but_best(self, metric: str) -> None:
        """Delete all checkpoints but the latest and the one with the highest `metric`.

        Raises:
            ConfigError: a metric that was never logged. Nothing was deleted.
        """
        saved = steps_saved(self.run.checkpoints)
        if len(saved) < 2:
            return
        lines = self.run.metrics()
        check_logged(metric, lines)
        best = best_step(lines, metric, saved)
        self.run.delete_checkpoints({saved[-1], saved[-1] if best is None else best})

    def _record(self, settings: Settings, version: int) -> UpdateRecord:
        policy = self.trainer.policy
        dtype = str(policy.compute_dtype).removeprefix("torch.")
        return UpdateRecord.of(settings, version=version, context=policy.context, dtype=dtype)

    @timed("publish")
    def _publish(self) -> float:
        """Give the engine's copy, where it has one, the trainer's weights; seconds it took."""
        started = time.perf_counter()
        if isinstance(self.engine.policy, RolloutPolicy):
            refresh(self.engine.policy, self.trainer.policy)
        return time.perf_counter() - started


def sampling_seed(seed: int, step: int) -> int:
    """The engine's seed at a step, of a backend with this `seed`: the same after a resume."""
    return seed_of(seed, step)


def _failure(function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> Exception | None:
    """What stops the function, if anything: a step whose weights have moved is saved regardless."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@cache
def _spare_the_libraries() -> None:
    """Keep Python's garbage collector from searching what torch and transformers made at import:
    0.2 s each time, in the midst of training. Once a process, before the first model is loaded."""
    gc.collect()
    gc.freeze()


def load_trainer(run: Run, base_model: str, config: InternalModelConfig) -> Trainer:
    """Weights, optimizer and step of the run's last checkpoint, or of the base model.

    Raises:
        ModelError: the base model cannot be loaded.
        CheckpointError: the checkpoint is damaged.
    """
    _spare_the_libraries()
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
        frozen.packing, frozen.shares_prompts = policy.packing, policy.shares_prompts
        frozen.lm.requires_grad_(False)
        return frozen

    trainer = Trainer(policy, load_reference)
    if checkpoint is not None:
        load_trainer_state(checkpoint, trainer)
        log.info("%s goes on from step %d", run.folder, trainer.step)
    run.forget_after(trainer.step)
    return trainer


def _advantages(groups: Sequence[TrajectoryGroup], batch: RolloutBatch) -> list[list[float | None]]:
    """A_i of each trajectory, None for one that was dropped."""
    known = {samples[0].trajectory_id: samples[0].advantage for samples in batch.samples}
    out, number = [], 0
    for group in groups:
        out.append([known.get(number + i) for i in range(len(group))])
        number += len(group)
    return out
