"""Try exact mode on each family of causal language models that transformers has, tiny and random.

    python tools/families.py                          # all, in float32; a line for each
    python tools/families.py phi3 cohere --lora       # some, with adapters
    python tools/families.py --dtype bfloat16 --json families.jsonl

For each: the model is registered with `exact=True`, sampled (four completions of each prompt) and
trained for two steps through the public API. Says `exact` if engine and trainer had equal bits in
both steps; `refused` with the reason, and whether the model trains without `exact`; or `failed`
with an error that is not gspo's, which is a fault of gspo.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import gspo as art
from gspo.core.errors import GspoError
from gspo.policy.embedded import build_tokenizer

LIMIT = 600
"""Seconds that one family may take."""
LARGEST = 5_000_000  # parameters
MEMORY = 12 * 2**30  # bytes of a process
ASKED = ("3+4", "12 plus 7, and then some more of it")

SMALL: dict[int, str] = {
    103: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width "
    "block_dim ffn_hidden_size_in token_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_ff n_inner "
    "intermediate_size_mlp dim_ff block_ff_dim dense_intermediate_size mlp_hidden_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_attention_heads n_head n_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads mamba_n_heads mamba_num_heads linear_num_value_heads "
    "num_decoder_layers num_encoder_layers expert_layer_period",
    2: "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_top_k moe_k linear_num_key_heads attn_layer_period index_n_heads "
    "altup_num_inputs eos_token_id decoder_start_token_id top_k_experts num_query_groups "
    "swa_num_key_value_heads",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length "
    "max_target_positions",
    8: "head_dim num_experts num_local_experts n_routed_experts moe_num_experts kv_lora_rank "
    "q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim laurel_rank "
    "linear_value_head_dim state_size mamba_d_state mamba_d_head ssm_state_size index_topk "
    "hidden_size_per_layer_input mamba_head_dim global_head_dim query_pre_attn_scalar "
    "swa_head_dim o_lora_rank attention_head_dim kv_channels",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size sliding_window qk_head_dim block_size index_head_dim "
    "moe_shared_expert_intermediate_size moe_latent_size expert_dim",
    1: "n_shared_experts num_shared_experts n_group topk_group bos_token_id "
    "first_k_dense_replace num_dense_layers mamba_n_groups n_groups moe_layer_start_index",
    0: "pad_token_id num_kv_shared_layers num_nextn_predict_layers",
    40: "attention_window_size",
}
"""Values for the numbers of a config, by their names."""
USUAL = {name: value for value, names in SMALL.items() for name in names.split()}

OWN: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 32},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0], "num_experts_per_tok": 1},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "jamba": {"use_mamba_kernels": False, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "inkling2_text": {"unpadded_vocab_size": 103, "swa_num_attention_heads": 4, "rel_extent": 64},
    "inkling2_loop_text": {
        "unpadded_vocab_size": 103,
        "swa_num_attention_heads": 4,
        "rel_extent": 64,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "ctrl": {"dff": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": 16},
    "xlnet": {"d_inner": 48},
    "xlstm": {"num_heads": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "prophetnet": {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "gemma3n_text": {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4},
}


def tiny_config(family: str) -> Any:
    """A small config: that of the family with other numbers where `USUAL` has the name."""
    kind: Any = CONFIG_MAPPING[family]
    whole = kind()
    whole.allow_global_per_layer_attribute_access = True  # Gemma 4: not all layers are alike
    known = {*vars(whole), *getattr(whole, "attribute_map", {})}
    given = {name: value for name, value in USUAL.items() if name in known}
    told = ("id", "group", "per_tok")  # also if they are None in a config of no arguments
    given = {
        name: value
        for name, value in given.items()
        if getattr(whole, name, None) is not None or any(part in name for part in told)
    }
    if "kv_lora_rank" in given:  # latent attention, whose heads all have keys of their own
        given["num_key_value_heads"] = given["num_attention_heads"]
    config = kind(**given | OWN.get(family, {}))
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def save_tiny(family: str, folder: Path) -> int:
    """Save a random model, whose weights are so large that a fault shows; returns its size."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(std=0.25)
    lm.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return size


