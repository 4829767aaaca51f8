"""What is measured so that a row has the same bits beside any others."""

from __future__ import annotations

from copy import copy
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from gspo.kernels import exact, linear_ways
from gspo.kernels.exact import _linear, measure
from gspo.kernels.logprob import CPU_BLOCK, Head, full_logits
from gspo.kernels.projection import entry_slices, project
from models import model
from support import embedded


def head_of(lm: Any) -> Head:
    return Head(lm.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", ["llama", "qwen3_next", "jitter"])
def test_each_kind_of_module_is_measured_once(kind: str):
    lm = model(kind)
    parts = measure(lm, head_of(lm))
    assert all(part.multiple in exact.MULTIPLES for part in parts)
    assert len({(part.kind, part.name) for part in parts}) == len(parts)
    kinds = {part.kind for part in parts}
    assert {"Linear", "Embedding", "head"} <= kinds
    assert any("RMSNorm" in name for name in kinds)
    experts = [part for part in parts if part.kind.endswith("Experts")]
    assert len(experts) == (kind != "llama")
    assert all("at least" in part.how for part in experts)


def test_a_module_that_looks_at_its_call_is_found():
    class Normed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.shape[-2]

    lm: Any = model("llama")
    lm.model.layers[0].mlp.act_fn = Normed()
    bad = [part for part in measure(lm, head_of(lm)) if part.multiple is None]
    assert {(part.name, part.kind) for part in bad} == {
        ("model.layers.0.mlp.act_fn", "Normed"),
        ("model.layers.0.mlp", "LlamaMLP"),
    }


@pytest.mark.parametrize(
    ("dtype", "how"), [(torch.bfloat16, "blocks of 64 rows"), (torch.float32, "oneDNN")]
)
def test_calls_of_many_tokens_are_measured_too(
    dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
):
    """Rows have other bits in calls of many tokens, as products on AMX have."""
    product = functional.linear

    def changing(x: torch.Tensor, *weights: Any) -> torch.Tensor:
        return product(x, *weights) + (x.shape[-2] > 600)

    monkeypatch.setattr(functional, "linear", changing)
    monkeypatch.setattr(exact, "pad_experts", lambda module, rows: None)
    layer, x = nn.Linear(24, 16).to(dtype), torch.randn(37, 24).to(dtype)
    _linear.cache_clear()
    with torch.no_grad():
        experts = exact._settle_experts("experts", [layer], (x,))
        assert linear_ways.other_way(dtype)[1] == how
        multiple, as_usual = _linear(24, 16, True, dtype, 1)
    _linear.cache_clear()  # of what is not true
    assert experts.multiple is None  # there is no other way to compute them
    assert not as_usual and multiple in exact.MULTIPLES


def test_a_shape_is_measured_once_in_a_process():
    lm: Any = model("llama")
    first = measure(lm, head_of(lm))
    before = _linear.cache_info()
    exact.undo(lm)
    assert measure(lm, head_of(lm)) == first
    after = _linear.cache_info()
    assert after.misses == before.misses and after.hits > before.hits


@pytest.mark.parametrize("depth", [64, 96, 128, 256])
def test_heads_whose_scores_depend_on_the_rows_are_named(
    depth: int, monkeypatch: pytest.MonkeyPatch
):
    """Gemma 3's heads of 256, four for one key head, and those of Qwen3's 128, two for one."""
    for share in (1, 2, 4):
        assert exact._attention(share, depth).multiple == 8
    monkeypatch.setattr(exact, "attend", lambda rows, *_: (rows + rows.shape[2], None))
    assert exact._attention(4, depth).multiple is None


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 10, 66, 130])
def test_heads_of_any_width_are_invariant_once_they_are_widened(depth: int):
    for share in (1, 2, 3, 4):
        assert exact._attention(share, depth).multiple == 8


