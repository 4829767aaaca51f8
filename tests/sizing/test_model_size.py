"""Counts of models, from configs alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.core.errors import ModelError
from gspo.policy.embedded import build_model
from gspo.sizing.model_size import count, read_size


@pytest.mark.parametrize(
    ("model", "billions", "active"),
    [  # the models' cards; their active weights count the embedding too
        ("Qwen/Qwen3-30B-A3B", 30.5, 3.3),
        ("Qwen/Qwen3-235B-A22B", 235, 22),
        ("Qwen/Qwen3-8B", 8.2, 8.2),
        ("deepseek-ai/DeepSeek-V3", 671, 37.5),
    ],
)
def test_counts_are_those_of_the_cards(model: str, billions: float, active: float):
    size = read_size(model)
    assert size.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert (size.active + 2 * size.head) / 1e9 == pytest.approx(active, rel=0.03)


def test_tied_head_and_adapters_by_hand():
    config = AutoConfig.for_model(
        "qwen3", hidden_size=8, num_hidden_layers=2, intermediate_size=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, vocab_size=10, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        size = count(AutoModelForCausalLM.from_config(config), config)
    layer = [(8, 8), (4, 8), (4, 8), (8, 8), (12, 8), (12, 8), (8, 12)]  # q k v o gate up down
    assert size.active == 2 * sum(out * inner for out, inner in layer)
    assert size.outputs == sum(out for out, _ in layer)
    assert size.lora_rank_one == 2 * sum(out + inner for out, inner in layer)
    assert (size.head, size.tied, size.kv_width, size.query_width) == (80, True, 8, 8)


def test_embedded_model_is_counted_as_it_is():
    size, lm = read_size("embedded:sort"), build_model()
    assert size.parameters == sum(weight.numel() for weight in lm.parameters())
    assert (size.experts, size.experts_per_token) == (
        lm.config.num_experts,
        lm.config.num_experts_per_tok,
    )
    expert = sum(w.numel() for n, w in lm.named_parameters() if ".experts." in n)
    assert size.expert == expert
    others = sum(
        w.numel() for n, w in lm.named_parameters()
        if ".layers." in n and ".experts." not in n and w.dim() > 1
    )  # fmt: skip
    assert size.active == others + expert * size.experts_per_token // size.experts


def test_unknown_model_names_the_shipped_ones():
    with pytest.raises(ModelError, match=r"Configs that gspo knows: .*Qwen/Qwen3-30B-A3B"):
        read_size("./no-such-folder")
