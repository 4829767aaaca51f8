"""TRL's side of `vs_trl.py`: one process, one job file in, one result file out.

    .venvs/trl/bin/python sides/trl_loop.py JOB.json RESULT.json

Runs in TRL's own environment and imports nothing of gspo. Everything that costs time without being
part of the loop is off: reports, logs, progress bars, checkpoints, half precision, activation
checkpointing. What is left is `GRPOTrainer.train()` as a user calls it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)

Job = dict[str, Any]


class ForcedEnds(LogitsProcessor):
    """Row r may end at its `lengths[r]`-th token only, and ends there."""

    def __init__(self, lengths: list[int], end: int):
        self._last = torch.tensor(lengths) - 1
        self._end = end
        self._at = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._end] = -torch.inf
        ends = self._last == self._at
        if bool(ends.any()):
            scores[ends] = -torch.inf
            scores[ends, self._end] = 0.0
        self._at += 1
        return scores


class Watch(TrainerCallback):
    """Closes a batch's account after its last optimizer step."""

    def __init__(self, updates: int):
        self.updates = updates
        self.batches: list[dict[str, float]] = []
        self.open: dict[str, float] = {}
        self._since = self._busy = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since, self._busy = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates:
            return
        now, busy = time.perf_counter(), time.process_time()
        total, cpu = now - self._since, busy - self._busy
        train = total - self.open["rollout_s"]
        self.batches.append({**self.open, "train_s": train, "total_s": total, "cpu_s": cpu})
        self.open, self._since, self._busy = {}, now, busy


def main(job_path: str, result_path: str) -> None:
    """Run the job."""
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(job["threads"])
    watch = Watch(job["updates"])
    trainer = make_trainer(job, watch)
    checked = check(trainer, job["check"]) if job["check"] else None
    peak_before = peak_mb()
    trainer.train()
    result = {
        "batches": watch.batches,
        "peak_rss_mb": peak_mb(),
        "peak_rss_before_mb": peak_before,
        "check": checked,
        "experts": trainer.model.config._experts_implementation,
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if job["save"]:
        trainer.save_model(job["save"])
    Path(result_path).write_text(json.dumps(result))


def make_trainer(job: Job, watch: Watch) -> Any:
    """The trainer with its settings: the paper's GSPO, and nothing that isn't asked for."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lm = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, experts_implementation=job["experts"]
    )
    rows = job["prompts_per_batch"] * job["completions"]
    generation: dict[str, Any] = {}
    if job["forced"] and not job["lengths"]:
        generation["min_new_tokens"] = job["max_tokens"]
    options = trl.GRPOConfig(
        output_dir=job["folder"],
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=job["epsilon"],
        epsilon_high=job["epsilon_high"],
        beta=0.0,
        num_iterations=1,
        per_device_train_batch_size=rows // job["updates"],
        steps_per_generation=job["updates"],
        gradient_accumulation_steps=1,
        max_steps=job["updates"] * job["batches"],
        num_generations=job["completions"],
        max_completion_length=job["max_tokens"],
        temperature=1.0,
        generation_kwargs=generation or None,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        shuffle_dataset=False,
        seed=job["seed"],
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    prompts = [[{"role": "user", "content": text}] for text in job["prompts"]]
    columns: dict[str, list[Any]] = {"prompt": prompts}
    if job["answers"]:
        columns["answer"] = job["answers"]
    trainer = trl.GRPOTrainer(
        model=lm,
        reward_funcs=[sorted_right if job["answers"] else by_place(job["completions"])],
        args=options,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer._generate = timed(trainer._generate, watch)
    trainer._calculate_rewards = timed_rewards(trainer._calculate_rewards, watch)
    if job["lengths"]:
        trainer.model.generate = forced(
            trainer.model.generate, job["lengths"], tokenizer.eos_token_id
        )
    return trainer


def timed(generate: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """Rollout time, and the tokens that were sampled."""

    def run(prompts: list[Any]) -> Any:
        started = time.perf_counter()
        out = generate(prompts)
        watch.open["rollout_s"] = time.perf_counter() - started
        watch.open["prompt_tokens"] = sum(len(ids) for ids in out[0])
        watch.open["completion_tokens"] = sum(len(ids) for ids in out[1])
        return out

    return run


def timed_rewards(rewards: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """Scoring belongs to the rollout, as on the other side."""

    def run(*args: Any) -> Any:
        started = time.perf_counter()
        out = rewards(*args)
        watch.open["rollout_s"] += time.perf_counter() - started
        watch.open["reward"] = out.mean().item()
        return out

    return run


def forced(generate: Callable[..., Any], lengths: list[int], end: int) -> Callable[..., Any]:
    """`generate` with planned ends."""

    def run(**options: Any) -> Any:
        processors = LogitsProcessorList([ForcedEnds(lengths, end)])
        return generate(**options, logits_processor=processors)

    return run


def by_place(count: int) -> Callable[..., list[float]]:
    """A reward by the place in the group: no group is flat, so every sequence is trained."""

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [row % count / count for row in range(len(completions))]

    return reward


def sorted_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for the answer, else 0: the sort task's reward."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text == right) for text, right in zip(texts, answer, strict=True)]


def check(trainer: Any, batch: Job) -> dict[str, Any]:
    """Log-probs, loss and gradient norm of TRL's own loss on a fixed batch."""
    prompts, completions = torch.tensor(batch["prompts"]), batch["completions"]
    width = max(map(len, completions))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    old = torch.tensor([row + [0.0] * (width - len(row)) for row in batch["old_logprobs"]])
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded,
        "completion_mask": mask,
        "old_per_token_logps": old,
        "advantages": torch.tensor(batch["advantages"]),
        "num_items_in_batch": mask.sum(),
    }
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompts, padded], dim=1),
            torch.cat([torch.ones_like(prompts), mask], dim=1),
            width,
        )
    model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    own = [row[: len(c)].tolist() for row, c in zip(logprobs, completions, strict=True)]
    return {"logprobs": own, "loss": loss.item(), "grad_norm": norm.item()}


def peak_mb() -> float:
    """Peak resident memory of this process so far, MB (10^6 bytes).

    VmHWM and not ru_maxrss, which starts at the peak of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
