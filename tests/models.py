"""Tiny random models of many architectures, as folders that `load_policy` takes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.policy.embedded import build_tokenizer
from gspo.policy.policy import Policy
from gspo.sizing import model_size

VOCABULARY = 60
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 8.0],
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma4": (  # its layers' heads differ in width
        "gemma4_text",
        {"sliding_window": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60},
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0},
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "num_local_experts": 4,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5},
        },
    ),
    "windows": ("mistral", {"sliding_window": 40}),
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "granite": ("granite", {"logits_scaling": 6.0}),
    "cohere": ("cohere", {"logit_scale": 0.0625}),
    "falcon_h1": (
        "falcon_h1",
        {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.3},
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": 40, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "qwen3_next": ("qwen3_next", {**MOE, **LINEAR, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_dim": 32, "block_ff_dim": 48},
    ),
    "mamba": ("mamba", {"state_size": 8, "num_hidden_layers": 2}),
    "mamba2": (
        "mamba2",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 2},
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1, 3]}),
    "minimax": ("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16}),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 40}),
    "opt": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1, "attention_dropout": 0.1},
    ),
    "bloom": (
        "bloom",
        {"n_layer": 3, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    ),
    "jitter": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    ),
    "xglm": (
        "xglm",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "dropout": 0.1},
    ),
}


def model(kind: str, **extra: Any) -> PreTrainedModel:
    """A random model whose weights are large enough that a mistake shows."""
    name, own = KINDS[kind]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**BASE, **own, **extra}))
    with torch.no_grad():
        for parameter_name, parameter in lm.named_parameters():
            if parameter.dim() > 1 and "conv" not in parameter_name:
                parameter.normal_(std=0.25)
    return lm.float().eval()


def folder(path: Path, kind: str, **extra: Any) -> str:
    """The model and a tokenizer, saved."""
    model(kind, **extra).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def text(length: int, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, length)


def sample(tokens: np.ndarray, prompt: int, number: int = 0) -> Sample:
    """A sample whose first `prompt` tokens were given; sampled at temperature 0.7."""
    ids = tokens.tolist()
    turn = Turn(ids[:prompt], ids[prompt:], [0.0] * (len(ids) - prompt), temperature=0.7)
    return sample_of([turn], trajectory_id=number)


def plain(policy: Policy, tokens: np.ndarray, prompt: int, temperature: float = 1.0):
    """Log-probs of the tokens after the prompt, by one call of the whole model."""
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        logits = policy.lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logits = logits[:, : policy.head.size] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)[prompt - 1 :]


read_size = cache(model_size.read_size)
"""Sizes of models, read once: what makes them builds the model without weights."""
