"""Loading: names, errors, LoRA, the embedded model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from gspo import dev
from gspo.core.errors import ModelError
from gspo.kernels import attention
from gspo.policy.load import (
    _threads,
    caps_or_sinks,
    load_policy,
    resolve,
    save_weights,
    whole_weights_to_store,
)
from models import model
from support import embedded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedded:srot", "Did you mean 'sort'"),
        ("embeded:sort", "Did you mean 'embedded:sort'"),
        ("./nowhere", "not a folder"),
        ("gpt2", "not a folder"),
    ],
)
def test_unknown_models_name_the_remedy(name: str, message: str):
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_a_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"cannot load.*config\.json"):
        load_policy(str(tmp_path))


def test_a_folder_with_a_broken_config_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ModelError, match="cannot load"):
        load_policy(str(tmp_path))


def test_context_cannot_exceed_the_models():
    with pytest.raises(ModelError, match="context of 512"):
        load_policy("embedded:sort", dev.InternalModelConfig(max_context=513))


@pytest.mark.parametrize("device", ["cuda", "gpu", "fpga"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named(device: str):
    with pytest.raises(ModelError, match=f"device = '{device}'.*use 'auto' or 'cpu'"):
        load_policy("embedded:sort", dev.InternalModelConfig(device=device))


def test_lora_trains_only_adapters_and_reaches_the_experts():
    policy = embedded(lora=dev.LoraConfig(r=2))
    assert all("lora_" in name for name in policy.trainable)
    assert any("experts" in name for name in policy.trainable)
    assert any("q_proj" in name for name in policy.trainable)


def test_lora_starts_as_the_base_model_and_round_trips(tmp_path: Path):
    lora = dev.LoraConfig(r=2)
    policy, base = embedded(lora=lora), embedded()
    tokens = torch.arange(6, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(policy.lm(tokens).logits, base.lm(tokens).logits)
        for parameter in policy.trainable.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
        changed = policy.lm(tokens).logits
        assert (changed - base.lm(tokens).logits).abs().max() > 1e-3
        with policy.reference():
            torch.testing.assert_close(policy.lm(tokens).logits, base.lm(tokens).logits)
    save_weights(policy, tmp_path)
    again = load_policy("embedded:sort", dev.InternalModelConfig(lora=lora), checkpoint=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.lm(tokens).logits, changed)
    assert set(again.trainable) == set(policy.trainable)


def test_a_model_loads_where_the_system_names_no_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert _threads(embedded().lm, None) == (1, 3)


def test_soft_caps_are_taken_over_only_if_the_logits_stay(monkeypatch: pytest.MonkeyPatch):
    """The model's own attention is the judge: it may do more than it hands over."""
    lm = model("gemma2")
    assert caps_or_sinks(lm)
    assert not caps_or_sinks(model("llama"))
    whole = attention._with_whole_scores
    monkeypatch.setattr(attention, "_with_whole_scores", lambda *a: whole(*a).flip(-1))
    assert not caps_or_sinks(lm)
    assert lm.config._attn_implementation == "eager"


def test_divided_weights_are_whole_and_rounded_for_a_publication(group: DeviceMesh):
    """Those of one process are what `save_weights` would write; tied ones are one tensor."""
    policy = embedded(dtype="bfloat16")
    plain = {name: weight.clone() for name, weight in whole_weights_to_store(policy).items()}
    fully_shard(policy.lm, mesh=group)
    whole = whole_weights_to_store(policy)
    assert whole["lm_head.weight"] is whole["model.embed_tokens.weight"]
    for name, weight in policy.lm.state_dict().items():
        assert torch.equal(plain[name], weight.full_tensor()) and plain[name].dtype == torch.float32
        assert torch.equal(whole[name], plain[name].bfloat16())
