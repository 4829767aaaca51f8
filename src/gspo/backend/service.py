"""One registered model: its run, engine and trainer, and a training step from end to end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from gspo.backend.base import ModelLike, TrainResult, completion_lengths, group_means
from gspo.backend.engines import Engines, proved_engine, remote_engine
from gspo.backend.loading import load_trainer
from gspo.backend.run import Run
from gspo.backend.sft_samples import sft_samples
from gspo.backend.stored_batch import UpdateRecord, write_batch
from gspo.config import TrainSFTConfig
from gspo.core.compute import ComputeThread
from gspo.core.draws import seed_of
from gspo.core.errors import RunError
from gspo.core.log import log
from gspo.core.timing import span
from gspo.data.check import plain_groups
from gspo.data.sample import SPLIT_REASONS, flat, split_counts
from gspo.dev import InternalModelConfig
from gspo.serve.engine import Engine
from gspo.serve.server import Serving
from gspo.train.checkpoint import checkpoint_name, steps_saved
from gspo.train.checkpoint_writer import CheckpointWriter
from gspo.train.minibatches import RolloutBatch, prepare
from gspo.train.settings import Settings
from gspo.train.supervised import plan_sft, train_sft
from gspo.train.trainer import Trainer, TrainOutput
from gspo.trajectories import TrajectoryGroup

T = TypeVar("T")


class Service:
    """A registered trainable model. Made in the thread that computes: it loads the model.

    Args:
        run: the model's run folder; training goes on from its last checkpoint.
        model: what to load.
        seed: the backend's, of requests that have none.
        compute: the thread that samples and trains.
        listener: where the model is served too, or None.
        servers: vLLM servers that sample, see `VllmServer`; none: this process samples.

    Attributes:
        trainer: has the weights that are trained.
        engine: samples. Its receipts give it the weights after each step, and prove it before
            anything is sampled.
        engines: finds the engine of a saved step too.
        checkpoints: writes them; a large one while training goes on.
        serving: answers for the engine, once it is started.

    Raises:
        ModelError: the base model cannot be loaded, or not be sampled from.
        CheckpointError: the checkpoint is damaged.
        ServeError: the engine doesn't compute with the weights that were loaded.
    """

    def __init__(
        self,
        run: Run,
        model: ModelLike,
        seed: int,
        compute: ComputeThread,
        listener: socket.socket | None,
        servers: Sequence[str] = (),
    ):
        config = model.internal_config
        self.run, self.seed = run, seed
        self._told: set[str] = set()  # reasons of splits
        self.checkpoints = self._everywhere(CheckpointWriter)
        self._keep: int | None = None  # checkpoints
        run.settle = self.settle
        self._loaded = _identity(model)
        saved = steps_saved(run.checkpoints)
        checkpoint = run.checkpoints / checkpoint_name(saved[-1]) if saved else None
        self.trainer = self._load(model, checkpoint)
        if checkpoint is not None:
            log.info("%s goes on from step %d", run.folder, self.trainer.step)
        run.forget_after(self.trainer.step)
        sockets, current = listener is not None, seed_of(seed, self.trainer.step)
        if servers:
            self.engine = remote_engine(self.trainer.policy, config, servers, run, seed=current)
        else:
            self.engine = self._proved(config, compute=compute, seed=current, sockets=sockets)
        self.engines = Engines(run, model, self.engine, compute, seed=seed, sockets=sockets)
        self.serving = Serving(self.engine, self.engines.names, listener, self.engines.find)

    def _everywhere(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in each process that trains the model; what it returns here."""
        return function(*args)

    def _load(self, model: ModelLike, checkpoint: Path | None) -> Trainer:
        assert model.source is not None
        return load_trainer(model.source, model.internal_config, checkpoint)

    def _proved(self, config: InternalModelConfig, **options: Any) -> Engine:
        return proved_engine(self.trainer.policy, config, **options)

    def check_same(self, model: ModelLike) -> None:
        """Refuse this model's name for another model, or for one that is loaded otherwise.

        Raises:
            RunError: what differs.
        """
        wanted = _identity(model)
        for name, value in self._loaded.items():
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
        known = {"context": policy.context, "vocabulary": policy.head.size}
        batch = prepare(groups, settings, **known, version=policy.version)
        return groups, batch

    def train(
        self,
        groups: Sequence[TrajectoryGroup],
        batch: RolloutBatch,
        settings: Settings,
        keep_checkpoints: int | None,
        save: bool,
    ) -> TrainResult:
        """Update, publish, log, and `save`. Blocking; `batch` was made of `groups`."""
        run, trainer = self.run, self.trainer
        version = trainer.policy.version
        out, published = self._updated(methodcaller("train", batch, settings), trainer)
        run.trackers.configure("train", out.settings.as_config())
        metrics = self._metrics(groups, batch, out) | published

        def store() -> None:
            dtype = str(trainer.policy.dtype).removeprefix("torch.")
            at = {"version": version, "context": trainer.policy.context}
            record = UpdateRecord.of(out.settings, **at, dtype=dtype)
            advantages = {s[0].trajectory_id: s[0].advantage for s in batch.samples}
            stored = run.trajectories("train", trainer.step)
            turns = {s[0].trajectory_id: s[0].turn_advantages for s in batch.samples}
            write_batch(stored, groups, advantages, out.traces, record, turns)

        return self._saved(metrics, keep_checkpoints, store, out.skipped, save)

    def train_sft(
        self, trajectories: Sequence[Any], config: TrainSFTConfig, keep_checkpoints: int | None
    ) -> TrainResult:
        """Check the conversations, then update on all their batches, publish, log, save."""
        trainer, engine, last = self.trainer, self.engine, config.assistant_turns == "last"
        samples = sft_samples(trajectories, engine, trainer.policy.context, last=last)
        plan = plan_sft(len(samples), config, trainer.policy)
        metrics, published = self._updated(train_sft, trainer, samples, plan)
        self.run.trackers.configure("sft", config.model_dump(mode="json"))
        return self._saved(metrics.compute() | published, keep_checkpoints)

    def _updated(self, update: Callable[..., T], *args: Any) -> tuple[T, dict[str, float]]:
        """Update the weights and publish them; what the update returned, and publishing's metrics.

        Published also after a NumericsError: earlier minibatches have moved the weights by then.
        """
        with self.run.writing():
            self.checkpoints.check()
        try:
            out = self._everywhere(update, *args)
        finally:
            published = self._publish()
        # Here, so that no caller who gave up waiting leaves a trained step with the old seed.
        self.engine.reseed(seed_of(self.seed, self.trainer.step))
        return out, published

    def _saved(
        self,
        metrics: dict[str, float],
        keep_checkpoints: int | None,
        store: Callable[[], None] = lambda: None,
        skipped: str | None = None,
        save: bool = True,
    ) -> TrainResult:
        """Log a step that is trained, `store` its trajectories, and `save` its checkpoint."""
        run, step = self.run, self.trainer.step
        started = time.perf_counter()
        failed: Exception | None = None
        with run.writing():
            # Logged before the checkpoint: a resume drops the lines beyond the step that it finds.
            # A step whose weights have moved is saved all the same if that fails.
            try:
                run.log(step, metrics)
                store()
            except Exception as error:
                failed = error
            writing = CheckpointWriter.save, self.checkpoints, run.checkpoints, self.trainer
            path = self._everywhere(*writing) if save else None
            try:
                if failed is not None:
                    raise failed
                if save:
                    self._keep = keep_checkpoints
                    self._prune()
                metrics["time/checkpoint"] = time.perf_counter() - started
                run.log(step, {"time/checkpoint": metrics["time/checkpoint"]})
            except Exception as error:
                kept = f"its checkpoint {path} is saved" if path else "not to be saved"
                raise RunError(
                    f"step {step} is trained and {kept}, but its metrics "
                    "or trajectories could not be written, or older checkpoints not be deleted, in "
                    f"{run.folder}: {error}. "
                    "Mend that and go on; training on this batch again would train on it twice"
                ) from error
        return TrainResult(step, metrics, path, skipped)

    def _prune(self) -> None:
        if self._keep is not None:
            self.run.prune(self._keep, "val/reward")

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            RunError: it could not be written.
        """
        with self.run.writing():
            if self.checkpoints.wait():
                self._prune()

    def _metrics(
        self, groups: Sequence[TrajectoryGroup], batch: RolloutBatch, out: TrainOutput
    ) -> dict[str, float]:
        """What a step logs, but the seconds of publishing and saving."""
        metrics = group_means(groups, "train") | completion_lengths(groups) | out.metrics.compute()
        if metrics["time/train"] > 0:
            rate = metrics.get("tokens/trained", 0.0) / metrics["time/train"]
            metrics["throughput/trained_tokens_per_second"] = rate
        if out.skipped is not None:
            metrics["train/skipped"] = 1.0
            log.warning(
                "step %d of %s is skipped: %s", self.trainer.step, self.run.folder, out.skipped
            )
        splits = split_counts(flat(batch.samples))
        if splits.keys() - self._told:  # once for each reason: the metrics say it of each step
            self._told |= splits.keys()
            reasons = "; ".join(f"{n} x {SPLIT_REASONS[reason]}" for reason, n in splits.items())
            log.warning(
                "step %d: trajectories are split into several samples, which costs compute and "
                "changes no result: %s (docs/tools.md)",
                *(self.trainer.step, reasons),
            )
        return metrics

    @span("publish")
    def _publish(self) -> dict[str, float]:
        """Give the engine the trainer's weights and prove it; the metrics of it.

        Raises:
            ServeError: the engine doesn't compute with these weights.
        """
        started, receipts = time.perf_counter(), self.engine.receipts
        assert receipts is not None
        return receipts.publish(self.engine) | {"time/publish": time.perf_counter() - started}


def _identity(model: ModelLike) -> dict[str, Any]:
    """What is loaded for a model, and how."""
    return {"base_model": model.source, **model.internal_config.model_dump()}
