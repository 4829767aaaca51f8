"""Publishes the trainer's weights to vLLM servers, and shares requests among those that have them.

A publication is a folder that the servers read: written beside, made durable, renamed, and READY
written last. Servers on other machines need the run's folder under the same path.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gspo.core.errors import ConfigError, ServeError, shown
from gspo.core.files import remove, replacing, write_whole
from gspo.policy.load import save_weights
from gspo.policy.policy import Policy
from gspo.weights.receipt import NOISE, Probe, score
from gspo.weights.vllm_server import Publication, ServerFault, VllmServer

T = TypeVar("T")
log = logging.getLogger("gspo")
TRIES = 10
"""Servers that a request may be sent to, one after the other, before it fails."""
DOWN_SECONDS = 900.0
"""How long a request waits for a server that can be used: a start takes as long."""
DRAIN_SECONDS = 120.0
"""How long a publication waits for what is being sampled. The rest is sampled anew, with the new
weights."""
_BACKOFF = 30.0
_PROBE_TOKENS = 128
_KEPT = 2
_MARGIN, _FLOOR = 8.0, 1e-4
"""Allowed are so many times the nats that a server was off at first, and at least these."""


def check_entries(engines: Any) -> tuple[str, ...]:
    """Refuse what is neither a URL nor a command.

    Raises:
        ConfigError: it names the value.
    """
    entries = tuple(engines) if isinstance(engines, list | tuple) else (engines,)
    for entry in entries:
        text = entry if isinstance(entry, str) else ""
        url = text.startswith(("http://", "https://"))
        if entries.count(entry) > 1 if url else not shutil.which((shlex.split(text) or [""])[0]):
            raise ConfigError(
                f"engines: {shown(entry)}: give each server's URL once, http://host:port, or the "
                "path of the Python of an environment with vLLM, /path/to/venv/bin/python"
            )
    return entries


class VllmServers:
    """The servers of one model. All that is asked of them runs in an event loop of its own thread.

    Args:
        entries: see `VllmServer`.
        folder: for the logs of servers that are started here.
    """

    def __init__(self, entries: Sequence[str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.loop = asyncio.new_event_loop()
        self.servers = [VllmServer(e, folder / f"vllm-{i}.log") for i, e in enumerate(entries)]
        self.waiting, self._changing, self._closed = 0, False, False
        self._wanted: Publication | None = None
        self._asked: set[asyncio.Task[Any]] = set()
        self._repairs: dict[VllmServer, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    def ask(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work in the servers' loop, from any other thread. Its waits have limits."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Fail what is asked, and end the servers that were started here."""
        if not self._closed:
            self._closed = True
            self.ask(self._close()).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    async def publish(self, new: Publication) -> None:
        """Give all servers these weights, and prove it.

        Raises:
            ServeError: one does not compute with them, or none answers.
        """
        self._wanted, self._changing = new, True
        try:
            if self._asked:
                await asyncio.wait(self._asked, timeout=DRAIN_SECONDS)
            for task in self._asked:
                task.cancel()
            for repair in self._repairs.values():
                repair.cancel()
            await asyncio.gather(*self._repairs.values(), return_exceptions=True)
            tries = [server.bring(new) for server in self.servers]
            results = await asyncio.gather(*tries, return_exceptions=True)
        finally:
            self._changing = False
        proved = any(server.publication is new for server in self.servers)
        for server, error in zip(self.servers, results, strict=True):
            if isinstance(error, ServerFault) and proved:
                log.warning("without %s for now: %s", server.url, error)
                self._repair(server)
            elif isinstance(error, BaseException):
                raise error

    async def sample(self, prompt: list[int], params: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The version of the weights, and the answer of the server that has least to do.

        Raises:
            ServeError: no server can be used, or none could answer this request.
        """
        for _ in range(TRIES):
            server = await self._free()
            weights = server.publication
            assert weights is not None
            asked = asyncio.create_task(server.sample(weights, prompt, params))
            self._asked.add(asked)
            server.running += params["n"]
            try:
                return weights.version, await asked
            except ServerFault as error:
                log.warning("asked again elsewhere: %s", error)
                server.fault, server.publication = str(error), None
                self._repair(server)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    asked.cancel()
                    raise  # the caller left; else a publication needs the server
            finally:
                self._asked.discard(asked)
                server.running -= params["n"]
        raise ServeError(f"a request failed {TRIES} times, last: {self._faults()}")

    def farthest(self) -> VllmServer:
        """The proved server whose scores of the probe are farthest from the trainer's."""
        return max((s for s in self.servers if s.publication), key=lambda server: server.distance)

    async def _close(self) -> None:
        for task in [*self._asked, *self._repairs.values()]:
            task.cancel()
        await asyncio.gather(*(server.close() for server in self.servers))

    async def _free(self) -> VllmServer:
        """The proved server that has least to do, once there is one."""
        self.waiting += 1
        limit = time.monotonic() + DOWN_SECONDS
        try:
            while not self._closed:
                proved = [s for s in self.servers if s.publication is not None]
                if proved and not self._changing:
                    return min(proved, key=lambda server: server.running)
                if not (self._changing or self._repairs) or time.monotonic() > limit:
                    raise ServeError(f"no vLLM server can be used: {self._faults()}")
                await asyncio.sleep(0.02)
        finally:
            self.waiting -= 1
        raise ServeError("the backend that served this model is closed")

    def _faults(self) -> str:
        return "; ".join(f"{server.url}: {server.fault}" for server in self.servers)

    def _repair(self, server: VllmServer) -> None:
        """Try until the server has the weights again; gives up if it has them and fails."""
        if server not in self._repairs and not self._changing and self._wanted is not None:
            repair = self.loop.create_task(_repaired(server, self._wanted))
            self._repairs[server] = repair
            repair.add_done_callback(lambda _: self._repairs.pop(server))


async def _repaired(server: VllmServer, wanted: Publication) -> None:
    for attempt in itertools.count():
        try:
            await server.bring(wanted)
            return log.warning("%s is back", server.url)
        except ServerFault:
            await asyncio.sleep(min(2.0**attempt / 2, _BACKOFF))
        except ServeError as error:
            return log.error("%s is not used any more: %s", server.url, error)


class VllmPublisher:
    """Writes the trainer's weights (with LoRA: the adapter) where the servers read them.

    Args:
        servers: what samples.
        policy: the trainer's.
        folder: where versions are written.
        dtype: that the servers compute in.

    Attributes:
        probe: what each server scores after each publication. Random tokens; in an MoE model the
            routers send them to the experts.
    """

    def __init__(self, servers: VllmServers, policy: Policy, folder: Path, dtype: torch.dtype):
        rng = np.random.default_rng(0)
        length = min(_PROBE_TOKENS, policy.context - 1)
        self.probe = Probe(torch.from_numpy(rng.integers(0, policy.entries, length)), None)
        self.tolerance = float("inf")
        self._servers, self._folder, self._dtype = servers, folder, dtype
        self._run, self._first = uuid.uuid4().hex[:12], float("inf")

    def publish(self, policy: Policy) -> int:
        """Write the folder, and have each server read it and prove it; see `Publisher`."""
        scores = score(policy, self.probe)
        noise = NOISE[self._dtype] * max(1.0, scores.abs().max().item())
        self.tolerance = min(noise, max(_FLOOR, _MARGIN * self._first))
        label = f"gspo-{self._run}-{policy.version}"
        target = self._folder.resolve() / label
        with replacing(target) as building:
            building.mkdir(parents=True)
            save_weights(policy, building)
        write_whole(target / "READY", label)
        probed = self.probe.tokens.tolist(), scores.tolist(), self.tolerance
        dtype, lora = str(self._dtype).removeprefix("torch."), ("", 0)
        if policy.peft is not None:
            lora = policy.source, policy.peft.peft_config[policy.peft.active_adapter].r
        new = Publication(policy.version, label, target, *probed, dtype, policy.context, *lora)
        self._servers.ask(self._servers.publish(new)).result()
        self._first = min(self._first, self._servers.farthest().distance)
        written = sorted(self._folder.glob("gspo-*"), key=lambda path: path.stat().st_mtime_ns)
        for old in written[:-_KEPT]:
            remove(old)
        return policy.version

    def expected(self, policy: Policy) -> tuple[Policy, dict[str, torch.Tensor]]:
        """The trainer's own scores are what a server must reproduce; see `Publisher`."""
        return policy, {}
