"""The memory formula against published figures and by its own laws."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo.sizing.memory import Training, most_tokens, training_bytes
from models import read_size

TEXT = Path(__file__).with_name("published_memory.csv").read_text()
PUBLISHED = list(csv.DictReader(TEXT.splitlines()))


@pytest.mark.parametrize(
    "point", PUBLISHED, ids=lambda p: f"{p['model']}-{p['tokens']}-{p['lora']}"
)
def test_published_memory_within_15_percent(point: dict[str, str]):
    how = Training(
        lora=int(point["lora"]) if point["lora"] else None,
        base_bytes=int(point["base_bytes"]),
        checkpointing=point["checkpointing"] == "1",
    )
    size = read_size(point["model"])
    parts = training_bytes(size, how, int(point["tokens"]), int(point["gpus"]))
    assert sum(parts.values()) / 2**30 == pytest.approx(float(point["published_gib"]), rel=0.15)


def test_all_weights_take_16_bytes_each():
    size = read_size("Qwen/Qwen3-8B")
    parts = training_bytes(size, Training(), 0, 1)
    assert parts["weights"] + parts["gradients"] + parts["AdamW"] == 16 * size.parameters
    assert parts["activations"] == parts["gathered"] == 0


@given(st.integers(1, 512), st.sampled_from([None, 8]), st.booleans(), st.floats(1e10, 2e11))
def test_most_tokens_is_the_most(gpus: int, lora: int | None, checkpointing: bool, free: float):
    size, how = read_size("embedded:sort"), Training(lora, checkpointing=checkpointing)
    most = most_tokens(size, how, gpus, free)
    assert sum(training_bytes(size, how, most, gpus).values()) <= free
    assert sum(training_bytes(size, how, most + 1024, gpus).values()) > free


def test_no_room_for_the_weights():
    assert most_tokens(read_size("Qwen/Qwen3-8B"), Training(), 1, 80e9) == 0
