"""Publishes the trainer's weights to vLLM servers, and shares requests among those that have them.

A publication is a folder that the servers read: written beside, made durable, renamed, and READY
written last. Servers on other machines need the run's folder under the same path.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gspo.core.errors import ServeError
from gspo.core.files import remove, replacing, write_whole
from gspo.core.log import log
from gspo.core.progress import cancelled
from gspo.policy.load import save_weights, whole_weights_to_store
from gspo.policy.policy import Policy
from gspo.weights.receipt import NOISE, Probe, score
from gspo.weights.vllm_http import ServerFault
from gspo.weights.vllm_server import Publication, Read, VllmServer

T = TypeVar("T")
TRIES = 10
"""Servers that a request may be sent to, one after the other, before it fails."""
DOWN_SECONDS = 900.0
"""How long a request waits for a server that can be used: a start takes as long."""
DRAIN_SECONDS = 3600.0
"""How long a publication waits for what is being sampled. What is left is sampled anew, with the
new weights. So the limit is far from what completions need: else long ones, which are those of hard
prompts, would get a second draw and short ones would not."""
NOTICE_SECONDS = 60.0
"""After waiting so long for that, the log says so."""
_BACKOFF = 30.0
_PROBE_TOKENS = 128
_KEPT = 2
_CLOSED = "the backend that served this model is closed"
_MARGIN, _FLOOR = 8.0, 1e-4
"""Allowed are so many times the nats that a server was off at first, and at least these."""


class VllmServers:
    """The servers of one model. All that is asked of them runs in an event loop of its own thread.

    Args:
        entries: see `VllmServer`.
        folder: of the publications, and for the logs of servers that are started here. What a
            killed run has left there is removed.

    Attributes:
        run: begins the labels of the publications. No other run has the same.
        waiting: requests without a server.
        farthest: the server whose scores of the last publication are farthest from the trainer's.
    """

    def __init__(self, entries: Sequence[str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run = folder.resolve(), f"gspo-{uuid.uuid4().hex[:12]}"
        self.forget("gspo-")
        self.loop = asyncio.new_event_loop()
        self.servers = [VllmServer(e, folder / f"vllm-{i}.log") for i, e in enumerate(entries)]
        self.waiting, self._changing, self._closed = 0, False, False
        self.farthest = self.servers[0]
        self._asking = threading.Lock()
        self._wanted: Publication | None = None
        self._asked: set[asyncio.Task[Any]] = set()
        self._repairs: dict[VllmServer, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    def ask(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work in the servers' loop, from any other thread. Its waits have limits.

        Raises:
            ServeError: it is closed, or (of the future) was closed meanwhile.
        """
        with self._asking:
            if self._closed:
                work.close()
                raise ServeError(_CLOSED)
            return asyncio.run_coroutine_threadsafe(self._until_closed(work), self.loop)

    def close(self) -> None:
        """Fail what is asked, end the servers that were started here, and remove the weights."""
        with self._asking:
            if self._closed:
                return
            self._closed = True
            closing = asyncio.run_coroutine_threadsafe(self._close(), self.loop)
        closing.result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.forget(self.run)

    def forget(self, run: str, keep_last: int = 0) -> None:
        """Remove the folders of a run's publications, but for so many of the last."""
        found = self.folder.glob(f"*{run}*")  # one that was half written has a dot before
        written = sorted(found, key=lambda path: path.stat().st_mtime_ns)
        for old in written[: len(written) - keep_last]:
            remove(old)

    async def publish(self, new: Publication) -> None:
        """Give all servers these weights, and prove it.

        Raises:
            ServeError: one does not compute with them; or none answers: the first time at once,
                later after DOWN_SECONDS.
        """
        first, self._wanted, self._changing = self._wanted is None, new, True
        try:
            if self._asked and (await asyncio.wait(self._asked, timeout=NOTICE_SECONDS))[1]:
                told = "new weights wait for %d requests that are being sampled, up to %.0f s"
                log.warning(told, len(self._asked), DRAIN_SECONDS)
                await asyncio.wait(self._asked, timeout=DRAIN_SECONDS)
            await cancelled(*self._asked, *self._repairs.values())
            tries = [server.bring(new) for server in self.servers]
            results = await asyncio.gather(*tries, return_exceptions=True)
        finally:
            self._changing = False
        alone = first and not any(server.publication for server in self.servers)
        for server, error in zip(self.servers, results, strict=True):
            if isinstance(error, ServerFault) and not alone:
                log.warning("without %s for now: %s", server.url, error)
                self._repair(server)
            elif isinstance(error, BaseException):
                raise error
        await self._free()
        proved = [server for server in self.servers if server.publication]
        self.farthest = max(proved, key=lambda server: server.distance)

    async def sample(self, prompt: list[int], params: dict[str, Any], read: Read[T]) -> T:
        """What is read of the answer of the server that has least to do; see `VllmServer.sample`.

        Raises:
            ServeError: no server can be used, or none could answer this request.
        """
        for _ in range(TRIES):
            server = await self._free()
            weights = server.publication
            assert weights is not None
            asked = asyncio.create_task(server.sample(weights, prompt, params, read))
            self._asked.add(asked)
            server.running += params["n"]
            try:
                return await asked
            except ServerFault as error:
                if server.publication is weights:  # else it is being mended already
                    log.warning("what it sampled is asked again elsewhere: %s", error)
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

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that `close` ends: whoever waits for it is told why."""
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # told or not
        try:
            return await work
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise ServeError(_CLOSED) from None

    async def _close(self) -> None:
        await cancelled(*asyncio.all_tasks() - {asyncio.current_task()})
        await asyncio.gather(*(server.close() for server in self.servers))

    async def _free(self) -> VllmServer:
        """The proved server that has least to do, once there is one."""
        self.waiting += 1
        limit = time.monotonic() + DOWN_SECONDS
        try:
            while True:
                proved = [s for s in self.servers if s.publication is not None]
                if proved and not self._changing:
                    return min(proved, key=lambda server: server.running)
                mending = self._changing or not all(r.done() for r in self._repairs.values())
                if not mending or time.monotonic() > limit:
                    raise ServeError(f"no vLLM server can be used: {self._faults()}")
                await asyncio.sleep(0.02)
        finally:
            self.waiting -= 1

    def _faults(self) -> str:
        faults = "; ".join(f"{server.url}: {server.fault}" for server in self.servers)
        return f"{faults}. Start these servers again, or leave them out of engines="

    def _repair(self, server: VllmServer) -> None:
        """Try until the server has the weights again; gives up if it has them and fails."""
        begun = self._repairs.get(server)
        if not (begun and not begun.done()) and not self._changing and not self._closed:
            assert self._wanted is not None
            self._repairs[server] = self.loop.create_task(_repaired(server, self._wanted))


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
        dtype: that the servers compute in.

    Attributes:
        probe: what each server scores after each publication. Random tokens; in an MoE model the
            routers send them to the experts.
    """

    def __init__(self, servers: VllmServers, policy: Policy, dtype: torch.dtype):
        rng = np.random.default_rng(0)
        length = min(_PROBE_TOKENS, policy.context - 1)
        self.probe = Probe(torch.from_numpy(rng.integers(0, policy.entries, length)), None)
        self.tolerance = float("inf")
        self._servers, self._dtype, self._everywhere = servers, dtype, policy.workers.everywhere
        self._first: float | None = None

    def publish(self, policy: Policy) -> int:
        """Write the folder, and have each server read it and prove it; see `Publisher`."""
        if self._first is None and policy.peft is None:
            self._rehearse(policy)
        share = self._give(policy, f"{policy.version}")
        self._first = share if self._first is None else self._first
        return policy.version

    def _rehearse(self, policy: Policy) -> None:
        """Give the servers other weights first. So the first publication shows whether they reload
        all tensors rightly: what a step changes may be less than bfloat16 can show.
        """
        self._everywhere(_multiply_matrices, policy, 0.5)
        try:
            self._give(policy, "rehearsal")
        finally:
            self._everywhere(_multiply_matrices, policy, 2.0)

    def _give(self, policy: Policy, name: str) -> float:
        """Publish; how far the farthest server is, in shares of the largest log-prob."""
        scores = self._everywhere(score, policy, self.probe)
        largest = max(1.0, scores.abs().max().item())
        known = NOISE[self._dtype] if self._first is None else _MARGIN * self._first
        self.tolerance = max(_FLOOR, min(NOISE[self._dtype], known) * largest)
        label = f"{self._servers.run}-{name}"
        target = self._servers.folder / label
        with replacing(target) as building:
            building.mkdir(parents=True)
            # No name for them: while servers read, the host's memory is theirs.
            save_weights(policy, building, self._everywhere(whole_weights_to_store, policy))
        write_whole(target / "READY", label)
        probed = self.probe.tokens.tolist(), scores.tolist(), self.tolerance
        dtype, lora = str(self._dtype).removeprefix("torch."), ("", 0)
        if policy.peft is not None:
            lora = policy.source, policy.peft.peft_config[policy.peft.active_adapter].r
        new = Publication(policy.version, label, target, *probed, dtype, policy.context, *lora)
        self._servers.ask(self._servers.publish(new)).result()
        self._servers.forget(self._servers.run, _KEPT)
        return self._servers.farthest.distance / largest

    def expected(self, policy: Policy) -> tuple[Policy, dict[str, torch.Tensor]]:
        """The trainer's own scores are what a server must reproduce; see `Publisher`."""
        return policy, {}


@torch.no_grad()
def _multiply_matrices(policy: Policy, factor: float) -> None:
    """Multiply all weights but vectors. By a power of 2: dividing again gives the same bits."""
    for weight in policy.lm.parameters():
        if weight.dim() > 1:
            weight.mul_(factor)
