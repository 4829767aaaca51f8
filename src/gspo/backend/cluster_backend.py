"""`ClusterBackend`: one model trained by several processes, behind the same user code.

The first rank has the user's script, the server and an engine; the others wait for work in the
constructor, and end when the first one closes. Under torchrun every rank runs the script; with
`nproc` the ranks are started here.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from gspo import absent
from gspo.backend.base import ModelLike
from gspo.backend.engines import proved_engine
from gspo.backend.loading import load_step
from gspo.backend.local import LocalBackend
from gspo.backend.ranks import Ranks, follow, load_on_ranks
from gspo.backend.run import Run
from gspo.backend.service import Service
from gspo.core.compute import free_cores
from gspo.core.errors import ConfigError, RunError, check_names, check_whole
from gspo.core.log import log
from gspo.dev import InternalModelConfig
from gspo.serve.engine import Engine
from gspo.train.mesh import LIMIT, Mesh, started_ranks
from gspo.train.trainer import Trainer
from gspo.weights.gathered_copy import GatheredCopy, whole_weights


class ClusterBackend(LocalBackend):
    """Trains with FSDP2 on several ranks. vLLM servers sample (`engines`), or the first rank does,
    from an unsharded copy.

    Args:
        path: as `LocalBackend`'s; all ranks must see it.
        nproc: how many ranks to start on this machine, this process included. None: those that
            torchrun has started; without torchrun, this process alone.
        timeout: seconds that a rank waits for another one inside a step.
        cp_size: how many neighbouring ranks compute a microbatch together, each a part of its
            length (for sequences that one rank has no memory for).
        ep_size: how many ranks share one set of an MoE model's experts; tokens go to them.
        config: what your script was told, such as its own options: only the first rank's counts,
            so a rank that was told something else is refused at the start.
        options: `LocalBackend`'s.

    Raises:
        ConfigError: `nproc` under torchrun, ranks that don't come, don't fit together or were given
            other arguments, or sizes that don't divide their number.
        MissingDependencyError: transformers is older than 5.24.
    """

    def __init__(
        self,
        path: str | Path = ".art",
        *,
        nproc: int | None = None,
        timeout: float = LIMIT,
        cp_size: int = 1,
        ep_size: int = 1,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        own, more = (inspect.signature(kind).parameters for kind in (ClusterBackend, LocalBackend))
        known = {*own, *more} - {"options"}
        check_names("ClusterBackend", options, known, absent.of_options("LocalBackend"))
        super().__init__(path, **options)  # first: a rank that is started must not be for nothing
        self._sizes = {"cp_size": cp_size, "ep_size": ep_size}
        size = check_ranks(nproc, self._sizes)
        self._children: list[subprocess.Popen[bytes]] = []
        self._ranks: Ranks | None = None
        given = {"path": path, "timeout": timeout, **self._sizes, **options, **(config or {})}
        if started_ranks() is None and size > 1:
            self._start(size, timeout)
            given = {}  # ranks that are started here have no script
        if size > 1:
            mesh = Mesh(timeout, {name: str(value) for name, value in given.items()})
            if mesh.rank > 0:
                follow(mesh)
            self._ranks = Ranks(mesh)

    def _service_of(self, run: Run, model: ModelLike, *more: Any) -> Service:
        if self._ranks is None:
            return Service(run, model, *more)
        check_divided(model.internal_config, self._sizes["ep_size"], self.engines)
        return ShardedService(run, model, *more, ranks=self._ranks, sizes=self._sizes)

    async def close(self) -> None:
        ranks, self._ranks = self._ranks, None
        async with AsyncExitStack() as stack:  # the last first, whatever fails
            stack.callback(self._end_children, 10.0)
            stack.push_async_callback(super().close)
            if ranks is not None:
                ranks.mesh.closing = True
                error = sys.exc_info()[1]  # of the script, in an `async with` or a `finally`
                failed = error.code if isinstance(error, SystemExit) else error
                stack.push_async_callback(self._compute.run, partial(ranks.close, bool(failed)))
            for service in self._services.values():
                # A publication that waits for a server would keep the ranks from ending.
                stack.callback(service.engines.close)
                stack.push_async_callback(asyncio.to_thread, service.settle)  # on all ranks

    def _start(self, nproc: int, timeout: float) -> None:
        """Start the other ranks, and set this one's variables."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(nproc)}
        os.environ.update(where | {"RANK": "0", "LOCAL_RANK": "0"})
        given = {"OMP_NUM_THREADS": str(max(1, free_cores() // nproc)), **os.environ}
        work = f"from gspo.backend.ranks import *; follow(Mesh({timeout!r}))"
        command = [sys.executable, "-c", work]
        atexit.register(self._end_children, 0.0)
        for rank in range(1, nproc):
            environment = given | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._children.append(subprocess.Popen(command, env=environment))

    def _end_children(self, seconds: float) -> None:
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
            child.kill()  # nothing, if it has ended
        if self._children:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
        self._children.clear()


class ShardedService(Service):
    """A model whose weights are divided among the ranks."""

    def __init__(self, *parts: Any, ranks: Ranks, sizes: Mapping[str, int]):
        self._ranks, self._sizes, self._everywhere = ranks, sizes, ranks.call
        super().__init__(*parts)

    def settle(self) -> None:
        try:
            super().settle()
        except RunError as error:
            if not self._ranks.mesh.broken:
                raise
            log.warning("%s", error)  # why the ranks end was raised before

    def _load(self, model: ModelLike, checkpoint: Path | None) -> Trainer:
        self._copied = model.source or "", model.internal_config, checkpoint
        shared = self.run.folder, *self._sizes.values()
        return self._ranks.call(load_on_ranks, self._ranks.mesh, self._copied, *shared)

    def _proved(self, config: InternalModelConfig, **options: Any) -> Engine:
        gather = partial(self._everywhere, whole_weights, self.trainer.policy)
        copy = GatheredCopy(load_step(*self._copied), gather)
        copy.policy.version = self.trainer.policy.version
        self.trainer.policy.not_exact = "several ranks train, and the engine samples from a copy"
        return proved_engine(self.trainer.policy, config, copied=(copy.policy, copy), **options)


def check_ranks(nproc: int | None, sizes: Mapping[str, int]) -> int:
    """Return how many ranks will train, or refuse what doesn't fit them.

    Args:
        nproc: as of `ClusterBackend`.
        sizes: its `cp_size` and `ep_size`, by name.

    Raises:
        ConfigError: `nproc` under torchrun, or sizes that don't divide the ranks.
    """
    started = started_ranks()
    if nproc is not None:
        # On this machine: a number that is meant for a cluster would start as many here.
        check_whole("nproc", nproc, 1, max(64, started or 0, 4 * (os.cpu_count() or 1)))
    if started is not None and nproc not in (None, started):
        raise ConfigError(f"nproc={nproc}, but torchrun has started {started}: leave nproc out")
    size = started or nproc or 1
    for name, value in sizes.items():
        check_whole(name, value, 1, 1024)
        if size % value:
            raise ConfigError(
                f"{name}={value} does not divide {size}, the number of processes that train: give "
                f"another {name} or nproc, or start more by torchrun"
            )
    return size


def check_divided(config: InternalModelConfig, ep_size: int, engines: Sequence[str]) -> None:
    """Refuse how a model is to be loaded, if several ranks can't.

    Raises:
        ConfigError: an engine to the bit, or of its own precision if no server samples, or adapters
            of experts beside `ep_size`.
    """
    if not engines and (config.exact or config.rollout_dtype is not None):
        raise ConfigError(
            "exact=True and rollout_dtype are not built for more than one process: the engine "
            "samples from an unsharded float32 copy. Leave them out, or let vLLM servers sample "
            "(engines=), which take a rollout_dtype"
        )
    if config.lora is not None and config.lora.target_modules == "all-linear" and ep_size > 1:
        raise ConfigError(
            "ep_size and lora: adapters of experts would be whole on each rank, they not. Name the "
            "layers that get adapters, such as target_modules = ['q_proj', 'v_proj'], or leave "
            "one of the two out"
        )
