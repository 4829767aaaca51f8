"""Adapters: where they go, and errors in gspo's own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo import dev
from gspo.errors import ModelError
from gspo.policy.load import load_policy
from models import folder


def test_peft_finds_no_place(tmp_path: Path):
    config = dev.InternalModelConfig(lora=dev.LoraConfig(target_modules=["nowhere"]))
    with pytest.raises(ModelError, match=r"LoRA on LlamaForCausalLM.*nowhere"):
        load_policy(folder(tmp_path, "llama"), config)


def test_all_linear_reaches_routers_too(tmp_path: Path):
    """Said in docs/models.md: whoever studies routing leaves them out by name."""
    config = dev.InternalModelConfig(lora=dev.LoraConfig(r=2))
    names = load_policy(folder(tmp_path, "qwen3_next"), config).trainable
    assert any(".mlp.gate.lora_A" in name or "gate.weight" in name for name in names)