async def answers(model: art.TrainableModel) -> list[art.TrajectoryGroup]:
    """Four completions of each prompt, with rewards that differ."""
    groups = []
    for asked in ASKED:
        response = await model.openai_client().chat.completions.create(
            model=model.inference_name,
            messages=[{"role": "user", "content": asked}],
            max_tokens=12,
            n=4,
        )
        groups.append(
            art.TrajectoryGroup(
                art.Trajectory(
                    messages_and_choices=[{"role": "user", "content": asked}, choice],
                    reward=float(choice.index),
                )
                for choice in response.choices
            )
        )
    return groups


async def steps(folder: Path, config: dict[str, Any], done: list[str]) -> float:
    """Register a model, and train two steps; returns the largest difference of a log-prob."""
    worst = 0.0
    model = art.TrainableModel(
        name="m",
        project="families",
        base_model=str(folder),
        _internal_config=art.dev.InternalModelConfig(**config),
    )
    async with art.LocalBackend(folder.parent / f"run-{config['exact']}") as backend:
        await model.register(backend)
        done.append("registered")
        for _ in range(2):
            groups = await answers(model)
            options = art.dev.TrainConfig(importance_sampling_level="sequence")
            result = await backend.train(model, groups, learning_rate=1e-3, _config=options)
            worst = max(worst, result.metrics["mismatch/log_ratio_abs_max"])
    return worst


def trial(family: str, *, lora: bool, dtype: str, threads: int) -> dict[str, Any]:
    """What becomes of one family."""
    config: dict[str, Any] = {"exact": True, "dtype": dtype, "threads": threads}
    if lora:
        config["lora"] = art.dev.LoraConfig(r=4)
    row: dict[str, Any] = {"family": family, "lora": lora, "dtype": dtype, "threads": threads}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / family
        try:
            row["parameters"] = save_tiny(family, folder)
        except Exception as error:
            return row | {"result": "not built", "reason": f"{type(error).__name__}: {error}"}
        done: list[str] = []
        try:
            worst = asyncio.run(steps(folder, config, done))
            return row | {"result": "exact" if worst == 0 else "not exact", "worst": worst}
        except Exception as error:
            row |= told(error, refused=not done)
        if row["result"] == "refused":
            try:
                worst = asyncio.run(steps(folder, config | {"exact": None}, done))
                row["without"] = f"trains, differs by up to {worst:.1e}"
            except Exception as error:
                row["without"] = f"{type(error).__name__}: {error}"
                if done or not isinstance(error, GspoError):
                    row |= told(error, refused=False)
        return row


def told(error: Exception, *, refused: bool) -> dict[str, Any]:
    """What is noted of an error: gspo's own, before anything is sampled, refuses a model."""
    text = f"{type(error).__name__}: {error}"
    if refused and isinstance(error, GspoError):
        return {"result": "refused", "reason": text}
    lines = traceback.format_exc().splitlines()[-14:]
    return {"result": "failed", "reason": text, "traceback": lines}


def apart(family: str, **options: Any) -> dict[str, Any]:
    """`trial` in a process of its own, which may take too long or be killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with os.fdopen(writing, "w") as pipe:
            json.dump(trial(family, **options), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text, limit = "", time.monotonic() + LIMIT
        while select.select([pipe], [], [], max(0.0, limit - time.monotonic()))[0]:
            more = os.read(pipe.fileno(), 2**16).decode()
            if not more:
                break
            text += more
    if time.monotonic() > limit:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    row = {"family": family, "result": "failed", "reason": f"no answer, status {status}"}
    return json.loads(text) if text else row


def main() -> None:
    """Try the families, print a line for each, and how many there were of each result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", nargs="*")
    parser.add_argument("--lora", action="store_true", help="train adapters")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="a microbatch each")
    parser.add_argument("--json", type=Path, help="append a line for each to this file")
    asked = parser.parse_args()
    logging.getLogger("gspo").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    counts: dict[str, int] = {}
    for family in asked.families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        started = time.monotonic()
        row = apart(family, lora=asked.lora, dtype=asked.dtype, threads=asked.threads)
        row["seconds"] = round(time.monotonic() - started, 1)
        counts[row["result"]] = counts.get(row["result"], 0) + 1
        print(f"{family:22} {row['result']:10} {row.get('reason', '')[:180]}", flush=True)
        if "without" in row:
            print(f"{'':22} {'without':10} {row['without'][:180]}", flush=True)
        if asked.json is not None:
            with asked.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(counts)


if __name__ == "__main__":
    sys.exit(main())