@pytest.mark.parametrize("entries", [2049, 2056, 4099])
def test_a_vocabulary_just_beyond_whole_blocks_has_no_narrow_block(entries: int):
    """MKL on AMD sums products of 1 to 8 columns in another order, of 32 rows and more too."""
    draw = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(entries, 32, generator=draw), torch.randn(64, 32, generator=draw)
    assert exact._head(Head(weight)).multiple == 8
    last = entry_slices(entries, CPU_BLOCK[0])[-1]
    block = project(hidden, weight[last], None, None)
    for rows in (8, 32, 64):
        assert torch.equal(full_logits(hidden[:rows], Head(weight))[:, last], block[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_depend_on_their_place_are_found(dtype: torch.dtype):
    """As where a product of few columns takes rows that begin at odd addresses otherwise."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + (torch.arange(len(x)) % 2)[:, None]

    given = (torch.randn(37, 8).to(dtype),)
    assert exact._multiple(run, given, exact._rows_for(nn.Linear(8, 8, dtype=dtype))) is None
    assert exact._multiple(lambda x: x + 1, given, exact._ROWS) == 8


@pytest.mark.parametrize("rows", [5, 7, 9, 33])
def test_a_token_has_the_same_gate_wherever_it_stands(rows: int):
    """GPT-OSS's takes a sigmoid of all numbers in one piece, and the last ones fill no vector."""

    class Experts(nn.Module):
        def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., ::2].sigmoid() * x[..., 1::2] * (1 + vector_ends(x[..., ::2]))

    def vector_ends(x: torch.Tensor) -> torch.Tensor:
        """1 at the numbers that fill no vector of 16."""
        whole = x.numel() // 16 * 16
        return (torch.arange(x.numel()) >= whole).view(x.shape)

    experts, x = Experts(), torch.randn(70, 24, requires_grad=True)
    plain = experts._apply_gate(x[:64])  # 64 x 12: whole vectors
    assert not torch.equal(experts._apply_gate(x[:rows])[-1], plain[rows - 1])
    gate = MethodType(exact._whole_gate, experts)
    out = gate(x[:rows])
    assert torch.equal(out, plain[:rows])
    assert torch.equal(gate(x[None, :rows])[0], plain[:rows])
    out.sum().backward()
    assert x.grad is not None and x.grad[:rows].all() and not x.grad[rows:].any()


def test_experts_are_measured_with_few_and_with_many_tokens():
    """A router that sends all tokens to one expert hides what another number of rows does."""
    policy = embedded()
    experts: Any = next(m for m in policy.lm.modules() if exact.is_experts(m))
    chosen = torch.full((37, 2), 3)
    drawn = exact._uneven(chosen, experts)
    assert drawn.shape == chosen.shape and drawn.dtype == chosen.dtype
    assert (drawn.sort(-1)[0].diff() > 0).all()  # two experts of a token are two
    counts = drawn.flatten().bincount(minlength=experts.num_experts)
    assert counts.max() >= 3 * counts.min() and (counts > 0).sum() > experts.num_experts // 2


def test_each_shape_of_heads_is_measured():
    lm: Any = model("llama")
    config = lm.config
    wide = copy(config)
    wide.head_dim = 16
    layers = [config, config, config, wide]
    lm.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(per_layer_config=layers))
    try:
        names = [part.name for part in measure(lm, head_of(lm)) if part.kind == "attention"]
    finally:
        lm.config = config
    assert names == ["heads of 8", "heads of 16"]


def test_what_was_changed_can_be_undone():
    lm: Any = model("jitter")
    measure(lm, head_of(lm))
    layer = lm.model.layers[0].self_attn.q_proj
    layer.gspo_rows, layer.forward = 8, MethodType(linear_ways._by_blocks, layer)
    assert any(hasattr(m, "gspo_rows") for m in lm.modules())
    exact.undo(lm)
    assert not any(hasattr(m, "gspo_rows") or "forward" in vars(m) for m in lm.modules())
