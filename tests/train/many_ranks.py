"""Five optimizer steps by all ranks and by one process, compared. Started by torchrun:

    python -m torch.distributed.run --nproc-per-node 2 tests/train/many_ranks.py /tmp/m moe uneven

Prints one line of JSON for each case: the largest relative differences. All ranks train it first,
then each one trains some of the cases as one process and compares.

Each case leaves some ten groups of ranks in the process, and gloo's threads of them wake a hundred
times a second: name a few cases, not all. They cannot be ended, as torch finds them by name again.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import gspo as art
from gspo.kernels.token_parts import TokenParts
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.train.mesh import Mesh
from gspo.train.minibatches import prepare
from gspo.train.settings import resolve
from gspo.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import folder as saved_model
from support import random_groups

STEPS, RATE = 5, 1e-3
SMALL = {"packed_sequence_length": 60}  # several microbatches
ALL = (
    "embedded:sort",
    {"activation_checkpointing": True, "lora": {"r": 4}},
    {
        "packed_sequence_length": 40,
        "routing_replay": "old_policy",
        "router_aux_loss_coef": 0.1,
        "epsilon": "auto",
        "minibatches": 1,
        "sequence_unit": "turn",
    },
    {"cp_size": 2},
)
"""The combination that has ended farthest from one process, of many that were drawn."""
CASES: dict[str, tuple] = {
    # name: base model, InternalModelConfig, TrainConfig, and how ranks divide a model (Mesh.divide)
    "dense": ("dense", {}, SMALL),
    "dense_untied": ("dense_untied", {}, SMALL),
    "dense_lora": ("dense", {"lora": {"r": 4}}, SMALL),
    "untied_lora": ("dense_untied", {"lora": {"r": 4}}, SMALL),
    "moe": ("embedded:sort", {}, SMALL),
    "moe_lora": ("embedded:sort", {"lora": {"r": 4}}, SMALL),
    "unshared": ("embedded:sort", {}, SMALL | {"share_prefixes": False}),
    "replay": ("embedded:sort", {}, SMALL | {"routing_replay": "old_policy"}),
    "checkpointing": ("embedded:sort", {"activation_checkpointing": True}, SMALL),
    "checkpointing_lora": (
        "embedded:sort",
        {"activation_checkpointing": True, "lora": {"r": 4}},
        SMALL | {"routing_replay": "old_policy"},
    ),
    "uneven": ("embedded:sort", {}, {"packed_sequence_length": 100}),
    "empty_rank": ("embedded:sort", {}, {}),  # one microbatch: other ranks have none
    "skipped": ("embedded:sort", {}, SMALL | {"minibatches": 8}),
    "load_balance": ("embedded:sort", {}, SMALL | {"router_aux_loss_coef": 0.1}),
    "auto_epsilon": ("embedded:sort", {}, SMALL | {"epsilon": "auto"}),
    "trainer_logprobs": ("embedded:sort", {}, SMALL | {"old_logprobs": "trainer"}),
    "measured": ("embedded:sort", {}, SMALL | {"measure_routing": True}),
    "kl": ("embedded:sort", {}, SMALL),
    "kl_lora": ("embedded:sort", {"lora": {"r": 4}}, SMALL),
    "turns": ("embedded:sort", {}, SMALL | {"sequence_unit": "turn"}),
    "bfloat16": ("embedded:sort", {"dtype": "bfloat16"}, SMALL),
    "bfloat16_dense": ("dense", {"dtype": "bfloat16"}, SMALL),
    "bfloat16_lora": ("dense", {"dtype": "bfloat16", "lora": {"r": 4}}, SMALL),
    "parts": ("embedded:sort", {}, SMALL, {"cp_size": 2}),
    "parts_of_all": ("embedded:sort", {}, {}, {"cp_size": 0}),  # 0: all ranks
    "parts_dense": ("dense", {}, SMALL, {"cp_size": 2}),
    "parts_lora": ("dense", {"lora": {"r": 4}}, SMALL, {"cp_size": 2}),
    "parts_kl": ("embedded:sort", {}, SMALL, {"cp_size": 2}),
    "parts_replay": (
        "embedded:sort",
        {"activation_checkpointing": True},
        SMALL
        | {"routing_replay": "old_policy", "router_aux_loss_coef": 0.1, "measure_routing": True},
        {"cp_size": 2},
    ),
    "parts_turns": (
        "embedded:sort",
        {},
        SMALL
        | {
            "sequence_unit": "turn",
            "importance_sampling_level": "geometric_average",
            "epsilon": 0.2,
        },
        {"cp_size": 2},
    ),
    "experts": ("embedded:sort", {}, SMALL, {"ep_size": 2}),
    "experts_of_all": ("embedded:sort", {}, {}, {"ep_size": 0}),
    "experts_replay": (
        "embedded:sort",
        {"activation_checkpointing": True},
        SMALL | {"routing_replay": "old_policy", "router_aux_loss_coef": 0.1},
        {"ep_size": 2},
    ),
    "all_lora_kl": ALL,
    "damped_lora_kl": (*ALL[:2], ALL[2] | {"adam_epsilon": 1e-2}, ALL[3]),
    "experts_parts": ("embedded:sort", {}, SMALL, {"cp_size": 2, "ep_size": 2}),
}


def trained(
    name: str, mesh: Mesh | None, folder: Path, adam_epsilon: float = 1e-4, **more: Any
) -> tuple[dict, list[dict], list[dict]]:
    """The weights after five calls of `train`, the metrics of each, and the gradients of each
    optimizer step before they are clipped."""
    base, config, options, *_ = CASES[name]
    if base.startswith("dense"):
        base = str(folder / base)
    load = art.dev.InternalModelConfig(threads=1, **config)
    policy = load_policy(base, load, mesh=mesh)
    choose_packing(policy)
    policy.workers.finish(policy.lm)

    def reference(_):
        frozen = load_policy(base, load, mesh=mesh)
        frozen.packing, frozen.shares_prompts = policy.packing, policy.shares_prompts
        frozen.round_weights()
        return frozen

    trainer, metrics, gradients = Trainer(policy, reference), [], []
    step_of = trainer.optimizer.step

    def step_seen(rate: float, options: Any) -> float:
        grads = {n: p.grad for n, p in policy.trainable.items()}
        gradients.append({n: whole(g) for n, g in grads.items() if g is not None})
        return step_of(rate, options)

    trainer.optimizer.step = step_seen
    for step in range(STEPS):
        groups = random_groups(policy, groups=8, size=4, seed=step)
        if name == "skipped":  # the second group alone makes a minibatch, or none
            for t in groups[step % 8]:
                t.reward = 1.0
        kl = {"kl_penalty_coef": 0.1} if "kl" in name else {}
        settings = resolve(
            art.TrainConfig(learning_rate=RATE, **kl),
            art.dev.TrainConfig(**({"adam_epsilon": adam_epsilon} | options | more)),
        )
        batch = prepare(groups, settings, context=policy.context, vocabulary=policy.head.size)
        metrics.append(trainer.train(batch, settings).metrics.compute())
    policy.workers.finish(policy.lm)
    weights = {n: whole(p).float() for n, p in policy.lm.named_parameters()}
    weights |= trainer.optimizer.masters
    return weights, metrics, gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def apart(found: dict, expected: dict) -> float:
    """The largest difference, relative to a tensor's largest value (at least 1e-3)."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(
        float((found[n] - w).abs().max() / w.abs().max().clamp(min=1e-3))
        for n, w in expected.items()
    )


