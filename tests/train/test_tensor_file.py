"""The file is one of safetensors, and its proof is that of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gspo.train.tensor_file import proof_of, write_tensors

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(KINDS)), max_size=5))
@settings(max_examples=25, deadline=None)
def test_safetensors_reads_the_same_tensors(tmp_path_factory: pytest.TempPathFactory, asked):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {f"t{i}": (torch.rand(s) * 9).to(kind) for i, (s, kind) in enumerate(asked)}
    proof = write_tensors(path, tensors)
    assert proof == proof_of(path)
    assert proof["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_tensors_that_do_not_lie_in_one_piece(tmp_path: Path):
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x", {"columns": whole.T, "part": whole[:, 1:3]})
    read = load_file(tmp_path / "x")
    assert torch.equal(read["columns"], whole.T) and torch.equal(read["part"], whole[:, 1:3])
