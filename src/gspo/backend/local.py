"""`LocalBackend`: engine and trainer in this process, on one copy of the weights or on two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openai import AsyncOpenAI

from gspo import absent, dev
from gspo.backend.base import (
    Backend,
    ModelLike,
    TrainResult,
    described,
    group_means,
    merged,
    train_options,
    user_metrics,
)
from gspo.backend.fork import fork_checkpoint, run_identity
from gspo.backend.run import Run
from gspo.backend.service import Service
from gspo.backend.stored_batch import write_batch
from gspo.backend.trackers import TrackerName, Trackers, check_loggers
from gspo.config import TrainConfig, TrainSFTConfig
from gspo.core.compute import ComputeThread
from gspo.core.errors import ConfigError, RunError, check_flag, check_whole
from gspo.data.check import plain_groups
from gspo.policy.load import Policy
from gspo.serve.episodes import Episode
from gspo.serve.server import bind
from gspo.train.settings import resolve
from gspo.trajectories import Trajectory, TrajectoryGroup
from gspo.weights.vllm_process import check_entries


class LocalBackend(Backend):
    """Samples and trains in this process.

    Args:
        path: folder of the runs, `<path>/<project>/<model name>/`.
        port: also answer on 127.0.0.1:<port> (0: a free one), for programs that build their own
            OpenAI client from `model.inference_base_url`. None: `model.openai_client()` reaches
            the engine without a port.
        keep_checkpoints: how many of the latest to keep, beside the one with the best `val/reward`
            so far; None: all.
        seed: of requests that have none.
        logger: trackers that are shown what metrics.jsonl gets: "tensorboard", "trackio", "wandb".
            One that fails is a warning, once.
        engines: vLLM servers that sample (docs/vllm.md); none: this process samples.

    Raises:
        ConfigError: an unknown argument or tracker, or a value out of range.
        MissingDependencyError: a tracker whose client is not installed.
    """

    _service_of: Callable[..., Service] = Service

    @absent.refusing
    def __init__(
        self,
        path: str | Path = ".art",
        *,
        port: int | None = None,
        keep_checkpoints: int | None = None,
        seed: int = 0,
        logger: Sequence[TrackerName] = (),
        engines: Sequence[str] = (),
    ):
        check_whole("seed", seed)
        if port is not None:
            check_whole("port", port, 0, 65535)
        if keep_checkpoints is not None:
            check_whole("keep_checkpoints", keep_checkpoints, 1)
        self.path = Path(path).expanduser()
        self.port = port
        self.keep_checkpoints = keep_checkpoints
        self.seed = seed
        self.logger = check_loggers(logger)
        self.engines = check_entries(engines)
        self._compute = ComputeThread()
        self._services: dict[tuple[str, str], Service] = {}
        self._runs: dict[tuple[str, str], Run] = {}

    async def register(self, model: ModelLike) -> None:
        """Make the model ready to sample and train; goes on from its last checkpoint.

        Raises:
            ServeError: the port is in use.
            RunError: the run folder is read-only, in use, of a newer gspo or of another model.
            ModelError: the base model cannot be loaded.
            CheckpointError: the last checkpoint is damaged.
        """
        key = (model.project, model.name)
        if key in self._services:
            self._services[key].check_same(model)
            return
        if not model.trainable:
            self.run(model)
            return
        if self.engines and self._services:
            raise ConfigError("engines= serve one model: give the other a backend of its own")
        with ExitStack() as undo:  # a model that is only half registered would lose a step
            port = self.port
            listener = None if port is None else undo.enter_context(bind("127.0.0.1", port))
            run = Run(self.path, model.project, model.name, run_identity(model))
            undo.callback(run.close)
            parts = run, model, self.seed, self._compute, listener, self.engines
            service = await self._compute.run(self._service_of, *parts)
            undo.callback(service.engines.close)
            run.claim()
            told = self.logger, run, service.trainer.step, described(model)
            run.trackers = await asyncio.to_thread(Trackers, *told)
            await service.serving.start()
            self._services[key], self._runs[key] = service, run
            undo.pop_all()

    def client(self, model: ModelLike) -> AsyncOpenAI:
        """A client that samples from the model without a port."""
        return self._service(model).serving.client

    def base_url(self, model: ModelLike) -> str:
        """Where the model is served: on its port, or a name that only `client` resolves."""
        return self._service(model).serving.url

    def episode_url(self, model: ModelLike, episode: Episode) -> str:
        return self._service(model).serving.episode_url(episode)

    def policy(self, model: ModelLike) -> Policy:
        """The model itself, for tools that look inside."""
        return self._service(model).trainer.policy

    def run(self, model: ModelLike) -> Run:
        """The model's run folder; that of a prompted model is made when it is first asked for."""
        key = (model.project, model.name)
        if key not in self._runs:
            if model.trainable:
                self._service(model)
            run = Run(self.path, model.project, model.name, {"base_model": None})
            run.claim()
            run.trackers = Trackers(self.logger, run, None, described(model))
            self._runs[key] = run
        return self._runs[key]

    async def get_step(self, model: ModelLike) -> int:
        return self._service(model).trainer.step

    async def train(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        config: TrainConfig | None = None,
        _config: dev.TrainConfig | None = None,
        *,
        save_checkpoint: bool = True,
        **options: Any,
    ) -> TrainResult:
        """Train on one rollout batch, log it, and save a checkpoint.

        `options` may name any field of `TrainConfig` or `dev.TrainConfig`. A run goes on from its
        last saved step, so those with save_checkpoint=False may be lost.

        Raises:
            ConfigError: an unknown option, or a contradiction.
            DataError: groups that cannot be trained on or not be written. Nothing has changed.
            NumericsError: a gradient that is not finite.
            RunError: the checkpoint could not be written; or it was, but the log could not.
        """
        check_flag("save_checkpoint", save_checkpoint)
        service = self._service(model)
        settings = resolve(*train_options(config, _config, options))
        groups, batch = service.checked(trajectory_groups, settings)
        how = settings, self.keep_checkpoints, save_checkpoint
        return await self._compute.run(service.train, groups, batch, *how)

    async def train_sft(
        self,
        model: ModelLike,
        trajectories: Sequence[Trajectory],
        config: TrainSFTConfig | None = None,
    ) -> TrainResult:
        """Supervised fine-tuning: all its batches are one step; log it, and save a checkpoint.

        Raises:
            ConfigError: an option of another type.
            DataError: conversations that cannot be trained on. Nothing has changed.
            NumericsError, RunError: as `train`.
        """
        config, keep = merged(TrainSFTConfig, "config", config, {}), self.keep_checkpoints
        return await self._compute.run(self._service(model).train_sft, trajectories, config, keep)

    async def log(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        split: str,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Write trajectories/<split>/<step>.parquet and the means of their metrics.

        A metric whose name is one of gspo's stands at `<split>/user/<name>`, unless it is what
        gspo has written there: `metrics=result.metrics` adds nothing.

        Raises:
            DataError: what `train` refuses too, but for groups of one; or a metric that is no
                number.
            ConfigError: a split that cannot name a folder, or a step below 0.
        """
        if step is None:
            step = await self.get_step(model) if model.trainable else 0
        check_whole("step", step, 0)
        values = user_metrics(metrics, split, self.run(model).line(step))
        await self.record(model, trajectory_groups, split, values, step)

    async def record(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        split: str,
        metrics: Mapping[str, float],
        step: int,
    ) -> None:
        """Like `log`, but keep each metric name as it is: for loops that measure what gspo has
        names for, such as `time/rollout`."""
        run = self.run(model)
        groups = plain_groups(trajectory_groups)
        values = group_means(groups, split)
        path, line = run.trajectories(split, step), run.line(step)
        # `train` has written the file, with the advantages, which this call doesn't know.
        trained = split == "train" and path.exists()
        if trained:
            values = {name: value for name, value in values.items() if name not in line}

        def write() -> None:
            with run.writing():
                if groups and not trained:
                    write_batch(path, groups)
                run.log(step, values | dict(metrics))

        await asyncio.to_thread(write)

    async def delete_checkpoints(
        self, model: ModelLike, best_checkpoint_metric: str = "val/reward"
    ) -> None:
        """Delete all checkpoints but the latest and the one with the highest metric.

        Raises:
            ConfigError: a metric that was never logged. Nothing was deleted.
        """
        run = self._service(model).run
        await asyncio.to_thread(run.settle)
        await asyncio.to_thread(run.prune, 1, best_checkpoint_metric, required=True)

    @absent.refusing
    async def fork_checkpoint(
        self,
        model: ModelLike,
        from_model: str = "",
        from_project: str | None = None,
        not_after_step: int | None = None,
        verbose: bool = False,
    ) -> None:
        """Begin the run of a model with another run's checkpoint, before it is registered: see
        `gspo.backend.fork.fork_checkpoint`. `verbose` prints which step it is."""
        if not from_model:
            raise ConfigError("fork_checkpoint: give from_model=, the name of the other run")
        if (model.project, model.name) in self._services:
            raise RunError(f"model {model.name!r} is registered: fork before register")
        for service in self._services.values():  # one of which may be the other run's
            await asyncio.to_thread(service.settle)
        source = from_model, from_project, not_after_step
        step = await asyncio.to_thread(fork_checkpoint, self.path, model, *source)
        if verbose:
            print(f"{model.name} goes on from step {step} of {from_model}")

    _experimental_fork_checkpoint = fork_checkpoint

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise absent.refusal("LocalBackend", name, "a backend")

    async def close(self) -> None:
        """Stop serving and let go of the run folders, once what is being written is written. A
        training step that is still being computed, since its `train` was cancelled, is lost."""
        services, runs = list(self._services.values()), list(self._runs.values())
        self._services.clear()
        self._runs.clear()
        async with AsyncExitStack() as stack:  # the last first, whatever fails: no run stays locked
            stack.callback(self._compute.close)
            for service in services:
                stack.callback(service.engines.close)
                stack.push_async_callback(service.serving.stop)
            for run in runs:  # which waits for its checkpoint, and for its trackers
                stack.push_async_callback(asyncio.to_thread, run.close)

    def _service(self, model: ModelLike) -> Service:
        service = self._services.get((model.project, model.name))
        if service is None:
            raise RunError(
                f"model {model.name!r} is not registered, or closed: await model.register(backend)"
            )
        return service
