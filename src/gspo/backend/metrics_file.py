"""metrics.jsonl: one JSON object per step, in the order of the steps."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from gspo.core.files import explained, strict_json, write_whole
from gspo.core.log import log

Record = dict[str, float]


class MetricsFile:
    """The metrics.jsonl that this process writes.

    Each write replaces the whole file: neither a kill nor a full disk costs a line, and a reader
    never sees half of one. A write takes 4 ms after 1,000 steps and 60 ms after 10,000 (21 MB),
    measured on two CPU cores; a step makes two.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        records, damaged = _load(path)
        self._lines = {step: strict_json(records[step]) for step in sorted(records)}
        if damaged:
            copy = path.with_name("metrics.damaged.jsonl")
            with explained(copy):
                shutil.copyfile(path, copy)
            which = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
            log.warning(
                "%s: left out, not the metrics of a step: line %s. "
                "The file as it was is kept as %s",
                *(path, which, copy.name),
            )
        if damaged or list(records) != list(self._lines):
            self._write(self._lines)

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of a step, which may be a new one."""
        line = strict_json({"step": step, **self.line(step), **metrics})
        self._write(self._lines | {step: line})

    def truncate(self, step: int) -> None:
        """Drop the lines beyond a step."""
        lines = {number: line for number, line in self._lines.items() if number <= step}
        late = len(self._lines) - len(lines)
        if late > 1:  # a kill between log and checkpoint leaves one; more were deleted
            log.warning(
                "%s: the last %d lines are of steps that have no checkpoint any more: left out",
                *(self._path, late),
            )
        if late:
            self._write(lines)

    def read(self) -> list[Record]:
        """The metrics of all steps."""
        return [self.line(step) for step in self._lines]

    def line(self, step: int) -> Record:
        """The metrics of a step; empty if it has none."""
        return _record(self._lines.get(step, "{}")) or {}

    def _write(self, lines: dict[int, str]) -> None:
        lines = dict(sorted(lines.items()))
        write_whole(self._path, "".join(f"{line}\n" for line in lines.values()))
        self._lines = lines


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl that this process doesn't write; null is NaN.

    Lines that are not the metrics of a step are left out.
    """
    records, _ = _load(path)
    return [records[step] for step in sorted(records)]


def _load(path: Path) -> tuple[dict[int, Record], list[int]]:
    """The metrics by step, and the numbers of the lines that are no metrics."""
    records: dict[int, Record] = {}
    damaged = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            step = int(record["step"])
            records[step] = records.get(step, {}) | record
        elif line.strip():
            damaged.append(number)
    return records, damaged


def _record(line: str | bytes) -> Record | None:
    """A line's metrics; None if it holds something else."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8 is a ValueError too
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] < 0:
        return None
    if not all(value is None or isinstance(value, int | float) for value in values.values()):
        return None
    return {key: math.nan if value is None else value for key, value in values.items()}
