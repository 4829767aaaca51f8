"""`LocalBackend`: engine and trainer in this process, on one copy of the weights or on two."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeVar

from openai import AsyncOpenAI

from gspo.backend.base import ModelLike, TrainResult, train_options
from gspo.backend.run import Run
from gspo.backend.service import Service, load_trainer, means
from gspo.backend.trackers import TrackerName, check_loggers
from gspo.compute import ComputeThread
from gspo.config import TrainConfig
from gspo.dev import TrainConfig as DevTrainConfig
from gspo.draws import seed_of
from gspo.errors import RunError
from gspo.policy.load import Policy
from gspo.policy.precision import rollout_copy
from gspo.serve.app import create_app
from gspo.serve.batcher import Batcher
from gspo.serve.selfcheck import check_engine
from gspo.serve.server import PortServer, bind, in_process_client
from gspo.serve.torch_engine import TorchEngine
from gspo.train.checkpoint import steps_saved
from gspo.train.rollouts import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer
from gspo.trajectory import TrajectoryGroup

T = TypeVar("T")


@cache
def _spare_the_libraries() -> None:
    """Keep Python's garbage collector from searching what torch and transformers made at import:
    0.2 s each time, in the midst of training. Once a process, before the first model is loaded."""
    gc.collect()
    gc.freeze()


class LocalBackend:
    """Samples and trains in this process.

    Args:
        path: folder of the runs, `<path>/<project>/<model name>/`.
        port: also answer on 127.0.0.1:<port> (0: a free one), for programs that build their own
            OpenAI client from `model.inference_base_url`. None: `model.openai_client()` reaches
            the engine without a port.
        keep_checkpoints: how many of the latest to keep; None: all.
        seed: of requests that have none of their own.
        logger: trackers that are shown what metrics.jsonl gets: "tensorboard", "trackio", "wandb".
            One that fails is a warning, once.

    Raises:
        ConfigError: an unknown tracker.
        MissingDependencyError: a tracker whose client is not installed.
    """

    def __init__(
        self,
        path: str | Path = ".art",
        *,
        port: int | None = None,
        keep_checkpoints: int | None = None,
        seed: int = 0,
        logger: Sequence[TrackerName] = (),
    ):
        if keep_checkpoints is not None and keep_checkpoints < 1:
            raise RunError(f"keep_checkpoints = {keep_checkpoints}: the latest is always kept")
        self.path = Path(path).expanduser()
        self.port = port
        self.keep_checkpoints = keep_checkpoints
        self.seed = seed
        self.logger = check_loggers(logger)
        self._compute = ComputeThread()
        self._services: dict[tuple[str, str], Service] = {}
        self._logs: dict[tuple[str, str], Run] = {}

    async def register(self, model: ModelLike) -> None:
        """Make the model ready to sample and train; goes on from its last checkpoint.

        Raises:
            ServeError: the port is in use.
            RunError: the run folder is read-only, in use, of a newer gspo or of another model.
            ModelError: the base model cannot be loaded.
            CheckpointError: the last checkpoint is damaged.
        """
        key = (model.project, model.name)
        service = self._services.get(key)
        if service is not None:
            if service.base_model != model.source:
                raise RunError(
                    f"model {model.name!r} of project {model.project!r} is registered with "
                    f"base_model {service.base_model!r}, not {model.source!r}: "
                    "give one of the two another name"
                )
            return
        if not model.trainable:
            self._run(model)
            return
        assert model.source is not None
        _spare_the_libraries()
        listener = None if self.port is None else bind("127.0.0.1", self.port)
        run = None
        try:
            lora = model.internal_config.lora
            identity = {"base_model": model.source, "lora": lora and lora.model_dump()}
            run = Run(self.path, model.project, model.name, identity)
            async with self._compute.turn() as compute:
                config = model.internal_config
                trainer = await compute.run(load_trainer, run, model.source, config)
                policy = trainer.policy
                if config.rollout_dtype is not None:
                    policy = await compute.run(rollout_copy, policy, config.rollout_dtype)
            engine = TorchEngine(policy, seed=self._sampling_seed(trainer.step))
            self._services[key] = await self._start(run, model, engine, trainer, listener)
            run.claim()
            await asyncio.to_thread(self._track, run, model, trainer.step)
        except BaseException:
            if run is not None:
                run.close()
            if listener is not None:
                listener.close()
            raise

    async def _start(
        self,
        run: Run,
        model: ModelLike,
        engine: TorchEngine,
        trainer: Trainer,
        listener: socket.socket | None,
    ) -> Service:
        async with self._compute.turn() as compute:
            await compute.run(check_engine, engine)
        window = 0.0 if listener is None else 0.005
        batcher = Batcher(engine, self._compute, window=window)
        app = create_app(batcher, lambda: [model.name])
        client = in_process_client(app)
        await client.models.list()  # the client looks its platform up, once, in a thread
        server = None
        if listener is not None:
            server = PortServer(app, listener)
            await server.start()
        assert model.source is not None
        return Service(run, model.source, engine, trainer, batcher, client, server)

    def client(self, model: ModelLike) -> AsyncOpenAI:
        """A client that samples from the model without a port."""
        return self._service(model).client

    def base_url(self, model: ModelLike) -> str:
        """Where the model is served: on its port, or a name that only `client` resolves."""
        service = self._service(model)
        return str(service.client.base_url) if service.server is None else service.server.url

    def policy(self, model: ModelLike) -> Policy:
        """The model itself, for tools that look inside."""
        return self._service(model).trainer.policy

    async def with_policies(self, model: ModelLike, function: Callable[[Policy, Policy], T]) -> T:
        """`function(trainer's, engine's)` in the thread that computes, while nothing else does."""
        service = self._service(model)
        async with self._compute.turn() as compute:
            return await compute.run(function, service.trainer.policy, service.engine.policy)

    def run(self, model: ModelLike) -> Run:
        """The model's run folder."""
        return self._run(model)

    async def get_step(self, model: ModelLike) -> int:
        return self._service(model).trainer.step

    async def train(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        config: TrainConfig | None = None,
        _config: DevTrainConfig | None = None,
        **options: Any,
    ) -> TrainResult:
        """Train on one rollout batch, log it, and save a checkpoint.

        `options` may name any field of `TrainConfig` or `dev.TrainConfig`.

        Raises:
            ConfigError: an unknown option, or a contradiction.
            DataError: groups that cannot be trained on. Nothing was written then.
            NumericsError: a gradient that is not finite.
            RunError: the checkpoint could not be written.
        """
        service = self._service(model)
        settings = resolve(*train_options(config, _config, options))
        groups = list(trajectory_groups)
        batch = prepare(
            groups,
            context=service.trainer.policy.context,
            advantage=settings.advantage,
            overlong=settings.overlong,
            drop_too_long=settings.options.on_too_long == "drop",
        )
        async with self._compute.turn() as compute:
            result = await compute.run(
                service.train, groups, batch, settings, self.keep_checkpoints
            )
        service.engine.reseed(self._sampling_seed(result.step))
        return result

    async def log(
        self,
        model: ModelLike,
        trajectory_groups: Sequence[TrajectoryGroup],
        split: str,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> None:
        """Write trajectories/<split>/<step>.parquet and the means of their metrics."""
        run = self._run(model)
        if step is None:
            step = await self.get_step(model) if model.trainable else 0
        groups = list(trajectory_groups)
        # The file of a trained batch has its advantages, which are not known here.
        stored = run.folder / "trajectories" / split / f"{step:04d}.parquet"
        if groups and not (split == "train" and stored.exists()):
            await asyncio.to_thread(run.log_trajectories, groups, split, step)
        values = {f"{split}/{name}": value for name, value in means(groups).items()}
        for name, value in (metrics or {}).items():
            values[name if "/" in name else f"{split}/{name}"] = float(value)
        await asyncio.to_thread(run.log, step, values)

    async def delete_checkpoints(
        self, model: ModelLike, best_checkpoint_metric: str = "val/reward"
    ) -> None:
        """Delete all checkpoints but the latest and the one with the highest metric."""
        run = self._service(model).run
        saved = steps_saved(run.checkpoints)
        name = best_checkpoint_metric
        scored = [r for r in run.metrics() if r["step"] in saved and isfinite(r.get(name, nan))]
        keep = set(saved[-1:])
        if scored:
            keep.add(int(max(scored, key=lambda r: r[name])["step"]))
        await asyncio.to_thread(run.delete_checkpoints, keep)

    async def close(self) -> None:
        """Stop serving and let go of the run folders, once what is being written is written.

        A training step that is still being computed, since its `train` was cancelled, is lost.
        """
        services, logs = list(self._services.values()), list(self._logs.values())
        self._services.clear()
        self._logs.clear()
        # The runs first: nothing that fails behind may leave one held.
        for run in [*(service.run for service in services), *logs]:
            await asyncio.to_thread(run.close)  # a tracker may have to send what is left
        for service in services:
            if service.server is not None:
                await service.server.stop()
            await service.client.close()
            service.batcher.close()
        self._compute.close()

    def _track(self, run: Run, model: ModelLike, step: int | None) -> None:
        config: dict[str, Any] = {"project": model.project, "name": model.name}
        if model.trainable:
            load = model.internal_config.model_dump(mode="json")
            config |= {"base_model": model.source, "load": load}
        if model.config is not None:
            config["config"] = json.loads(json.dumps(model.config.model_dump(), default=str))
        run.track(self.logger, step, config)

    def _sampling_seed(self, step: int) -> int:
        """Of unseeded requests at a step: the same again after a resume."""
        return seed_of(self.seed, step)

    def _service(self, model: ModelLike) -> Service:
        service = self._services.get((model.project, model.name))
        if service is None:
            raise RunError(
                f"model {model.name!r} is not registered: await model.register(backend) first"
            )
        return service

    def _run(self, model: ModelLike) -> Run:
        key = (model.project, model.name)
        if model.trainable:
            return self._service(model).run
        if key not in self._logs:
            run = Run(self.path, model.project, model.name, {"base_model": None})
            run.claim()
            self._track(run, model, step=None)
            self._logs[key] = run
        return self._logs[key]
