"""`--profile`: where a step's time goes, and how much of it the arithmetic alone would need."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gspo.core.files import strict_json, write_whole
from gspo.core.timing import Clock
from gspo.data.packing import PackedBatch
from gspo.kernels.logprob import Head
from gspo.lab.flops import Flops, head_flops
from gspo.policy.policy import Policy

PHASES = (
    "sampling",
    "rollout",
    "packing",
    "forward",
    "head",
    "backward",
    "optimizer",
    "publish",
    "checkpoint",
)
"""Spans of a step, in their order; the rest of it is `other`."""


@dataclass(frozen=True)
class Phase:
    """One row of the table, over all steps.

    Attributes:
        seconds: of wall time, in which no other phase's is.
        share: of all steps' time.
        calls: how often it was entered.
        flops: operations of its matrix products.
        floor_seconds: what those would take at the measured peak.
        of_peak: floor_seconds / seconds; None where nothing is counted.
    """

    name: str
    seconds: float
    share: float
    calls: int
    flops: float
    floor_seconds: float
    of_peak: float | None


@dataclass(frozen=True)
class ProfileReport:
    """What `profile.json` holds.

    Attributes:
        steps: that were timed.
        seconds: of them all; the phases' add up to it.
        peak: measured operations per second of a matrix product, by its type.
        device, threads: where it was measured, and the run computed.
        phases: their rows, `other` the last.
    """

    steps: int
    seconds: float
    floor_seconds: float
    peak: dict[str, float]
    device: str
    threads: int
    phases: tuple[Phase, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, lists and texts."""
        return asdict(self)

    def write(self, run: Path, text: str) -> Path:
        """`profile.json` and `profile.txt` in the run's folder; returns the first."""
        path = run / "profile.json"
        write_whole(path, strict_json(self.as_json(), indent=1) + "\n")
        write_whole(run / "profile.txt", text)
        return path


class Profile:
    """Times the steps of one process, and counts their operations.

    Operations are counted where a model's forward pass begins, from the positions of the tokens
    that it really computes; those of the backward pass belong to the `backward` span.
    """

    def __init__(self) -> None:
        self.clock = Clock("step")
        self._flops: dict[int, Flops] = {}
        self._peak: dict[str, float] = {}
        self._device = torch.device("cpu")
        self._threads = 1

    def attach(self, trainer: Policy, engine: Policy) -> None:
        """Measure the machine, and see what these two compute. In the thread that computes.

        Raises:
            ModelError: see `Flops.of`.
        """
        self._device = trainer.device
        self._threads = torch.get_num_threads()
        if self._device.type == "cuda":
            self.clock.sync = torch.cuda.synchronize
        for dtype in {_dtype(trainer), _dtype(engine), torch.float32}:
            self._peak[_name(dtype)] = peak_flops(dtype, self._device)
        for policy in (trainer, engine):
            self._watch(policy)
        self.clock.watch("forward", self._forward)
        self.clock.watch("head", self._head)

    def report(self) -> ProfileReport:
        """The steps so far."""
        clock = self.clock
        total = sum(clock.seconds.values())
        known = [self._phase(name, name, total) for name in PHASES if clock.calls[name]]
        phases = (*known, self._phase("other", clock.root, total)) if total else ()
        return ProfileReport(
            steps=clock.calls[clock.root],
            seconds=total,
            floor_seconds=sum(phase.floor_seconds for phase in phases),
            peak=dict(sorted(self._peak.items())),
            device=_device_name(self._device),
            threads=self._threads,
            phases=phases,
        )

    def _phase(self, name: str, span: str, total: float) -> Phase:
        clock = self.clock
        counts = {kind: n for (own, kind), n in clock.counts.items() if own == span}
        floor = sum(n / self._peak[kind] for kind, n in counts.items())
        seconds = clock.seconds[span]
        return Phase(
            name=name,
            seconds=seconds,
            share=seconds / total,
            calls=clock.calls[span],
            flops=sum(counts.values()),
            floor_seconds=floor,
            of_peak=floor / seconds if counts and seconds else None,
        )

    def _watch(self, policy: Policy) -> Flops:
        """Count whatever this policy's layers compute from now on."""
        known = self._flops.get(id(policy.lm))
        if known is not None:
            return known
        sizes, kind = Flops.of(policy), _name(_dtype(policy))

        def begins(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            positions = kwargs["position_ids"]
            if self.clock.inside("sampling"):
                self.clock.count("sampling", kind, sizes.forward(positions))
                # The engine projects the last position of each row, in float32.
                head, _ = head_flops(policy.head, len(positions), grad=False)
                self.clock.count("sampling", "float32", head)
                return
            self.clock.count("forward", kind, sizes.forward(positions))
            if torch.is_grad_enabled():
                self.clock.count("backward", kind, sizes.backward(positions))

        policy.backbone.register_forward_pre_hook(begins, with_kwargs=True)
        self._flops[id(policy.lm)] = sizes
        return sizes

    def _forward(self, policy: Policy, batch: PackedBatch, *_: Any, **__: Any) -> None:
        """A KL term's reference is loaded when it is first needed."""
        self._watch(policy)

    def _head(self, hidden: torch.Tensor, head: Head, *_: Any, **__: Any) -> None:
        forward, backward = head_flops(head, len(hidden), grad=torch.is_grad_enabled())
        self.clock.count("head", "float32", forward)
        if torch.is_grad_enabled():
            self.clock.count("backward", "float32", backward)


def peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """Operations per second of the fastest of several square matrix products, measured here.

    With as many threads as the calling one has. Products of 1024 on the CPU, of 8192 on a GPU.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < until:
        started = _now(device)
        torch.mm(a, a)
        best = min(best, _now(device) - started)
        rounds += 1
    return 2.0 * size**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _dtype(policy: Policy) -> torch.dtype:
    """What the layers compute in: under autocast its type, else the weights' own."""
    if policy.compute_dtype != torch.float32:
        return policy.compute_dtype
    return next(policy.lm.parameters()).dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
