"""metrics.jsonl: one JSON object per step, in order, of which the last may still grow."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from gspo.core.files import explained, strict_json, write_whole

log = logging.getLogger("gspo")

Record = dict[str, float]


class MetricsFile:
    """The lines of a run that this process writes.

    Every write is of whole lines and is on the disk when it returns. A longer last line is first
    written to a small file beside, so that neither a kill nor a full disk in the midst of it
    costs the line.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._beside = path.with_name(f".{path.name}.last")
        self._last = 0  # where the last line begins, in bytes
        self._torn = False  # whether the last line was being replaced when a write failed
        self._records = self._load()

    def _load(self) -> list[Record]:
        data = self._path.read_bytes() if self._path.exists() else b""
        *lines, rest = data.split(b"\n")
        waiting = _record(self._beside.read_bytes()) if self._beside.exists() else None
        if waiting is not None and lines and _record(lines[-1]) is None:
            lines.pop()  # it was being replaced
        records, bad = _sorted([*lines, rest] if _record(rest) else lines)
        if waiting is not None and (not records or records[-1]["step"] <= waiting["step"]):
            records, _ = _sorted([_line(record).encode() for record in (*records, waiting)])
        if bad:
            self._copy_damaged(bad)
        if data != "".join(map(_line, records)).encode():
            self._rewrite(records)
        else:
            self._last = len(data) - len(_line(records[-1])) if records else 0
        self._beside.unlink(missing_ok=True)
        return records

    def _copy_damaged(self, numbers: Sequence[int]) -> None:
        copy = self._path.with_name("metrics.damaged.jsonl")
        with explained(copy):
            shutil.copyfile(self._path, copy)
        which = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        log.warning(
            "%s: left out, not the metrics of a step: line %s. The file as it was is kept as %s",
            *(self._path, which, copy.name),
        )

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of a step, which may be a new one."""
        last = self._records[-1] if self._records else None
        if self._torn or (last is not None and step < last["step"]):
            by_step = {int(record["step"]): record for record in self._records}
            by_step[step] = {"step": step, **by_step.get(step, {}), **metrics}
            self._rewrite([by_step[key] for key in sorted(by_step)])
        elif last is not None and last["step"] == step:
            self._replace_last(last | dict(metrics))
        else:
            self._append({"step": step, **metrics})

    def truncate(self, step: int) -> None:
        """Drop the lines beyond a step."""
        records = [record for record in self._records if record["step"] <= step]
        gone = len(self._records) - len(records)
        if gone > 1:  # one is what a kill between log and checkpoint leaves; more were deleted
            log.warning(
                "%s: the last %d lines are of steps that have no checkpoint any more: left out",
                *(self._path, gone),
            )
        if gone:
            self._rewrite(records)

    def read(self) -> list[Record]:
        """All lines."""
        return [dict(record) for record in self._records]

    def line(self, step: int) -> Record:
        """The line of a step; empty if there is none."""
        return next((dict(record) for record in self._records if record["step"] == step), {})

    def _append(self, record: Record) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            self._write(size, record)
        except BaseException:
            if self._path.exists():
                os.truncate(self._path, size)
            raise
        self._last = size
        self._records.append(record)

    def _replace_last(self, record: Record) -> None:
        """In place: a long run's file is not written again at each step."""
        write_whole(self._beside, _line(record))
        self._records[-1] = record
        self._torn = True
        self._write(self._last, record)
        self._torn = False
        self._beside.unlink()

    def _write(self, place: int, record: Record) -> None:
        """Make a line the last one, at a place in bytes."""
        line = _line(record).encode()
        with explained(self._path):
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                written = 0
                while written < len(line):
                    written += os.pwrite(handle, line[written:], place + written)
                os.truncate(handle, place + len(line))
                os.fsync(handle)
            finally:
                os.close(handle)

    def _rewrite(self, records: list[Record]) -> None:
        lines = [_line(record) for record in records]
        write_whole(self._path, "".join(lines))
        self._records = records
        self._last = sum(map(len, lines[:-1]))
        self._torn = False
        self._beside.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl that this process doesn't write; null is NaN.

    Lines that are not the metrics of a step are left out, as is one that is being written.
    """
    return _sorted(path.read_bytes().split(b"\n"))[0] if path.exists() else []


def _sorted(lines: Sequence[bytes]) -> tuple[list[Record], list[int]]:
    """One record per step, in order, and the numbers of the lines that are none."""
    records: dict[int, Record] = {}
    bad = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            step = int(record["step"])
            records[step] = records.get(step, {}) | record
        elif line.strip():
            bad.append(number)
    return [records[step] for step in sorted(records)], bad


def _record(line: bytes) -> Record | None:
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


def _line(record: Mapping[str, float]) -> str:
    # ASCII only, so that a length in characters is one in bytes.
    return strict_json(record) + "\n"
