"""Tiny MoE models of several architectures, and what their routers do."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo.policy.policy import Policy
from gspo.policy.probe import choose_packing
from policy.test_policy import tiny

MOE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 3}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # Ranks groups of experts first: three top-k calls, one of which chooses the experts.
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}

# Not every release puts each architecture behind the common router interface: transformers 5.17
# trains DeepSeek-V3, and gspo sees no routers in it there.
MOE = {
    name: entry
    for name, entry in MOE.items()
    if "router_logits" in (getattr(entry[0], "_can_record_outputs", None) or {})
}


def moe(name: str = "qwen3_moe", **extra: Any) -> Policy:
    """A tiny model of this architecture, ready for the trainer."""
    model_class, config_class, sizes = MOE[name]
    policy = tiny(model_class, config_class, **(sizes | extra))
    choose_packing(policy)
    return policy


def phimoe() -> Policy:
    """A router that chooses without top-k."""
    return tiny(PhimoeForCausalLM, PhimoeConfig, num_local_experts=4)
