"""Adapters: their places in the model, and errors that name the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo import dev
from gspo.core.errors import ModelError
from gspo.policy.load import load_policy
from models import folder


def test_peft_finds_no_place(tmp_path: Path):
    config = dev.InternalModelConfig(lora=dev.LoraConfig(target_modules=["nowhere"]))
    with pytest.raises(ModelError, match=r"LoRA on LlamaForCausalLM.*nowhere"):
        load_policy(folder(tmp_path, "llama"), config)


def test_layers_that_peft_cannot_adapt_are_a_model_error(tmp_path: Path):
    """Mamba's projections by peft's own rule; Llama 4's router only fails once it runs."""
    for kind in ("mamba", "llama4"):
        path = folder(tmp_path / kind, kind)
        with pytest.raises(ModelError, match="does not work: name the linear layers"):
            load_policy(path, dev.InternalModelConfig(lora=dev.LoraConfig(r=2)))
    named = dev.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    assert load_policy(path, dev.InternalModelConfig(lora=named)).trainable


def test_all_linear_reaches_routers_too(tmp_path: Path):
    """Said in docs/models.md: whoever studies routing leaves them out by name."""
    config = dev.InternalModelConfig(lora=dev.LoraConfig(r=2))
    names = load_policy(folder(tmp_path, "qwen3_next"), config).trainable
    assert any(".mlp.gate.lora_A" in name or "gate.weight" in name for name in names)
