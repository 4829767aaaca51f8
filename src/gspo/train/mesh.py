"""The processes (ranks) that train one model together; nothing else reads RANK and WORLD_SIZE.

The weights are divided among the ranks (FSDP2, see `hf.sharding`). Every rank makes the same plan
of microbatches from the same seed, computes every `size`-th of them, and then knows the results of
all: loss, metrics and traces are those of one process, and whoever makes them knows of no ranks.

A rank without a microbatch in a turn computes another one's and counts it 0 times, since a layer's
weights come together only if all ranks ask for them. An error on one rank therefore leaves the
others waiting: `Mesh.together` finds out whose it was, by notes that the ranks leave in the
rendezvous's store, and every rank ends with its name and host.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from threading import Thread, main_thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from gspo.core.errors import ConfigError, MissingDependencyError, RunError
from gspo.core.log import log
from gspo.kernels.sharded import reshard
from gspo.kernels.token_parts import TokenParts
from gspo.policy.workers import Workers

A = TypeVar("A")
B = TypeVar("B")

LIMIT = 600.0
"""Seconds that a rank waits for another one inside a step."""
IDLE = 24 * 3600.0
"""Seconds that a rank waits for work, which is what sampling may take."""
GRACE = 5.0
"""Seconds after an error in which the other ranks may say that they had one too."""
_PAUSE = 0.2
"""Seconds between two looks whether a rank was lost."""
_OF_OTHERS = re.compile("gloo|NCCL|[Cc]onnection|[Tt]ime(d |)out|Broken pipe|to (recv|send)")
"""What torch's errors say that come of another rank; any other RuntimeError is this one's own."""
_SAME = ("gspo", "torch", "transformers", "peft")
"""What has one version on all ranks, or is missing on all."""
_STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_ranks() -> int | None:
    """How many ranks torchrun has started, this one included; None: it has not started this one.

    Raises:
        ConfigError: only a part of what it sets is set.
    """
    given = {name: os.environ.get(name) for name in _STARTED}
    if given["RANK"] is None and given["WORLD_SIZE"] is None:
        return None
    if None in given.values():
        raise ConfigError(f"{given}: start the script with torchrun, which sets all, or unset them")
    return int(given["WORLD_SIZE"] or 0)


class Mesh(Workers):
    """This rank among the others. Made on all of them at the same time; call `close` on all.

    Attributes:
        rank, size: this one, of how many.
        hosts: the name of each rank's machine.
        limit: seconds that one rank waits for another inside a step.
        broken: why the ranks cannot go on; empty if they can.
        closing: whether the first rank's script ends already, so that it needs no signal.

    Args:
        limit: see below.
        settings: by name, what all ranks must have been given alike.

    Raises:
        ConfigError: a rank did not come, or has another setting or version of a package.
        MissingDependencyError: transformers is too old.
    """

    def __init__(self, limit: float = LIMIT, settings: Mapping[str, str] | None = None):
        super().__init__()
        if tuple(map(int, version("transformers").split(".")[:2])) < (5, 24):
            raise MissingDependencyError("transformers>=5.24", "cluster", "more than one process")
        on_gpu, wait = torch.cuda.is_available(), timedelta(seconds=limit)
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        here, self.hosts = socket.gethostname(), []
        try:
            self._store, self.rank, self.size = next(rendezvous("env://", timeout=wait))
            mine = {name: version(name) for name in _SAME if find_spec(name)}
            mine |= {"ranks": self.size, "GPU": on_gpu, **(settings or {})}
            self._store.set(f"rank {self.rank}", json.dumps([here, mine]))
            for other in range(self.size):  # torch's error names the key, so who is late
                there, told = json.loads(self._store.get(f"rank {other}"))
                self.hosts.append(there)
                if told != mine:  # a group would not be made, or be one that waits for ever
                    odd = [name for name in {**mine, **told} if mine.get(name) != told.get(name)]
                    ours, theirs = ({n: facts.get(n) for n in odd} for facts in (mine, told))
                    raise ConfigError(
                        f"rank {self.rank} ({here}) has {ours}, but rank {other} ({there}) "
                        f"{theirs}: start the same number everywhere with the same settings, and "
                        "install the same on machines of one kind"
                    )
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=distributed_c10d.PrefixStore("gspo-group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=wait,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {here} waited "
                f"up to {limit:.0f} s at {where} for the other ranks: {error}. Give every "
                "machine the same number of machines, and an address that all of them reach"
            ) from None
        # A model that is divided makes groups of its own, in which torch waits for 30 minutes.
        distributed_c10d.default_pg_timeout = wait
        distributed_c10d.default_pg_nccl_timeout = wait  # pyright: ignore[reportPrivateImportUsage]
        self.checkpoint_group = dist.new_group(backend="gloo", timeout=wait)
        self.count, self.limit, self._calls = self.size, limit, 0
        self._counts, self.broken, self.closing = True, "", False
        Thread(target=self._answer, args=[self.other_store()]).start()

    def divide(self, cp_size: int, ep_size: int) -> None:
        """Let so many neighbouring ranks compute a microbatch together, each a part of its length,
        and so many share one set of experts. Called on all ranks, before a model is loaded."""
        self.count, self.ep_size = self.size // cp_size, ep_size
        if cp_size > 1 and self.parts.size == 1:
            starts, wait = range(0, self.size, cp_size), timedelta(seconds=self.limit)
            groups = [dist.new_group(range(s, s + cp_size), timeout=wait) for s in starts]
            self.parts = TokenParts(self.rank % cp_size, cp_size, groups[self.rank // cp_size])

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """Call the function with each item on one rank, or on those that divide a microbatch's
        tokens; every rank gets all results, in order."""
        own, team = [], self.rank // self.parts.size
        for turn in range(0, len(items), self.count):
            self._counts = turn + team < len(items)
            result = function(items[turn + team if self._counts else turn])
            own += [result] * (self._counts and self.parts.rank == 0)
        results = self.gather(own)[:: self.parts.size]
        return [results[i % self.count][i // self.count] for i in range(len(items))]

    def backward(self, loss: Tensor) -> None:
        # FSDP takes the mean over the ranks; the losses of microbatches are to be added up. Ranks
        # that divide a microbatch have the same loss, see `TokenParts`.
        (loss * (self.count * self._counts)).backward()

    def finish(self, lm: torch.nn.Module) -> None:
        """Free the gathered weights, so that the optimizer and whoever reads sees each rank's part;
        add up gradients of weights that are whole on each rank, such as adapters."""
        reshard(lm)
        whole = [p.grad for p in lm.parameters() if not isinstance(p.grad, DTensor | None)]
        if whole:
            together = torch.cat([gradient.flatten() for gradient in whole])
            dist.all_reduce(together)
            parts = (together / self.size).split([gradient.numel() for gradient in whole])
            for gradient, part in zip(whole, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def share(self, value: A) -> A:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: A) -> list[A]:
        """The values of all ranks, on each of them. Tensors arrive on the device of this one."""
        written = io.BytesIO()
        torch.save(value, written)
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, written.getvalue())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return [torch.load(io.BytesIO(t), device, weights_only=False) for t in texts]  # our own

    def agree(self, name: str, value: object, remedy: str) -> None:
        """Refuse to go on, on every rank, unless all have the same value.

        Raises:
            ConfigError: names the ranks, their hosts and what they have.
        """
        values = [str(one) for one in self.gather(value)]
        if len(set(values)) > 1:
            told = [f"rank {r} ({self.hosts[r]}): {v}" for r, v in enumerate(values)]
            raise ConfigError(f"{name} is not the same on all ranks: {'; '.join(told)}: {remedy}")

    def await_work(self) -> None:
        """Wait until the first rank calls `together`, for up to `IDLE` seconds.

        Raises:
            RunError: it doesn't, or it has ended.
        """
        try:
            self._store.wait([f"call-{self._calls}"], timedelta(seconds=IDLE))
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} ({self.hosts[self.rank]}) waited for work from rank 0 "
                f"({self.hosts[0]}): it or its torchrun ended or gave none in {IDLE:.0f} s: {error}"
            ) from None

    def together(self, work: Callable[[], B]) -> B:
        """Do the same work on every rank.

        Returns:
            What it returned here. What all ranks raise alike, such as that a loss is NaN, is raised
            too, and they can go on.

        Raises:
            RunError: a rank failed or ended, which is named with its host; no rank can go on.
        """
        if self.broken:
            raise RunError(self.broken)
        number, self._calls = self._calls, self._calls + 1
        failed: Exception | None = None
        result: Any = None
        try:
            self._store.set(f"call-{number}", "")
            result = work()
            dist.barrier()  # else the end of one in work that exchanges nothing shows at the limit
        except Exception as error:
            failed = error
        lost = isinstance(failed, RuntimeError) and bool(_OF_OTHERS.search(str(failed)))
        kind = "" if failed is None else "lost" if lost else type(failed).__name__
        try:
            if failed is not None:
                self._store.set("asked", str(number))
            self._store.set(f"{number}-{self.rank}", json.dumps([kind, str(failed)]))
            notes = self._notes(number, GRACE if failed else self.limit)
            kinds = {note[0] for note in notes.values()} - {"lost"}
            if len(notes) < self.size or kinds != {kind}:
                # Whoever knows first says it: that one ends, and others may find only that.
                told = self._whose_fault(number, notes)
                self.broken = self._store.compare_set("broken", "", told).decode()
        except RuntimeError:  # the store has ended with whoever has it
            self.broken = self._ends({0: "ended, or its torchrun has"})
        if self.broken:
            raise RunError(self.broken) from failed
        if failed is not None:
            raise failed
        return result

    def other_store(self) -> Any:
        """What the ranks tell one another, for another thread: while one waits, it is locked."""
        return self._store.clone()  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _notes(self, number: int, seconds: float) -> dict[int, list[str]]:
        """What each rank says of a call's end; those that say nothing for so long are left out."""
        notes: dict[int, list[str]] = {}
        store, end = self._store, time.monotonic() + seconds
        while len(notes) < self.size and time.monotonic() < end and not store.check(["broken"]):
            for rank in range(self.size):
                if rank not in notes and store.check([f"{number}-{rank}"]):
                    notes[rank] = json.loads(store.get(f"{number}-{rank}"))
                    if notes[rank][0]:  # an error: whoever has none yet waits no longer
                        end = min(end, time.monotonic() + GRACE)
            time.sleep(0.002)
        return notes

    def _whose_fault(self, number: int, notes: dict[int, list[str]]) -> str:
        raised = {r: f"{k}: {text}" for r, (k, text) in notes.items() if k not in ("", "lost")}
        silent = {r: "ended, or hangs" for r in range(self.size) if r not in notes}
        # Whoever answers and is silent waits for one that doesn't: not all see at once who ended.
        # What others raise then may be no more than that they have lost it.
        gone = {r: t for r, t in silent.items() if not self._store.check([f"lives-{number}-{r}"])}
        others = {r: text for r, (kind, text) in notes.items() if kind == "lost"}
        return self._ends(gone or raised or silent or others)

    def _answer(self, store: Any) -> None:
        """Say that this process lives, even if it waits; the first rank takes others' signals."""
        with suppress(RuntimeError):  # the store has ended with the first rank, or its torchrun
            # A thread that is still inside torch when Python ends would abort the process.
            while main_thread().is_alive() and dist.is_initialized():
                if store.check(["asked"]):
                    store.set(f"lives-{store.get('asked').decode()}-{self.rank}", "")
                if self.rank == 0 and store.check(["signal"]):
                    store.set("lives-signal", "")
                    if not self.closing:
                        self.closing = True
                        rank, number = map(int, store.get("signal").split())
                        told = rank, self.hosts[rank], signal.Signals(number).name
                        log.warning("rank %d (%s) was told to end by %s, so all ranks end", *told)
                        signal.pthread_kill(main_thread().ident or 0, number)  # wakes that thread
                time.sleep(_PAUSE)

    def _ends(self, faults: Mapping[int, str]) -> str:
        told = [f"rank {rank} ({self.hosts[rank]}): {why}" for rank, why in faults.items()]
        return (
            f"{'; '.join(told)}. The ranks train one model together, so all of them end. Mend that "
            "and start the same command again: it goes on from the last checkpoint"
        )
