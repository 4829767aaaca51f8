"""Counts of models, and the memory formula against published figures and by its own laws."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.core.errors import ModelError
from gspo.policy.embedded import build_model
from gspo.sizing.model_size import Training, count, most_tokens, read_size, training_bytes
from models import read_size as size_of

TEXT = Path(__file__).with_name("published_memory.csv").read_text()
PUBLISHED = list(csv.DictReader(TEXT.splitlines()))


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
    with pytest.raises(ModelError, match="unknown model 'embedded:nonsense'"):
        read_size("embedded:nonsense")


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "mpt", "gpt_neox", "llama", "mixtral"])
def test_layers_are_found_whatever_they_are_called(kind: str, tmp_path: Path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    size = read_size(str(tmp_path))
    others = size.expert - size.expert * size.experts_per_token // max(size.experts, 1)
    heads = size.head * (1 if size.tied else 2)
    assert size.active + others + heads == pytest.approx(size.parameters, rel=0.02)


@pytest.mark.parametrize("kind", ["t5", "mamba", "clip"])
def test_what_is_no_causal_model_with_attention_is_refused_by_name(kind: str, tmp_path: Path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is no causal language model with attention") as caught:
        read_size(str(tmp_path))
    assert len(str(caught.value)) < 500  # transformers names all that it knows


@pytest.mark.parametrize(
    "point", PUBLISHED, ids=lambda p: f"{p['model']}-{p['tokens']}-{p['lora']}"
)
def test_published_memory_within_15_percent(point: dict[str, str]):
    how = Training(
        lora=int(point["lora"]) if point["lora"] else None,
        base_bytes=int(point["base_bytes"]),
        checkpointing=point["checkpointing"] == "1",
    )
    size = size_of(point["model"])
    parts = training_bytes(size, how, int(point["tokens"]), int(point["gpus"]))
    assert sum(parts.values()) / 2**30 == pytest.approx(float(point["published_gib"]), rel=0.15)


def test_all_weights_take_16_bytes_each():
    size = size_of("Qwen/Qwen3-8B")
    parts = training_bytes(size, Training(), 0, 1)
    assert parts["weights"] + parts["gradients"] + parts["AdamW"] == 16 * size.parameters
    assert parts["activations"] == parts["gathered"] == 0


@given(st.integers(1, 512), st.sampled_from([None, 8]), st.booleans(), st.floats(1e10, 2e11))
def test_most_tokens_is_the_most(gpus: int, lora: int | None, checkpointing: bool, free: float):
    size, how = size_of("embedded:sort"), Training(lora, checkpointing=checkpointing)
    most = most_tokens(size, how, gpus, free)
    assert sum(training_bytes(size, how, most, gpus).values()) <= free
    assert sum(training_bytes(size, how, most + 1024, gpus).values()) > free


def test_no_room_for_the_weights():
    assert most_tokens(size_of("Qwen/Qwen3-8B"), Training(), 1, 80e9) == 0
