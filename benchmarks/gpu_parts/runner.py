"""Run parts one after the other, whatever happens to each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._dynamo import utils

from gpu_parts.bench import Bench, Card, OutOfTime, free, numbers, short, time_limit


class Part(Protocol):
    """See `gpu_suite.Part`."""

    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    def how(self) -> str: ...
    def measure(self, bench: Bench) -> None: ...


def run_all(
    parts: Sequence[Part],
    card: Card,
    out: Path,
    head: dict[str, Any],
    *,
    total: float,
    tiny: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the parts and return a summary of each; `summary.json` grows with them.

    Args:
        parts: in their order.
        card: where they compute.
        out: folder of the results.
        head: what each file says first: device, versions.
        total: seconds for all of them.
        tiny: sizes of a toy.
        say: told of the progress.
    """
    started, lost = time.monotonic(), None
    results: list[dict[str, Any]] = []
    summary = Bench(card, out / "summary.json", head)
    for part in parts:
        seconds = min(part.seconds, total - (time.monotonic() - started))
        path = out / f"{part.name}.json"
        bench = Bench(card, path, {"part": part.name}, seconds=seconds, say=say, tiny=tiny)
        began, before = time.monotonic(), compiled()
        status, error = "not run", lost or "the time of all parts was over"
        if lost is None and seconds > 0:
            say(f"{part.name}: at most {seconds:.0f} s")
            bench.write(**head, status="running")
            status, error = run_part(part, bench)
            lost = device_lost(card)
        result = {
            "part": part.name,
            "status": status,
            "error": error,
            "seconds": time.monotonic() - began,
            "budget_s": part.seconds,
            "compiled": _since(before),
            "failed": [row["what"] for row in bench.rows if "error" in row],
            "wrong": [row["what"] for row in bench.rows if row.get("ok") is False],
        }
        bench.write(**head, **result)
        figures = {row["what"]: numbers(row) for row in bench.rows}
        results.append(result | {"figures": figures})
        summary.write(seconds=time.monotonic() - started, parts=results)
    return results


def run_part(part: Part, bench: Bench) -> tuple[str, str | None]:
    """Run one part within its time. Returns how it ended, and why not well."""
    torch.manual_seed(0)
    with _as_before():
        try:
            with time_limit(bench.left()):
                bench.write(how=part.how())
                part.measure(bench)
            return "done", None
        except OutOfTime as error:
            free(error)
            torch._dynamo.reset()  # it may have been compiling
            return "out of time", str(error)
        except (Exception, SystemExit) as error:
            bench.write(trace=traceback.format_exc().splitlines()[-20:])
            free(error)
            return "failed", short(error)
        finally:
            free()


def compiled() -> dict[str, float]:
    """What torch.compile has done so far: graphs, and the seconds of their forward passes. Those of
    backward passes are in the first call that needs them."""
    seconds = utils.compilation_time_metrics.get("_compile.compile_inner", [])
    return {"graphs": utils.counters["stats"]["unique_graphs"], "seconds": sum(seconds)}


def _since(before: dict[str, float]) -> dict[str, float]:
    """What has been compiled since; a part that resets torch's compiler has begun from 0."""
    now = compiled()
    return {n: now[n] - before[n] if now[n] >= before[n] else now[n] for n in now}


@contextmanager
def _as_before() -> Any:
    """Undo what a part that was stopped half-way may have left behind."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)


def device_lost(card: Card) -> str | None:
    """Why nothing can be computed on the device any more, after a fault in a kernel; else None."""
    try:
        card.synchronize()
    except RuntimeError as error:
        return f"the device answers no more: {short(error)}"
    return None


def ended_well(result: dict[str, Any]) -> bool:
    """Whether a part ran to its end, all its rows are there, and all its checks hold."""
    return result["status"] == "done" and not result["failed"] and not result["wrong"]


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each part, and one for each thing that is not well."""
    lines = [f"{'part':12} {'seconds':>8} {'of':>5} {'rows':>5}  status"]
    for own in results:
        rows = len(own["figures"])
        head = f"{own['part']:12} {own['seconds']:8.1f} {own['budget_s']:5.0f} {rows:5}"
        lines.append(f"{head}  {own['status']}{': ' + own['error'] if own['error'] else ''}")
        lines += [f"{'':12} FAILED {what}" for what in own["failed"]]
        lines += [f"{'':12} WRONG  {what}" for what in own["wrong"]]
    return "\n".join(lines)
