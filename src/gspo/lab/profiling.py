"""`--profile`: where a step's time goes, and how much of it only the arithmetic would need.

Times are those of the spans (`gspo.core.timing`), operations those of `gspo.lab.flops`.
"""

from __future__ import annotations

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
from gspo.lab.tables import as_text, cells, table
from gspo.policy.load import Policy

_COLUMNS = ("phase", "calls", "ms", "share", "GFLOP", "ms_at_peak", "of_peak")


def peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """Operations per second of a large square matrix product, the fastest of several.

    It has as many threads as the calling thread. Products of 1024 on the CPU, of 8192 on a GPU.
    """
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    threads = torch.get_num_threads()
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads)
    return 2.0 * size**3 / min(timer.blocked_autorange(min_run_time=seconds).times)


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
        for kind in {_dtype(trainer), _dtype(engine), "float32"}:
            self._peak[kind] = peak_flops(getattr(torch, kind), self._device)
        self._watch_trainer(trainer)
        self._watch_engine(engine)

    def _watch_trainer(self, trainer: Policy) -> None:
        clock, sizes, kind = self.clock, Flops.of(trainer), _dtype(trainer)

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
        clock, sizes, kind = self.clock, Flops.of(engine), _dtype(engine)

        def begins(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if clock.inside("sampling"):  # the model may be the trainer's too
                positions = kwargs["position_ids"]
                clock.count("sampling", kind, sizes.forward(positions))
                # The engine projects the last position of each completion, in float32.
                head, _ = head_flops(engine.head, len(positions), grad=False)
                clock.count("sampling", "float32", head)

        engine.backbone.register_forward_pre_hook(begins, with_kwargs=True)

    def report(self) -> dict[str, Any]:
        """Report the steps so far, as profile.json has it.

        Returns:
            `steps` and their `seconds`; the `peak`, measured operations per second of a matrix
            product by its type; the `device` and `threads` of the run; and the `phases`, as they
            were first entered, `other` the last. Of a phase, over all steps: `seconds` without
            those of the phases inside it, their `share`, `calls`, the `flops` of its matrix
            products, the `floor_seconds` that these would take at the peak, and `of_peak`, the
            ratio of the two; None if nothing is counted. `floor_seconds` of the report is the sum.
        """
        clock = self.clock
        total = sum(clock.seconds.values())
        spans = {name: name for name in clock.calls if name != clock.root}
        spans |= {"other": clock.root} if total else {}
        phases = [self._phase(name, span, total) for name, span in spans.items()]
        on_gpu = self._device.type == "cuda"
        return {
            "steps": clock.calls[clock.root],
            "seconds": total,
            "floor_seconds": sum(phase["floor_seconds"] for phase in phases),
            "peak": dict(sorted(self._peak.items())),
            "device": torch.cuda.get_device_name(self._device) if on_gpu else self._device.type,
            "threads": self._threads,
            "phases": phases,
        }

    def _phase(self, name: str, span: str, total: float) -> dict[str, Any]:
        clock = self.clock
        counts = {kind: n for (counted, kind), n in clock.counts.items() if counted == span}
        floor = sum(n / self._peak[kind] for kind, n in counts.items())
        seconds = clock.seconds[span]
        return {
            "name": name,
            "seconds": seconds,
            "share": seconds / total,
            "calls": clock.calls[span],
            "flops": sum(counts.values()),
            "floor_seconds": floor,
            "of_peak": floor / seconds if counts and seconds else None,
        }


def _dtype(policy: Policy) -> str:
    """What the layers compute in: under autocast its type, else the type of the weights."""
    own = next(policy.lm.parameters()).dtype
    dtype = own if policy.compute_dtype == torch.float32 else policy.compute_dtype
    return str(dtype).removeprefix("torch.")


def write_profile(report: dict[str, Any], run: Path) -> Path:
    """Write `profile.json` and `profile.txt` into the run's folder; return the first."""
    path = run / "profile.json"
    write_whole(path, strict_json(report, indent=1) + "\n")
    write_whole(run / "profile.txt", render(report))
    return path


def render(report: dict[str, Any]) -> str:
    """The report as text: a line for each phase, per step; at most 100 columns wide."""
    steps = report["steps"]
    if steps == 0:
        return "profile: no step was trained, so there is nothing to profile\n"
    peak = [f"{rate / 1e9:,.1f} GFLOP/s in {name}" for name, rate in report["peak"].items()]
    line = (
        f"profile, per step of {steps}; a matrix product on {report['device']} with "
        f"threads={report['threads']} reaches {', '.join(peak)}"
    )
    whole = report | {"name": "step", "calls": steps, "share": 1.0}
    whole["flops"] = sum(phase["flops"] for phase in report["phases"])
    whole["of_peak"] = report["floor_seconds"] / report["seconds"]
    rows = []
    for phase in (*report["phases"], whole):
        row = {"phase": phase["name"], "share": phase["share"], "of_peak": phase["of_peak"]}
        row |= {"calls": phase["calls"] / steps, "ms": 1e3 * phase["seconds"] / steps}
        if phase["of_peak"] is not None:
            row["GFLOP"] = phase["flops"] / steps / 1e9
            row["ms_at_peak"] = 1e3 * phase["floor_seconds"] / steps
        rows.append(row)
    return as_text([line, table(cells(_COLUMNS, rows))], width=100)
