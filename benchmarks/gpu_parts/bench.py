"""What a part of the suite gets: the device, the sizes, the time that is left, a file for its rows.

A row is written to the part's JSON file the moment it is known, so that whatever ends the process
later takes nothing away.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AGAIN_S = 2.0
"""Seconds after which a part that swallowed the alarm hears it once more."""


class OutOfTime(BaseException):
    """The part's budget is spent. Not an Exception: `except Exception` must not hold it up."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block once `seconds` are over. Main thread only.

    A call into CUDA or the compiler is interrupted where it next returns to Python.
    """
    armed, started = [True], time.monotonic()

    def ring(_signal: int, _frame: object) -> None:
        if armed:
            raise OutOfTime(f"its {seconds:.1f} s are over")

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN_S)
    try:
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # an outer alarm, such as pytest-timeout's
            rest = left - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(rest, 1e-3), interval)


@dataclass(frozen=True)
class Card:
    """A device and its data sheet.

    Attributes:
        name: torch's name of it.
        device: `cuda` or `cpu`.
        flops: bfloat16 FLOP/s, dense; None where no data sheet is known.
        bytes_per_s: of its memory, or None.
    """

    name: str
    device: str
    flops: float | None
    bytes_per_s: float | None

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int | None]:
        """Bytes that are allocated now, and at most since `reset_peak`; None on the CPU."""
        if self.device != "cuda":
            return {"now": None, "peak": None}
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}

    def reset_peak(self) -> None:
        """Forget the largest allocation so far."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()


# By a part of torch's device name, the more special first. Sources: NVIDIA's data sheets.
_CARDS = {
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 1.555e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
}


def card(*, tiny: bool = False) -> Card:
    """The CUDA device; with `tiny` the CPU, under made-up limits.

    Raises:
        SystemExit: no CUDA device.
    """
    if tiny:
        return Card("CPU, made-up limits", "cpu", 1e12, 1e10)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: --tiny runs every part on the CPU")
    name = torch.cuda.get_device_name()
    limits = next((own for part, own in _CARDS.items() if part in name), (None, None))
    return Card(name, "cuda", *limits)


class Bench:
    """One part while it runs.

    Args:
        card: where it computes.
        path: its JSON file, or None to keep the rows in memory.
        head: what the file says before the rows: part, device, versions.
        seconds: that it may take.
        say: told of each row as it comes.
        tiny: sizes of a toy.
    """

    def __init__(
        self,
        card: Card,
        path: Path | None = None,
        head: dict[str, Any] | None = None,
        *,
        seconds: float = math.inf,
        say: Callable[[str], None] = print,
        tiny: bool = False,
    ):
        self.card, self.tiny, self.path, self.head = card, tiny, path, dict(head or {})
        self.rows: list[dict[str, Any]] = []
        self._say = say
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self._until - time.monotonic()

    def size(self, full: Any, tiny: Any) -> Any:
        """The one that applies."""
        return tiny if self.tiny else full

    @contextmanager
    def row(self, what: str) -> Iterator[dict[str, Any]]:
        """Fill in a row. Where the block fails, the row says why and the part goes on."""
        row: dict[str, Any] = {"what": what}
        try:
            yield row
        except Exception as error:
            row["error"] = short(error)
            row["trace"] = traceback.format_exc().splitlines()[-12:]
            free(error)
        except BaseException as error:
            row["error"] = short(error)
            raise
        finally:
            self.rows.append(row)
            self.write()
            self._say(f"  {what}: {brief(row)}")

    def time(self, work: Callable[[], object], *, repeats: int = 3, warmup: int = 1) -> Any:
        """Seconds of `work`, until the device has done it. One repeat at least; no further one
        that the time left has no room for."""
        times: list[float] = []
        first = 0.0
        for number in range(warmup + repeats):
            self.card.synchronize()
            started = time.perf_counter()
            work()
            self.card.synchronize()
            seconds = time.perf_counter() - started
            if number < warmup:
                first += seconds
            else:
                times.append(seconds)
                if seconds > self.left() / 2:
                    break
        return {
            "median_s": statistics.median(times),
            "spread_s": [min(times), max(times)],
            "repeats": len(times),
            "warmup_s": first,
        }

    def write(self, **fields: Any) -> None:
        """Store what is known so far; the file is whole at each moment."""
        self.head |= fields
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        building = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        text = json.dumps(plain(self.head | {"rows": self.rows}), indent=1, allow_nan=False)
        building.write_text(text + "\n")
        os.replace(building, self.path)


def free(error: BaseException | None = None) -> None:
    """Give back what nobody holds any more, and what only the frames of an error still hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def short(error: BaseException) -> str:
    """An error in one line.

    >>> short(ValueError("no"))
    'ValueError: no'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def brief(row: dict[str, Any]) -> str:
    """The plain numbers of a row, or its error, for the screen.

    >>> brief({"what": "a", "mfu": 0.1234, "top": [1, 2], "ok": True})
    'mfu 0.123, ok True'
    """
    if "error" in row:
        return f"FAILED, {row['error']}"
    shown = (
        f"{name} {value if isinstance(value, bool) else format(value, '.3g')}"
        for name, value in numbers(row).items()
    )
    return ", ".join(shown)


def numbers(row: dict[str, Any]) -> dict[str, bool | int | float]:
    """The plain numbers of a row."""
    return {k: v for k, v in row.items() if isinstance(v, bool | int | float)}


def plain(value: Any) -> Any:
    """For JSON: numbers of six digits, and texts for those that JSON has no name for.

    >>> plain({"a": (1.23456789, float("inf")), 2: None})
    {'a': [1.23457, 'inf'], '2': None}
    """
    if isinstance(value, dict):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
