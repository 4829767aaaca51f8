"""The golden runs: short trainings through the public API, whose numbers a rebuilding may not move.

Only rounding depends on the machine: the base models' weights are drawn by numpy, each request has
a seed, and rewards are a function of the sampled ids. `adam_epsilon` is large, so that AdamW does
not blow up the rounding of gradients near zero.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, Qwen3Config, Qwen3MoeConfig
from transformers import Qwen3ForCausalLM as Dense
from transformers import Qwen3MoeForCausalLM as Moe

import gspo as art
from gspo.kernels.hf import quiet
from gspo.policy.embedded import build_tokenizer

STEPS = 3
GROUPS, COMPLETIONS, TOKENS = 4, 4, 10
METRICS = (
    "loss/policy",
    "loss/kl",
    "train/reward",
    "optim/grad_norm",
    "optim/learning_rate",
    "ratio/clip_fraction",
    "ratio/log_square",
    "mismatch/log_ratio_mean",
    "moe/experts_changed",
    "tokens/completion",
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Case:
    """One golden run.

    Attributes:
        base: `dense` or `moe`.
        train: options of `dev.TrainConfig`.
        load: options of `dev.InternalModelConfig`.
        learning_rate: small where a method turns rounding into much more.
        tolerance: by which metrics may differ on a CPU of another kind.
        kl: `TrainConfig.kl_penalty_coef`.
        turns: assistant turns of each trajectory.
        resumed: the backend is closed and opened again after every step.
        routes: rollouts carry the engine's expert choices.
    """

    base: str = "dense"
    train: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-3
    tolerance: float = 1e-6
    kl: float = 0.0
    turns: int = 1
    resumed: bool = False
    routes: bool = False


def _preset(name: str, **more: Any) -> Case:
    return Case(train={"algorithm": name, **more})


CASES = {
    # One of each family: what the ratio is taken over, how it is bounded, what is averaged.
    "gspo": Case(train={"importance_sampling_level": "sequence"}),
    "gspo_token": _preset("gspo_token"),
    "grpo": _preset("grpo"),
    "dr_grpo": _preset("dr_grpo"),
    "dapo": _preset("dapo"),
    "cispo": _preset("cispo", epsilon_high=0.1),
    "gmpo": _preset("gmpo"),
    "sapo": _preset("sapo"),
    # Its loss counts each sequence by its length: another vendor's sums move it by 1.2e-6.
    "luspo": Case(train={"algorithm": "luspo"}, tolerance=5e-6),
    # Its weights are powers of the product of all ratios, times log-probs of -5: the rounding of
    # float32 alone is above 1e-6 there.
    "vespo": Case(train={"algorithm": "vespo"}, learning_rate=3e-4, tolerance=1e-5),
    "dppo": _preset("dppo", epsilon=0.001),
    "rloo": _preset("rloo"),
    "reinforce": _preset("reinforce"),
    "moe": Case("moe", {"measure_routing": True, "router_aux_loss_coef": 0.01}),
    "replay_old_policy": Case("moe", {"routing_replay": "old_policy", "epochs": 2}),
    "replay_rollout": Case("moe", {"routing_replay": "rollout"}, routes=True),
    "lora": Case("moe", load={"lora": {"r": 4, "alpha": 8.0}}),
    "checkpointing": Case("moe", load={"activation_checkpointing": True}),
    "kl": Case(train={"algorithm": "gspo"}, kl=0.05),
    "kl_tokens": Case(train={"algorithm": "dr_grpo"}, kl=0.05, load={"lora": {"r": 4}}),
    "turns": Case(train={"sequence_unit": "turn"}, turns=2),
    "trajectory": Case("moe", turns=3),
    "int4": Case(load={"rollout_dtype": "int4"}, train={"epsilon": 0.05}),
    "trainer_old": Case(
        load={"rollout_dtype": "int8"},
        train={"old_logprobs": "trainer", "correction": "sequence_product_truncate"},
        learning_rate=3e-4,
        tolerance=1e-5,  # its weights are products over all tokens
    ),
    "auto_epsilon": Case(
        train={"epsilon": "auto", "epsilon_target": 0.02, "epsilon_scale": "sqrt_length"},
        learning_rate=1e-4,  # log-ratios of the size of the range: that is where it steers
    ),
    "schedule": Case(
        train={
            "lr_schedule": "cosine",
            "lr_warmup_steps": 1,
            "lr_total_steps": 3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
        }
    ),
    "resumed": Case(resumed=True),
    "microbatches": Case("moe", {"packed_sequence_length": 40, "share_prefixes": False}),
}


def make_base(kind: str, folder: Path) -> Path:
    """A random model in Hugging Face layout, the same on any machine."""
    tokenizer = build_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model: PreTrainedModel
    if kind == "dense":
        model = Dense(Qwen3Config(**SHAPE, **ids))
    else:
        model = Moe(Qwen3MoeConfig(**SHAPE, **EXPERTS, **ids))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
            scale = 1.0 if weight.dim() > 1 else 0.05
            mean = 1.0 if "norm" in name else 0.0
            values = mean + scale * 0.2 * draw.standard_normal(weight.shape)
            weight.copy_(torch.from_numpy(values.astype(np.float32)))
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def run(name: str, base: Path, path: Path) -> dict[str, Any]:
    """One case: its metrics step by step, and digests of the sampled ids and of the weights."""
    case = CASES[name]
    load = art.dev.InternalModelConfig(threads=1, device="cpu", **case.load)
    model = art.TrainableModel(
        name=name, project="golden", base_model=str(base), _internal_config=load
    )
    backend = await _opened(model, path)
    steps, sampled = [], hashlib.sha256()
    for step in range(STEPS):
        groups = [await _group(model, case, step, g, sampled) for g in range(GROUPS)]
        options = {"minibatches": 2, "adam_epsilon": 1e-3, **case.train}
        result = await model.train(
            groups,
            config=art.TrainConfig(learning_rate=case.learning_rate, kl_penalty_coef=case.kl),
            _config=art.dev.TrainConfig(**options),
        )
        steps.append({key: result.metrics[key] for key in METRICS if key in result.metrics})
        if case.resumed and step + 1 < STEPS:
            await backend.close()
            backend = await _opened(model, path)
    await backend.close()
    saved = path / "golden" / name / "checkpoints" / f"{STEPS:04d}"
    return {"steps": steps, "sampled": sampled.hexdigest(), **_weights(saved)}


async def _opened(model: art.TrainableModel, path: Path) -> art.LocalBackend:
    backend = art.LocalBackend(path)
    await model.register(backend)
    return backend


async def _group(
    model: art.TrainableModel, case: Case, step: int, number: int, sampled: Any
) -> art.TrajectoryGroup:
    trajectories = []
    for index in range(COMPLETIONS):
        items: list[Any] = [{"role": "user", "content": f"{step}: {7919 * (number + 1)}"}]
        ids: list[int] = []
        for turn in range(case.turns):
            messages = [
                item if isinstance(item, dict) else item.message.model_dump(exclude_none=True)
                for item in items
            ]
            response = await model.openai_client().chat.completions.create(
                model=model.inference_name,
                messages=messages,  # pyright: ignore[reportArgumentType]
                max_tokens=TOKENS,
                seed=((step * GROUPS + number) * COMPLETIONS + index) * 8 + turn,
                extra_body={"return_routes": True} if case.routes else None,
            )
            choice: Any = response.choices[0]
            ids += choice.token_ids
            items += [choice, {"role": "user", "content": "again"}]
        sampled.update(json.dumps(ids).encode())
        reward = (sum(ids) + len(ids)) % 8 / 7
        trajectories.append(art.Trajectory(messages_and_choices=items[:-1], reward=reward))
    return art.TrajectoryGroup(trajectories)


def _weights(checkpoint: Path) -> dict[str, Any]:
    """SHA-256 over the saved tensors, for a like CPU; their sums, for another."""
    digest, total, square = hashlib.sha256(), 0.0, 0.0
    for file in sorted(checkpoint.glob("*model.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in sorted(tensors.keys()):
                values = tensors.get_tensor(key).float().contiguous().numpy()
                digest.update(key.encode() + values.tobytes())
                total += float(values.sum(dtype=np.float64))
                square += float(np.square(values, dtype=np.float64).sum())
    return {"weights": digest.hexdigest(), "weights_sum": total, "weights_square": square}
