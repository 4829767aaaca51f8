from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest

from gspo.backend.metrics_file import MetricsFile, read_metrics
from gspo.core.errors import RunError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def test_a_step_has_one_line_that_grows(path: Path):
    file = MetricsFile(path)
    for step, metrics in ((0, {"a": 1.0}), (1, {"a": 2.0}), (1, {"b": 3.0}), (0, {"c": 4.0})):
        file.put(step, metrics)
        assert MetricsFile(path).read() == file.read()
    file.put(2, {"a": 0.5})
    assert lines(path) == [
        {"step": 0, "a": 1.0, "c": 4.0},
        {"step": 1, "a": 2.0, "b": 3.0},
        {"step": 2, "a": 0.5},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_nan_is_null_in_the_file_and_nan_when_it_is_read(path: Path):
    MetricsFile(path).put(1, {"a": math.nan, "b": -math.inf})
    assert path.read_text() == '{"step": 1, "a": null, "b": null}\n'
    assert math.isnan(MetricsFile(path).read()[0]["a"])
    assert math.isnan(read_metrics(path)[0]["b"])


@pytest.mark.parametrize(
    "bad",
    [
        *(b"{", b"7", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000),
        *(b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b'{"step": 1.5}'),
        b'{"step": 2, "a": "x"}',
    ],
)
def test_a_bad_line_costs_no_other_and_is_kept_aside(path: Path, bad: bytes, caplog):
    good = [f'{{"step": {step}}}'.encode() for step in range(4)]
    content = b"\n".join([*good[:2], bad, *good[2:], b""])
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "gspo"):
        MetricsFile(path)
    assert steps(path) == [0, 1, 2, 3]
    assert (path.parent / "metrics.damaged.jsonl").read_bytes() == content
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: left out, not the metrics of a step: line 3. "
        "The file as it was is kept as metrics.damaged.jsonl"
    ]
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_half_a_last_line_is_a_bad_line(path: Path, caplog):
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    MetricsFile(path).put(2, {"a": 5.0})
    assert lines(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 5.0}]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_last_line_without_its_end_is_kept(path: Path):
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricsFile(path).put(3, {})
    assert steps(path) == [1, 2, 3]


def test_lines_that_two_processes_wrote_are_put_in_order(path: Path):
    path.write_text('{"step": 2}\n{"step": 1, "a": 1}\n{"step": 1, "b": 2}\n')
    MetricsFile(path)
    assert lines(path) == [{"step": 1, "a": 1, "b": 2}, {"step": 2}]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_loses_no_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    file = MetricsFile(path)
    file.put(1, {"a": 1.0})
    before = path.read_bytes()

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in (2, 1):  # a new line, and a longer one
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full)
            with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: the disk is full"):
                file.put(step, {"b": 2.0})
        assert path.read_bytes() == before
        assert file.read() == MetricsFile(path).read() == [{"step": 1, "a": 1.0}]
    file.put(3, {"a": 3.0})  # the same process goes on
    file.put(3, {"b": 3.0})
    assert lines(path) == [{"step": 1, "a": 1.0}, {"step": 3, "a": 3.0, "b": 3.0}]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_steps_beyond_a_checkpoint_are_dropped(path: Path, caplog):
    file = MetricsFile(path)
    for step in range(5):
        file.put(step, {"a": float(step)})
    with caplog.at_level(logging.WARNING, "gspo"):
        file.truncate(3)
        assert steps(path) == [0, 1, 2, 3] and not caplog.records
        file.truncate(1)
    assert steps(path) == [0, 1] and file.line(2) == {}
    assert "the last 2 lines are of steps that have no checkpoint" in caplog.text
