"""What a piece of work does on the device: kernels, launches, and where the host waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_parts.bench import Card
from gspo.core.timing import Clock, timing
from gspo.data.packing import Microbatch
from gspo.policy.policy import Policy

TOP = 30
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_COPIES = ("Memcpy", "Memset")


class Profiled:
    """torch.profiler around what happens between `start` and `stop`.

    On a GPU it sees kernels and calls of CUDA, not torch's operators: one such event in three, and
    a host that is slowed down less.
    """

    def __init__(self, card: Card):
        self._card = card
        self._on_gpu = card.device == "cuda"
        kind = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
        self._profile = profile(activities=[kind])

    def start(self) -> None:
        """Begin, once the device is idle."""
        self._card.synchronize()
        self._profile.start()

    def stop(self) -> None:
        """End, once the device is idle. That wait is one of the `waits`."""
        self._card.synchronize()
        self._profile.stop()

    def counts(self, per: int = 1) -> dict[str, Any]:
        """See `counted`."""
        # The raw events: torch's table of them takes seconds to make.
        results = getattr(self._profile.profiler, "kineto_results", None)
        assert results is not None, "the profiler was not started and stopped"
        events = [
            Event(event.name(), event.device_type().name == "CUDA", event.duration_ns() / 1e9)
            for event in results.events()
            if not event.is_user_annotation()  # such a span covers kernels that are there too
        ]
        return counted(events, on_gpu=self._on_gpu, per=per)


class Event(NamedTuple):
    """What the profiler saw: a kernel or a copy on the device, or a call of the host."""

    name: str
    on_device: bool
    seconds: float


def counted(events: Sequence[Event], *, on_gpu: bool, per: int = 1) -> dict[str, Any]:
    """Sums over events, divided by `per`, the number of equal pieces of work that they are of.

    Returns:
        On a GPU: `kernels` and their `kernels_s`; `copies`, `launches` and `waits` by name; `top`,
        the kernels that took longest, as [name, seconds, count]. On the CPU: `operations`, and
        `top` of them, those that they call included; the rest is None.
    """
    if not on_gpu:
        operations = [e for e in events if e.name.startswith("aten::")]
        out: dict[str, Any] = {"operations": len(operations) / per, "top": _top(operations, per)}
        return out | dict.fromkeys(("kernels", "kernels_s", "copies", "launches", "waits"))
    copies = [e for e in events if e.on_device and e.name.startswith(_COPIES)]
    kernels = [e for e in events if e.on_device and not e.name.startswith(_COPIES)]
    calls = [e for e in events if not e.on_device]
    return {
        "kernels": len(kernels) / per,
        "kernels_s": sum(e.seconds for e in kernels) / per,
        "copies": _by_name(copies, per),
        "launches": _by_name([e for e in calls if e.name in _LAUNCHES], per),
        "waits": _by_name([e for e in calls if e.name in _WAITS], per),
        "top": _top(kernels, per),
    }


def _by_name(events: Sequence[Event], per: int) -> dict[str, float]:
    return {name: n / per for name, n in Counter(e.name for e in events).items()}


def _top(events: Sequence[Event], per: int) -> list[list[Any]]:
    seconds: Counter[str] = Counter()
    for event in events:
        seconds[event.name] += event.seconds  # pyright: ignore[reportArgumentType]
    calls = Counter(event.name for event in events)
    return [[name[:120], own / per, calls[name] / per] for name, own in seconds.most_common(TOP)]


def profiled(work: Callable[[], object], card: Card) -> dict[str, Any]:
    """What one call does."""
    measured = Profiled(card)
    measured.start()
    try:
        work()
    finally:
        measured.stop()
    return measured.counts()


@contextmanager
def phases(card: Card) -> Iterator[dict[str, Any]]:
    """Charge what happens inside to gspo's own spans, waiting for the device at each border.

    Yields a dict that is filled in at the end: seconds and calls by span, and the microbatches
    that went through the trainer's forward pass. The waits make the whole slower than otherwise.
    """
    measured: dict[str, Any] = {"microbatches": []}
    clock = Clock(sync=card.synchronize)
    microbatches = measured["microbatches"]
    logprobs = Policy.logprobs

    def seen(policy: Policy, microbatch: Microbatch, *args: Any, **kwargs: Any) -> Any:
        microbatches.append(microbatch)
        return logprobs(policy, microbatch, *args, **kwargs)

    with mock.patch.object(Policy, "logprobs", seen), timing(clock), clock.span("step"):
        yield measured
    measured["seconds"] = dict(clock.seconds)
    measured["calls"] = dict(clock.calls)


def host_share(counts: dict[str, Any], seconds: float) -> float | None:
    """Share of the time, measured without the profiler, in which no kernel runs."""
    kernels = counts["kernels_s"]
    return None if kernels is None else max(0.0, 1 - kernels / seconds)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside, float32 matrix products run at torch's `name` precision: highest, high or medium."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Casts(TorchDispatchMode):
    """Counts what is copied to another type of floats while it is on, in both passes.

    Attributes:
        count, elements: of all copies.
        weights: those of whole parameters.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        self._weights = {p.data_ptr() for p in policy.lm.parameters()}
        self.count = self.elements = self.weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype
        if copied and args[0].is_floating_point() and out.is_floating_point():
            self.count += 1
            self.elements += args[0].numel()
            self.weights += args[0].data_ptr() in self._weights
        return out
