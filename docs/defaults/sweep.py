"""Sweep the learning rate, for the defaults of docs/defaults.md: about 10 minutes of one core.

    OMP_NUM_THREADS=1 python docs/defaults/sweep.py             # what sweep.json lacks
    OMP_NUM_THREADS=1 python docs/defaults/sweep.py dense       # the cells of one model
    python docs/defaults/sweep.py --table                       # the table of the page

Each cell is a short run of the task `sort`; its held-out reward before and after goes to
sweep.json at once, so that the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gspo.dev import InternalModelConfig, LoraConfig, TrainConfig
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import run_experiment
from gspo.experiment.spec import Spec
from gspo.policy import embedded
from gspo.tasks import load_task

RESULTS = Path(__file__).with_name("sweep.json")
SEEDS = (0, 1, 2)
DENSE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
"""A dense Qwen3 of 1.3M parameters, in a folder as Hugging Face has it."""

GRIDS: dict[str, tuple[str, bool, tuple[tuple[float, int], ...]]] = {
    # name: model, LoRA, pairs of learning rate and lr_warmup_steps
    "moe": (
        "embedded:sort",
        False,
        (
            *((rate, 0) for rate in (5e-6, 1e-4, 3e-4, 1e-3)),
            *((rate, 5) for rate in (1e-4, 1.5e-4, 3e-4, 1e-3)),
        ),
    ),
    "moe-lora": ("embedded:sort", True, ((5e-4, 5), (1.5e-3, 5), (5e-3, 5))),
    "dense": ("dense", False, ((2e-5, 5), (6.2e-5, 5), (2e-4, 5))),
    "dense-lora": ("dense", True, ((2e-4, 5), (6.2e-4, 5), (2e-3, 5))),
}


TITLES = {
    "moe": "`embedded:sort` (MoE, 0.23M), full",
    "moe-lora": "the same, LoRA",
    "dense": "dense Qwen3 from a folder (1.3M), full",
    "dense-lora": "the same, LoRA",
}
CHOSEN = {
    "moe": [(1.5e-4, 5)],
    "moe-lora": [(1.5e-3, 5)],
    "dense": [(6.2e-5, 5)],
    "dense-lora": [(6.2e-4, 5)],
}
"""What the defaults are: see src/gspo/train/defaults.py."""


class Silent:
    """A watch that shows nothing."""

    def started(self, spec: Spec, step: int, notes: list[str]) -> None: ...
    def stepped(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, estimate: Estimate) -> None: ...


def main() -> None:
    """Run the cells that sweep.json lacks."""
    parser = argparse.ArgumentParser(description="Sweep the learning rate.")
    parser.add_argument("grids", nargs="*", help=f"of {', '.join(GRIDS)}; default: all")
    parser.add_argument("--table", action="store_true", help="print what sweep.json has")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    names = arguments.grids or list(GRIDS)
    logging.getLogger("gspo").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for cell in cells(names):
        if any(cell.items() <= row.items() for row in rows):
            continue
        row = cell | run(**cell)
        print(json.dumps(row), flush=True)
        rows.append(row)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/defaults.md: change of the held-out reward, one number a seed."""
    lines = ["| model | learning rate | warmup | change |", "|---|---|---|---|"]
    for name, (_, _, pairs) in GRIDS.items():
        for rate, warmup in sorted(pairs):
            key = {"grid": name, "learning_rate": rate, "warmup": warmup}
            found = [row for row in rows if key.items() <= row.items()]
            changes = ", ".join(f"{row['after'] - row['before']:+.3f}" for row in found)
            cells = [TITLES[name], f"{rate:g}", str(warmup), changes]
            cells = [f"**{cell}**" for cell in cells] if (rate, warmup) in CHOSEN[name] else cells
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cells(names: list[str]) -> Iterator[dict[str, Any]]:
    """The settings of each run."""
    for name in names:
        for seed, (rate, warmup) in itertools.product(SEEDS, GRIDS[name][2]):
            yield {"grid": name, "learning_rate": rate, "warmup": warmup, "seed": seed}


def run(grid: str, learning_rate: float, warmup: int, seed: int) -> dict[str, Any]:
    """One cell: 20 steps of 16 prompts x 16 completions; held-out reward over 128 prompts."""
    model, lora, _ = GRIDS[grid]
    with tempfile.TemporaryDirectory() as path:
        spec = Spec(
            path=path,
            model=str(dense_model()) if model == "dense" else model,
            task="sort",
            steps=20,
            prompts=16,
            completions=16,
            eval_prompts=128,
            seed=seed,
            learning_rate=learning_rate,
            train=TrainConfig(lr_warmup_steps=warmup),
            load=InternalModelConfig(lora=LoraConfig() if lora else None),
        )
        outcome = asyncio.run(run_experiment(spec, Silent()))
    assert outcome.before is not None and outcome.after is not None
    return {
        "before": round(outcome.before.mean, 4),
        "after": round(outcome.after.mean, 4),
        "seconds": round(outcome.seconds, 1),
    }


def dense_model() -> Path:
    """A small dense model that has seen some sorting, built at the first call."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = embedded.cache_folder() / "defaults-dense"
    if (folder / "config.json").exists():
        return folder
    tokenizer = embedded.build_tokenizer()
    shape = {k: v for k, v in embedded._CONFIG.items() if "expert" not in k and "aux" not in k}
    for name in ("moe_intermediate_size", "norm_topk_prob"):
        del shape[name]
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None}
    tokens |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings: dict[str, Any] = {**shape, **DENSE, **tokens}
    config = Qwen3Config(**settings)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    recipe = {"steps": 70, "batch": 64, "learning_rate": 2e-3}
    embedded.warm_start(model, tokenizer, load_task("sort"), recipe)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}", flush=True)
    return folder


if __name__ == "__main__":
    main()
