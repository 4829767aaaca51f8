"""Rollouts: this package's engine against vLLM on the CPU, offline, with log-probs.

    python benchmarks/run.py vs_vllm        # or make bench-vllm; makes an environment of 3.5 GB

Two models of random weights: a small MoE and a dense one of 18M parameters. 64 prompts x 8
completions of exactly 64 tokens, float32, the same threads. Each side in fresh processes of its
own, in turns; a process samples several rounds of new prompts, and the first ones (vLLM compiles
in them) are not counted. Checked: the number of tokens, and that the log-probs which each side
returned are those of a plain forward pass.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import run
from harness import HERE, WORK, Pairs, run_child, say, stamp
from venvs import python_of

PARTS = ("moe", "dense")
PROMPTS, PROMPT_TOKENS, COMPLETIONS, LENGTH = 64, 32, 8, 64
WARMUP, ROUNDS, REPEATS, THREADS = 2, 3, 3, 2
SIDES = HERE / "sides"
WHAT = {"moe": "MoE, 4 layers, 8 experts, width 128", "dense": "dense, 8 layers, width 384"}


def measure(repeats: int | None = None) -> list[dict[str, Any]]:
    """One row a model."""
    return [measure_part(part, repeats) for part in PARTS]


def measure_part(part: str, repeats: int | None = None) -> dict[str, Any]:
    """The row of one model."""
    folder = WORK / "vs_vllm" / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build(part, folder / "model")
    job = make_job(folder / "model", part)
    pairs = []
    for at in range(repeats or REPEATS):
        own = run_pair(job, folder, flip=at % 2 == 1)
        for side, result in zip(("ours", "vLLM"), own, strict=True):
            verify(side, job, result)
        pairs.append(own)
        a, b = (_median(result) for result in own)
        say(f"vs_vllm:{part} pair {at + 1}: ours {a:.2f} s, vLLM {b:.2f} s, ratio {b / a:.2f}")
    tokens = PROMPTS * COMPLETIONS * LENGTH
    fields = Pairs(*(tuple(_median(pair[side]) for pair in pairs) for side in (0, 1))).fields()
    rates = {"ours": round(tokens / fields["ours_s"]), "other": round(tokens / fields["other_s"])}
    version = pairs[0][1]["versions"]["vllm"]
    return stamp(
        name="vs_vllm",
        what=f"({part}) {WHAT[part]}",
        shape=f"{PROMPTS} prompts of {PROMPT_TOKENS} x {COMPLETIONS} of {LENGTH}, "
        f"{THREADS} threads",
        other=f"vLLM {version}",
        **fields,
        detail={"tokens": tokens, "tokens_per_s": rates},
        command=f"python benchmarks/run.py vs_vllm:{part}",
    ).as_dict()


def build(part: str, folder: Path) -> None:
    """The model with weights from a seed, and a tokenizer (prompts are token ids)."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
    from vocabulary import full_tokenizer

    from gspo.policy.embedded import build_tokenizer

    tokenizer = build_tokenizer() if part == "moe" else full_tokenizer(4096)
    common: dict[str, Any] = {
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    if part == "moe":
        common |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        common |= {"vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 4}
        config = Qwen3MoeConfig(norm_topk_prob=True, **common)
    else:
        common |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
        common |= {"vocab_size": len(tokenizer), "hidden_size": 384, "num_hidden_layers": 8}
        config = Qwen3Config(intermediate_size=1408, **common)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_job(model: Path, part: str) -> dict[str, Any]:
    """What both sides are told. New prompts in each round: no cache of a former one helps."""
    rng = random.Random(0)
    rounds = [
        [[rng.randint(6, 100) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
        for _ in range(WARMUP + ROUNDS)
    ]
    return {
        "model": str(model),
        "rounds": rounds,
        "completions": COMPLETIONS,
        "max_tokens": LENGTH,
        "context": PROMPT_TOKENS + LENGTH,
        "threads": THREADS,
    }


def run_pair(job: dict[str, Any], folder: Path, *, flip: bool) -> tuple[dict, dict]:
    """One fresh process a side. Returns (ours, vLLM's)."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    commands = {
        "ours": [sys.executable, SIDES / "gspo_generate.py"],
        "vllm": [python_of("vllm"), SIDES / "vllm_generate.py"],
    }
    out = {}
    for side in sorted(commands, reverse=flip):
        result = folder / f"{side}.json"
        run_child([*commands[side], path, result], THREADS, folder / f"{side}.log", timeout=1200)
        out[side] = json.loads(result.read_text())
    return out["ours"], out["vllm"]


def verify(side: str, job: dict[str, Any], result: dict[str, Any]) -> None:
    """Every round has all its tokens, and the log-probs are the model's.

    Raises:
        AssertionError: they aren't.
    """
    import torch
    from transformers import AutoModelForCausalLM

    wanted = len(job["rounds"][0]) * job["completions"] * job["max_tokens"]
    for sampled in result["rounds"]:
        assert sampled["tokens"] == wanted, f"{side}: {sampled['tokens']} tokens, not {wanted}"
    lm = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    for prompt, completion in zip(job["rounds"][0][:4], result["first"][:4], strict=True):
        tokens = completion["tokens"]
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
        gap = (expected - torch.tensor(completion["logprobs"])).abs().max().item()
        assert gap < 1e-3, f"{side}: log-probs are off by {gap:.2g}"


def _median(result: dict[str, Any]) -> float:
    return statistics.median(sampled["seconds"] for sampled in result["rounds"][WARMUP:])


def main() -> None:
    """As `run.py vs_vllm`."""
    raise SystemExit(run.main(["vs_vllm", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
