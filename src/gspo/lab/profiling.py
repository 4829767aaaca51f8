"""`--profile`: where a step's time goes, and how much of it only the arithmetic would need.

Times are those of the spans (`gspo.core.timing`), operations those of `gspo.lab.flops`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from gspo.core.files import strict_json, write_whole
from gspo.core.timing import Clock
from gspo.data.packing import Microbatch
from gspo.kernels.logprob import Head
from gspo.lab.flops import Flops, head_flops
from gspo.lab.text_table import as_text, table
from gspo.policy.load import Policy


def peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """Operations per second of a large square matrix product, the fastest of several.

    It has as many threads as the calling thread. Products of 1024 on the CPU, of 8192 on a GPU.
    """
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    threads = torch.get_num_threads()
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads)
    return 2.0 * size**3 / min(timer.blocked_autorange(min_run_time=seconds).times)


@dataclass(frozen=True)
class Phase:
    """A line of the table, over all steps.

    Attributes:
        seconds: of wall time; that of the phases inside it is left out.
        share: of all steps' time.
        calls: how often it was entered.
        flops: operations of its matrix products.
        floor_seconds: what those would take at the measured peak.
        of_peak: floor_seconds / seconds; None if nothing is counted.
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
        phases: in the order in which they were first entered, `other` the last.
    """

    steps: int
    seconds: float
    floor_seconds: float
    peak: dict[str, float]
    device: str
    threads: int
    phases: tuple[Phase, ...]

    def write(self, run: Path) -> Path:
        """Write `profile.json` and `profile.txt` into the run's folder; return the first."""
        path = run / "profile.json"
        write_whole(path, strict_json(asdict(self), indent=1) + "\n")
        write_whole(run / "profile.txt", render(self))
        return path


class Profile:
    """Times the steps of one process by its `clock`, and counts their operations.

    They are counted from the positions of the tokens that are really computed, if a forward pass
    begins; those of the backward pass belong to the `backward` span.
    """

    def __init__(self) -> None:
        self.clock = Clock("step")
        self._peak: dict[str, float] = {}
        self._device = torch.device("cpu")
        self._threads = 1

    def attach(self, trainer: Policy, engine: Policy) -> None:
        """Measure the machine, and see what these two compute. In the thread that computes."""
        self._device = trainer.device
        self._threads = torch.get_num_threads()
        if self._device.type == "cuda":
            self.clock.sync = torch.cuda.synchronize
        for dtype in {_dtype(trainer), _dtype(engine), torch.float32}:
            self._peak[_name(dtype)] = peak_flops(dtype, self._device)
        self._watch_trainer(trainer)
        self._watch_engine(engine)

    def _watch_trainer(self, trainer: Policy) -> None:
        clock, sizes, kind = self.clock, Flops.of(trainer), _name(_dtype(trainer))

        def forward(policy: Policy, batch: Microbatch, *_: Any, **__: Any) -> None:
            # The frozen reference of a KL term has the trainer's sizes, and no backward pass.
            clock.count("forward", kind, sizes.forward(batch.positions))
            if torch.is_grad_enabled():
                clock.count("backward", kind, sizes.backward(batch.positions))

        def head(hidden: Tensor, head: Head, *_: Any, **__: Any) -> None:
            forward, backward = head_flops(head, len(hidden), grad=torch.is_grad_enabled())
            clock.count("head", "float32", forward)
            clock.count("backward", "float32", backward)

        clock.watch("forward", forward)
        clock.watch("head", head)

    def _watch_engine(self, engine: Policy) -> None:
        clock, sizes, kind = self.clock, Flops.of(engine), _name(_dtype(engine))

        def begins(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if clock.inside("sampling"):  # the model may be the trainer's too
                positions = kwargs["position_ids"]
                clock.count("sampling", kind, sizes.forward(positions))
                # The engine projects the last position of each completion, in float32.
                head, _ = head_flops(engine.head, len(positions), grad=False)
                clock.count("sampling", "float32", head)

        engine.backbone.register_forward_pre_hook(begins, with_kwargs=True)

    def report(self) -> ProfileReport:
        """The steps so far."""
        clock = self.clock
        total = sum(clock.seconds.values())
        spans = [name for name in clock.calls if name != clock.root]  # as they were first entered
        phases = [self._phase(name, name, total) for name in spans]
        if total:
            phases.append(self._phase("other", clock.root, total))
        on_gpu = self._device.type == "cuda"
        return ProfileReport(
            steps=clock.calls[clock.root],
            seconds=total,
            floor_seconds=sum(phase.floor_seconds for phase in phases),
            peak=dict(sorted(self._peak.items())),
            device=torch.cuda.get_device_name(self._device) if on_gpu else self._device.type,
            threads=self._threads,
            phases=tuple(phases),
        )

    def _phase(self, name: str, span: str, total: float) -> Phase:
        clock = self.clock
        counts = {kind: n for (counted, kind), n in clock.counts.items() if counted == span}
        floor = sum(n / self._peak[kind] for kind, n in counts.items())
        seconds, flops = clock.seconds[span], sum(counts.values())
        of_peak = floor / seconds if counts and seconds else None
        return Phase(name, seconds, seconds / total, clock.calls[span], flops, floor, of_peak)


def _dtype(policy: Policy) -> torch.dtype:
    """What the layers compute in: under autocast its type, else the type of the weights."""
    if policy.compute_dtype != torch.float32:
        return policy.compute_dtype
    return next(policy.lm.parameters()).dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def render(report: ProfileReport) -> str:
    """The report as text: a line for each phase, per step; at most 100 columns wide."""
    if report.steps == 0:
        return "profile: no step was trained, so there is nothing to profile\n"
    peak = ", ".join(f"{rate / 1e9:,.1f} GFLOP/s in {name}" for name, rate in report.peak.items())
    line = (
        f"profile, per step of {report.steps}; a matrix product on {report.device} with threads="
        f"{report.threads} reaches {peak}"
    )
    flops = sum(phase.flops for phase in report.phases)
    whole = report.floor_seconds / report.seconds
    step = Phase("step", report.seconds, 1.0, 0, flops, report.floor_seconds, whole)
    names = ("phase", "calls", "ms", "share", "GFLOP", "ms at peak", "of peak")
    shown = table(names, [_cells(p, report.steps) for p in report.phases])
    shown.show_footer = True
    for column, footer in zip(shown.columns, _cells(step, report.steps), strict=True):
        column.footer = footer
    return as_text([line, shown], width=100)


def _cells(phase: Phase, steps: int) -> list[str]:
    cells = [
        phase.name,
        f"{phase.calls / steps:,.4g}" if phase.calls else "",
        f"{1e3 * phase.seconds / steps:,.1f}",
        f"{phase.share:.1%}",
    ]
    if phase.of_peak is None:
        return [*cells, "", "", ""]
    floor = 1e3 * phase.floor_seconds / steps
    return [*cells, f"{phase.flops / steps / 1e9:,.3f}", f"{floor:,.1f}", f"{phase.of_peak:.1%}"]