def difference(a: float, b: float) -> float:
    if math.isnan(a) and math.isnan(b):
        return 0.0
    return abs(a - b) / max(1.0, abs(b))


def by_ranks(name: str, mesh: Mesh, folder: Path) -> tuple[dict, list[dict], list[dict]]:
    """What `trained` returns; the same on every rank."""
    sizes = {"cp_size": 1, "ep_size": 1} | dict(*CASES[name][3:])
    mesh.parts = TokenParts()
    mesh.divide(*(size or mesh.size for size in sizes.values()))
    return trained(name, mesh, folder)


def compare(name: str, found: tuple[dict, list[dict], list[dict]], folder: Path) -> dict:
    weights, metrics, gradients = found
    one_weights, one_metrics, one_gradients = trained(name, None, folder)
    told = {}
    for mine, one in zip(metrics, one_metrics, strict=True):
        same = {
            k
            for k in one
            if not k.startswith(
                ("time/", "tokens/packed", "tokens/computed", "tokens/shared", "throughput")
            )
        }
        assert {k for k in mine if k in same or k in one} >= same, same - mine.keys()
        for k in same:
            told[k] = max(told.get(k, 0.0), difference(mine[k], one[k]))
    worst = max(told, key=told.__getitem__)
    return {
        "case": name,
        "weights": apart(weights, one_weights),
        "gradients": apart(gradients[0], one_gradients[0]),  # at the same weights
        "metrics": told[worst],
        "metric": worst,
        "updates": sum(m["optim/updates"] for m in metrics),
    }


def main() -> None:
    mesh, folder = Mesh(60), Path(sys.argv[1])
    if mesh.rank == 0:
        for kind, tied in (("dense", True), ("dense_untied", False)):
            saved_model(folder / kind, "llama", tie_word_embeddings=tied)
    mesh.share(None)  # the folders are there
    mine = {}
    for number, name in enumerate(sys.argv[2:] or CASES):
        found = by_ranks(name, mesh, folder)
        if number % mesh.size == mesh.rank:
            mine[name] = found
    for name, found in mine.items():
        # In one piece: other ranks print into the same pipe.
        sys.stdout.write(json.dumps(compare(name, found, folder)) + "\n")
        sys.stdout.flush()
    mesh.close()


if __name__ == "__main__":
    main()
