"""The engines of a run: of the weights that are trained, and of saved steps that are asked for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import torch

from gspo.backend.base import ModelLike
from gspo.backend.loading import load_step
from gspo.backend.run import Run
from gspo.core.compute import ComputeThread
from gspo.core.draws import seed_of
from gspo.core.errors import ConfigError, RequestError, ServeError
from gspo.dev import InternalModelConfig
from gspo.policy.policy import Policy
from gspo.serve.engine import Engine
from gspo.serve.selfcheck import make_engine
from gspo.serve.vllm_engine import VllmEngine
from gspo.train.checkpoint import checkpoint_name, saved_version, steps_saved
from gspo.weights.publisher import Publisher, publisher_for
from gspo.weights.receipt import Receipts
from gspo.weights.vllm_publisher import VllmPublisher, VllmServers

KEPT = 2
"""Engines of saved steps that are held at once, beside the current one."""


def proved_engine(
    policy: Policy,
    config: InternalModelConfig,
    compute: ComputeThread,
    *,
    seed: int,
    sockets: bool,
    copied: tuple[Policy, Publisher] | None = None,
) -> Engine:
    """Make the engine of a policy, and prove it. Its receipts publish the policy's weights to it.

    Args:
        copied: what it samples from and how that is published, if `config` doesn't say that.

    Raises:
        ModelError: the model cannot be sampled from, or not as `config` asks.
        ServeError: the engine doesn't compute with these weights.
    """
    sampling, publisher = copied or publisher_for(policy, config.rollout_dtype)
    exact = config.exact if sampling is policy else False
    engine = make_engine(sampling, compute, seed=seed, sockets=sockets, exact=exact)
    receipts = Receipts(policy, sampling, publisher)
    receipts.prove(engine, policy.version)
    engine.receipts = receipts
    return engine


def dtype_of_servers(config: InternalModelConfig) -> torch.dtype:
    """The precision in which vLLM servers of a model must compute.

    Raises:
        ConfigError: an option that a server cannot do.
    """
    dtype = config.rollout_dtype or config.dtype
    if config.exact or dtype in ("int8", "int4"):
        raise ConfigError(
            f"exact={config.exact}, rollout_dtype={config.rollout_dtype!r} with engines=: vLLM "
            "computes in another way than the trainer, in float32, bfloat16 or float16. Leave them "
            "out"
        )
    return getattr(torch, dtype)


def remote_engine(
    policy: Policy, config: InternalModelConfig, entries: Sequence[str], run: Run, *, seed: int
) -> Engine:
    """As `proved_engine`, of servers of vLLM, each of which is proved.

    Args:
        policy: the trainer's.
        config: its `rollout_dtype` is the precision of the servers; None: `dtype`.
        entries: see `VllmServer`.
        run: in whose folder the servers find the weights. Its `close` ends them, also while they
            are still awaited.
        seed: of requests that have none.

    Raises:
        ConfigError: an option that a server cannot do.
        ServeError: a server that does not answer, is set up wrongly, or has other weights.
    """
    dtype = dtype_of_servers(config)
    policy.not_exact = "vLLM samples"
    servers = VllmServers(entries, run.folder / "published")
    run.unblock = servers.close
    engine = VllmEngine(policy, servers, seed=seed)
    try:
        publisher = VllmPublisher(servers, policy, dtype)
        receipts = engine.receipts = Receipts(policy, policy, publisher, publisher.probe)
        receipts.publish(engine)
    except BaseException:
        engine.close()
        raise
    return engine


class Engines:
    """Finds the engine of a name: `<model>` is the current one, `<model>@<step>` a saved step's.

    A saved step is loaded when it is first asked for, beside what is trained, and never trained.
    `KEPT` of them are held; one more lets go of the one that was asked for longest ago, which first
    answers what it has begun. Step 0 is the base model.

    Args:
        run: whose checkpoints are meant.
        model: the registered model.
        current: its engine.
        compute: the thread that samples and trains.
        seed: the backend's, of requests that have none.
        sockets: whether requests come through sockets too.
    """

    def __init__(
        self,
        run: Run,
        model: ModelLike,
        current: Engine,
        compute: ComputeThread,
        *,
        seed: int,
        sockets: bool,
    ):
        assert model.source is not None
        self._run, self._name, self._source = run, model.name, model.source
        self._config, self._compute = model.internal_config, compute
        self._seed, self._sockets = seed, sockets
        self._current: Engine | None = current
        self._saved: dict[int, Engine] = {}  # the one that was asked for last is the last
        self._alive: weakref.WeakSet[Engine] = weakref.WeakSet()

    def names(self) -> list[str]:
        """What requests may ask for."""
        return [self._name, *(f"{self._name}@{step}" for step in self._steps())]

    async def find(self, name: str) -> Engine:
        """The engine of a name.

        Raises:
            RequestError: there is none, or the step was not saved; it says which were.
            CheckpointError: the step's checkpoint is damaged.
            ServeError: the backend is closed.
        """
        if self._current is None:
            raise ServeError("the backend that served this model is closed")
        if name == self._name:
            return self._current
        base, _, step = name.rpartition("@")
        if base != self._name or not step.isdecimal():
            raise RequestError(
                f"no model {name!r} here; this server has {self._name!r}, and its saved steps as "
                f"'{self._name}@<step>'",
                "model",
            )
        return await self._compute.run(self._saved_step, int(step))

    def close(self) -> None:
        """Refuse new requests, and fail those that are not answered."""
        if self._current is not None:
            self._current.close()
        self._current = None
        for engine in [*self._alive]:
            engine.close()
        self._saved.clear()

    def _steps(self) -> list[int]:
        return [0, *steps_saved(self._run.checkpoints)]

    def _saved_step(self, step: int) -> Engine:
        """The engine of a step, held or loaded. In the thread that computes."""
        engine = self._saved.pop(step, None) or self._load(step)
        self._saved[step] = engine
        if len(self._saved) > KEPT:
            del self._saved[next(iter(self._saved))]
            gc.collect()  # engine and scheduler know each other: their memory is free now
        return engine

    def _load(self, step: int) -> Engine:
        self._run.settle()
        if step not in (steps := self._steps()):
            raise RequestError(
                f"step {step} of {self._name!r} is not saved. Saved: "
                f"{', '.join(map(str, steps))} (0 is the base model)",
                "model",
            )
        checkpoint = self._run.checkpoints / checkpoint_name(step) if step else None
        policy = load_step(self._source, self._config, checkpoint)
        if checkpoint is not None:
            policy.version = saved_version(checkpoint)
        policy.lm.requires_grad_(False)
        seed = seed_of(self._seed, step)  # as the current engine's was at this step
        made = proved_engine(policy, self._config, self._compute, seed=seed, sockets=self._sockets)
        self._alive.add(made)
        return made
