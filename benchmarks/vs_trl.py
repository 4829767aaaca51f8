"""A training loop of GSPO: this package against TRL's GRPOTrainer, on equal work.

    python benchmarks/run.py vs_trl          # or vs_trl:a ... vs_trl:e

Each side runs in a fresh process of its own, in turns, with the same weights, prompts, forced
completion lengths, threads and precision (float32). A rollout batch is sampled once and split into
four minibatches of one optimizer step each. Counted is the time from the end of one batch's last
update to the end of the next one's. Not counted, because one side or both don't do it: checkpoints,
reports, and this package's log of metrics and trajectories (given apart as `written_s`).

Checked before a figure is believed: both sides sampled the same number of tokens, trained on all
of them, and give the same log-probs, loss and gradient norm on one fixed batch.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import run
from harness import HERE, WORK, Pairs, run_child, say, stamp
from trl_jobs import SHAPES, UPDATES, Shape, learning_job, make_job
from venvs import python_of

PARTS = ("a", "b", "c", "d", "e")
SIDES = HERE / "sides"
LEARN_STEPS, LEARN_SEEDS, HELD_OUT = 30, (0,), 256


def measure(parts: Sequence[str] = PARTS, repeats: int | None = None) -> list[dict[str, Any]]:
    """One row a shape."""
    return [measure_part(part, repeats) for part in parts]


def measure_part(part: str, repeats: int | None = None) -> dict[str, Any]:
    """The row of one shape; with (a) also the rewards after equal steps on the sort task."""
    shape = SHAPES[part]
    folder = _fresh(part)
    job = make_job(shape, folder)
    pairs = []
    for at in range(repeats or shape.repeats):
        own = run_pair(job, folder, flip=at % 2 == 1)
        verify(shape, job, *own)
        pairs.append(own)
        say(f"vs_trl:{part} pair {at + 1}: {_line(job, *own)}")
        job = job | {"check": None}  # once is enough
    detail = details(job, pairs)
    if part == "a":
        detail["sort_task"] = [learned(seed) for seed in LEARN_SEEDS]
    totals = [tuple(_median(job, pair[side], "total_s") for pair in pairs) for side in (0, 1)]
    memory = [statistics.median(pair[side]["peak_rss_mb"] for pair in pairs) for side in (0, 1)]
    versions = pairs[0][1]["versions"]
    return stamp(
        name="vs_trl",
        what=f"({part}) {shape.what}",
        shape=shape.text,
        other=f"TRL {versions['trl']} GRPOTrainer",
        **Pairs(*totals).fields(),
        goal=shape.goal,
        ours_mb=round(memory[0], 1),
        other_mb=round(memory[1], 1),
        detail=detail,
        versions=versions | {"transformers, ours": pairs[0][0]["versions"]["transformers"]},
        command=f"python benchmarks/run.py vs_trl:{part}",
    ).as_dict()


def run_pair(job: dict[str, Any], folder: Path, *, flip: bool) -> tuple[dict, dict]:
    """One fresh process a side, one after the other. Returns (ours, TRL's)."""
    commands = {
        "ours": [sys.executable, SIDES / "gspo_loop.py"],
        "trl": [python_of("trl"), SIDES / "trl_loop.py"],
    }
    out = {}
    for side in sorted(commands, reverse=flip):
        path, result = folder / f"{side}_job.json", folder / f"{side}.json"
        save = job["save"] and str(Path(job["save"]) / side)
        path.write_text(json.dumps(job | {"save": save}))
        command = [*commands[side], path, result]
        run_child(command, job["threads"], folder / f"{side}.log", timeout=1800)
        out[side] = json.loads(result.read_text())
    return out["ours"], out["trl"]


def verify(shape: Shape, job: dict[str, Any], ours: dict, theirs: dict) -> None:
    """The work was equal, and so were the numbers.

    Raises:
        AssertionError: it wasn't.
    """
    sampled = sum(job["lengths"] or []) or shape.prompts * shape.completions * job["max_tokens"]
    prompted = shape.prompts * shape.prompt_tokens * shape.completions
    for side, result in (("ours", ours), ("TRL", theirs)):
        assert job["experts"] in (None, result["experts"]), f"{side}: {result['experts']}"
        assert len(result["batches"]) == job["batches"], f"{side}: {len(result['batches'])} batches"
        for batch in result["batches"]:
            got = batch["completion_tokens"], batch["prompt_tokens"]
            assert got == (sampled, prompted), f"{side}: {got}, not {sampled, prompted} tokens"
            cores = batch["cpu_s"] / batch["total_s"]
            assert cores < shape.threads + 0.2, f"{side}: {cores:.1f} cores, not {shape.threads}"
    for batch in ours["batches"]:
        assert batch["trained_tokens"] == sampled, "a group had equal rewards: work was saved"
        assert batch["updates"] == UPDATES
    if job["check"] is None:
        return
    for side, got in (("ours", ours["check"]), ("TRL", theirs["check"])):
        worst = _gap(got["logprobs"], job["check"]["logprobs"])
        assert worst < 1e-4, f"{side}: log-probs are off by {worst:.2g}"
        assert abs(got["loss"] - job["check"]["loss"]) < 1e-4, f"{side}: loss {got['loss']}"
    norms = ours["check"]["grad_norm"], theirs["check"]["grad_norm"]
    assert abs(norms[0] - norms[1]) < 1e-3 * norms[0], f"gradient norms {norms}"


def details(job: dict[str, Any], pairs: Sequence[tuple[dict, dict]]) -> dict[str, Any]:
    """Tokens, and each side's rollout and train seconds and tokens/s, as medians."""
    tokens = pairs[0][0]["batches"][0]["completion_tokens"]
    detail: dict[str, Any] = {"tokens_per_batch": tokens}
    for side, name in enumerate(("ours", "other")):
        runs = [pair[side] for pair in pairs]
        keys = [key for key in runs[0]["batches"][0] if key.endswith("_s")]
        parts = {key: statistics.median(_median(job, run, key) for run in runs) for key in keys}
        parts["tokens_per_s"] = tokens / parts["total_s"]
        detail[name] = {key: round(value, 4) for key, value in parts.items()}
    return detail


def learned(seed: int) -> dict[str, Any]:
    """Held-out reward on the sort task before and after the same number of updates on each side.

    Same weights, prompts, learning rate, clip range and minibatches; the random numbers differ,
    and so does the order of the minibatches. The judge is the same for both: this package's engine.
    """
    folder = _fresh(f"learn-{seed}")
    job = learning_job(folder, LEARN_STEPS, seed) | {"save": str(folder / "after")}
    run_pair(job, folder, flip=seed % 2 == 1)
    found = {
        "seed": seed,
        "updates": LEARN_STEPS * UPDATES,
        "before": held_out_reward(job["model"]),
        "ours": held_out_reward(folder / "after" / "ours"),
        "other": held_out_reward(folder / "after" / "trl"),
    }
    say(f"vs_trl:a sort task: {found}")
    return found


def held_out_reward(model: str | Path) -> float:
    """Mean reward over held-out prompts, four samples each at temperature 1."""
    from gspo.policy.load import load_policy
    from gspo.serve.engine import Request, SamplingParams
    from gspo.serve.torch_engine import TorchEngine
    from gspo.serve.verbatim import chat_tokens
    from gspo.tasks import load_task

    task, engine = load_task("sort"), TorchEngine(load_policy(str(model)))
    problems = [task.problem("heldout", index) for index in range(HELD_OUT)]
    params = SamplingParams(n=4, max_tokens=task.max_tokens)
    requests = [
        Request(tuple(chat_tokens(engine, task.messages(problem))), params) for problem in problems
    ]
    rewards = [
        task.score(problem, completion.text)
        for problem, own in zip(problems, engine.generate(requests), strict=True)
        for completion in own
    ]
    return round(statistics.fmean(rewards), 4)


def _fresh(name: str) -> Path:
    folder = WORK / "vs_trl" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _median(job: dict[str, Any], result: dict, key: str) -> float:
    """Over the batches after the warm-up."""
    warmup = job["batches"] > 1
    return statistics.median(batch[key] for batch in result["batches"][warmup:])


def _gap(a: list[list[float]], b: list[list[float]]) -> float:
    pairs = [
        (x, y) for own, other in zip(a, b, strict=True) for x, y in zip(own, other, strict=True)
    ]
    return max(abs(x - y) for x, y in pairs)


def _line(job: dict[str, Any], ours: dict, theirs: dict) -> str:
    texts = []
    for side, result in (("ours", ours), ("TRL", theirs)):
        total, rollout, train = (
            _median(job, result, key) for key in ("total_s", "rollout_s", "train_s")
        )
        memory = f"{result['peak_rss_mb']:.0f} MB"
        texts.append(f"{side} {total:.2f} s ({rollout:.2f} + {train:.2f}), {memory}")
    ratio = _median(job, theirs, "total_s") / _median(job, ours, "total_s")
    return f"{'; '.join(texts)}; ratio {ratio:.2f}"


def main() -> None:
    """As `run.py vs_trl:<shape>`."""
    raise SystemExit(run.main([f"vs_trl:{part}" for part in sys.argv[1:] or PARTS]))


if __name__ == "__main__":
    main()
