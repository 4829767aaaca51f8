"""What the benchmarks share: paired measurement, a result with its circumstances, one table.

Two sides are always measured next to each other and compared by the ratio of each pair: a machine
that slows down for a minute slows both.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
WORK = HERE / ".work"
"""Scratch, ignored by git: what was measured last here, jobs, logs."""
KIND = "comparison"
BUSY = 0.7
CHILD, SAYS = "GSPO_BENCHMARK_CHILD", "> "
"""Set in a process that `run.py` started; marks its lines of progress."""


class Unavailable(Exception):
    """A benchmark cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Result:
    """One comparison. Times are medians over repeats, in seconds for the same work on both sides.

    Attributes:
        name: of the benchmark.
        what: the work, in a few words; with `name` it identifies the row.
        shape: sizes.
        ours_s: seconds of this package.
        other_s: seconds of the other.
        other: what the other is.
        ratio: median over pairs of other_s / ours_s: above 1, ours is faster.
        spread: smallest and largest ratio of a pair.
        repeats: pairs.
        goal: the ratio that was aimed at, or None.
        ours_mb, other_mb: peak resident memory of a process that did nothing else, or None. Of the
            log-probs, what the call added to it.
        memory_goal: the share of the other's memory that was aimed at, or None.
        unit: what `ours_s` and `other_s` count where that is not seconds.
        detail: whatever else was measured.
        machine, versions, command, date: where, with what, how and when.
    """

    name: str
    what: str
    shape: str
    ours_s: float
    other_s: float
    other: str
    ratio: float
    spread: tuple[float, float]
    repeats: int = 1
    goal: float | None = None
    ours_mb: float | None = None
    other_mb: float | None = None
    memory_goal: float | None = None
    unit: str = "s"
    detail: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    date: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Result:
        """A result from a dict with at least the fields that have no default.

        Raises:
            ValueError: a field is missing; unknown ones go to `detail`.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        needed = [n for n, f in fields.items() if _required(f) and n not in row]
        if needed:
            raise ValueError(f"benchmark row {row.get('name', '?')!r} lacks {', '.join(needed)}")
        known: dict[str, Any] = {k: value for k, value in row.items() if k in fields}
        extra = {name: value for name, value in row.items() if name not in fields}
        known["detail"] = {**known.get("detail", {}), **extra}
        low, high = known["spread"]
        known["spread"] = (float(low), float(high))
        return cls(**known)

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the row."""
        return self.name, self.what

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without one."""
        return None if self.goal is None else self.ratio >= self.goal

    @property
    def memory_share(self) -> float | None:
        """Our memory as a share of the other's; None where it was not measured."""
        if self.ours_mb is None or not self.other_mb:
            return None
        return self.ours_mb / self.other_mb

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Pairs:
    """Seconds of the two sides, pair by pair.

    >>> pairs = Pairs((1.0, 2.0, 1.0), (3.0, 4.0, 2.0))
    >>> pairs.ratio, pairs.spread
    (2.0, (2.0, 3.0))
    """

    ours: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """other / ours of each pair."""
        return [b / a for a, b in zip(self.ours, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return min(self.ratios), max(self.ratios)

    def fields(self) -> dict[str, Any]:
        """The fields of a `Result` that follow from the pairs."""
        return {
            "ours_s": statistics.median(self.ours),
            "other_s": statistics.median(self.other),
            "ratio": self.ratio,
            "spread": self.spread,
            "repeats": len(self.ours),
        }


def paired(
    ours: Callable[[], object],
    other: Callable[[], object],
    *,
    repeats: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Pairs:
    """Time both in turns, in this process. The side that goes first changes from pair to pair."""
    for _ in range(warmup):
        ours()
        other()
    sides = (ours, other)
    times: tuple[list[float], list[float]] = ([], [])
    for at in range(repeats):
        for side in (0, 1) if at % 2 == 0 else (1, 0):
            started = clock()
            sides[side]()
            times[side].append(clock() - started)
    return Pairs(tuple(times[0]), tuple(times[1]))


def _required(own: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return own.default is missing and own.default_factory is missing


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and how busy it was."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def warn_if_busy() -> None:
    """Say so where other programs compute: their share is taken from one side or the other."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f"warning: the load is {load:.2f} before the start; timings beside other work "
            "mislead (wait until it is below 0.7)",
            file=sys.stderr,
        )


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, and Python's."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def stamp(**fields: Any) -> Result:
    """A result of now, on this machine; torch's and transformers' versions unless others given."""
    defaults = {
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Result.of(defaults | fields)


def read(name: str, folder: Path = RESULTS) -> list[Result]:
    """The stored rows of a benchmark; none where there is no file, or one of a study."""
    path = folder / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    return [Result.of(row) for row in stored["rows"]] if stored.get("kind") == KIND else []


def write(rows: Sequence[Result], folder: Path = RESULTS) -> None:
    """Store rows; those of the same benchmark that were not measured anew stay."""
    for name in dict.fromkeys(row.name for row in rows):
        fresh = {row.key: row for row in rows if row.name == name}
        kept = {row.key: row for row in read(name, folder)} | fresh
        folder.mkdir(parents=True, exist_ok=True)
        stored = {"name": name, "kind": KIND, "rows": [r.as_dict() for r in kept.values()]}
        building = folder / f".{name}.{os.getpid()}"
        building.write_text(json.dumps(stored, indent=1) + "\n")
        os.replace(building, folder / f"{name}.json")


def say(text: str) -> None:
    """Progress, apart from the table; passed on by the process that started this one."""
    print(SAYS + text if CHILD in os.environ else text, file=sys.stderr, flush=True)


def child_env(threads: int) -> dict[str, str]:
    """The environment of a measured process: passive threads, no network, no progress bars."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }


def run_child(command: Sequence[str | Path], threads: int, log: Path, timeout: float) -> None:
    """Run a measured process to its end.

    Raises:
        RuntimeError: it failed; the message ends with its last lines of output.
    """
    with log.open("w") as out:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=child_env(threads),
            timeout=timeout,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{Path(command[1]).name} failed ({done.returncode}), {log}:\n{tail}")
