"""Keys and values while decoding, against one pass over each whole text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gspo.kernels import kv_cache
from gspo.kernels.attention import PACKED
from gspo.kernels.kv_cache import Layout, Reading, kv_bytes
from models import model

CPU = torch.device("cpu")
PROMPTS = [(5, 6, 7, 8, 9), (11, 12), (21, 22, 23)]


@pytest.fixture(params=["llama", "windows"])
def backbone(request) -> Any:
    window = {"sliding_window": 4} if request.param == "windows" else {}
    lm = model(request.param, **window)
    lm.set_attn_implementation(PACKED)
    return lm.model


def whole(backbone: Any, text: list[int]) -> torch.Tensor:
    """The last hidden state of a text, computed by itself."""
    return backbone(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0, -1]


def start(backbone: Any, prompts: list[tuple[int, ...]], prompt_of: list[int], layout: Layout):
    reading = Reading(backbone, prompts, layout=layout, device=CPU)
    reading.read(reading.width)
    return reading.opened(np.array(prompt_of), 30)


@pytest.mark.parametrize("layout", ["shared", "model_cache", "equal_lengths"])
def test_every_state_is_that_of_the_whole_text(backbone, layout, monkeypatch: pytest.MonkeyPatch):
    """Completions that end, in slabs that grow."""
    monkeypatch.setattr(kv_cache, "FIRST_COLUMNS", 2)
    prompt_of = [0, 0, 1, 2, 2]
    with torch.no_grad():
        kv, hidden = start(backbone, PROMPTS, prompt_of, layout)
        for prompt, state in zip(PROMPTS, hidden, strict=True):
            torch.testing.assert_close(state, whole(backbone, list(prompt)), atol=1e-4, rtol=1e-4)
        texts = [list(PROMPTS[p]) for p in prompt_of]
        for step in range(9):
            if step in (3, 5):
                left = np.array([0, 2, 3] if step == 3 else [2])
                kv.keep(left)
                texts = [texts[i] for i in left]
            for i, text in enumerate(texts):
                text.append(30 + 3 * i + step)
            states = kv.advance(torch.tensor([text[-1] for text in texts]))
            for text, state in zip(texts, states, strict=True):
                torch.testing.assert_close(state, whole(backbone, text), atol=1e-4, rtol=1e-4)


def test_memory_is_counted_from_the_config():
    config = model("llama").config
    assert kv_bytes(3, 10, config) == 3 * 10 * 4 * 2 * 8 * 2 * 4  # layers, heads, width, k and v


def test_layers_whose_heads_differ_are_counted_one_by_one():
    """As in Gemma 4, whose config refuses to name one width."""
    heads = [(4, 2, 8), (4, 1, 32)]
    names = "num_attention_heads", "num_key_value_heads", "head_dim"
    layers = [SimpleNamespace(**dict(zip(names, shape, strict=True))) for shape in heads]
    assert kv_bytes(3, 10, SimpleNamespace(per_layer_config=layers)) == 3 * 10 * (16 + 32) * 2 * 4
