"""gspo's side of `vs_trl.py`: one process, one job file in, one result file out.

    python sides/gspo_loop.py JOB.json RESULT.json

The loop is the one of README.md: `TrainableModel`, `LocalBackend`, its OpenAI client and
`model.train`. Not counted, because TRL's side does neither: writing the checkpoint (which isn't
written), and the run's log of metrics and trajectories (written, timed apart as `written_s`).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

# Each side has what its package alone brings. The environment of gspo's benchmarks has more, and
# transformers imports scipy and PIL, 45 MB, wherever they are.
if __name__ == "__main__":
    for extra in ("scipy", "PIL", "accelerate", "peft"):
        sys.modules[extra] = None  # pyright: ignore[reportArgumentType]

import gspo as art

Job = dict[str, Any]


def main(job_path: str, result_path: str) -> None:
    """Run the job."""
    job = json.loads(Path(job_path).read_text())
    result = asyncio.run(run(job))
    Path(result_path).write_text(json.dumps(result))


async def run(job: Job) -> dict[str, Any]:
    """Register, check, and go round the loop."""
    from forced import FORCED

    from gspo.train import checkpoint_writer

    # The one thing that is taken away: TRL runs with save_strategy="no".
    unwritten = (Path(os.devnull), lambda: None)
    unsaved = mock.patch.object(checkpoint_writer, "begin_checkpoint", lambda *_, **__: unwritten)
    with tempfile.TemporaryDirectory() as folder, unsaved:
        backend = art.LocalBackend(folder, seed=job["seed"])
        model = art.TrainableModel(
            name="model",
            project="benchmark",
            base_model=job["model"],
            _internal_config=art.dev.InternalModelConfig(threads=job["threads"]),
        )
        await model.register(backend)
        own = backend._service(model)
        checked = await compute(backend, check, own, job["check"]) if job["check"] else None
        extra = dict(FORCED) if job["forced"] else {}
        peak_before = peak_mb()
        batches = [await one_batch(job, model, at, extra) for at in range(job["batches"])]
        peak = peak_mb()
        if job["save"]:
            from gspo.policy.load import save_weights

            save_weights(own.trainer.policy, Path(job["save"]))
        experts = own.trainer.policy.lm.config._experts_implementation
        await backend.close()
    return {
        "batches": batches,
        "peak_rss_mb": peak,
        "peak_rss_before_mb": peak_before,
        "check": checked,
        "experts": experts,
        "versions": _versions(),
    }


async def one_batch(
    job: Job, model: art.TrainableModel, at: int, extra: dict[str, Any]
) -> dict[str, float]:
    """One rollout batch and its optimizer steps."""
    started, busy = time.perf_counter(), time.process_time()
    size = job["prompts_per_batch"]
    first = at * size % len(job["prompts"])
    groups = await art.gather_trajectory_groups(
        (group(job, model, p, extra) for p in range(first, first + size)), pbar_desc=None
    )
    rolled = time.perf_counter()
    result = await model.train(
        groups,
        config=art.TrainConfig(learning_rate=job["learning_rate"]),
        _config=art.dev.TrainConfig(
            importance_sampling_level="sequence",
            epsilon=job["epsilon"],
            epsilon_high=job["epsilon_high"],
            minibatches=job["updates"],
        ),
    )
    done, busy = time.perf_counter(), time.process_time() - busy
    written = result.metrics["time/checkpoint"]
    choices = [t.choices()[0] for g in groups for t in g]
    return {
        "rollout_s": rolled - started,
        "train_s": done - rolled - written,
        "total_s": done - started - written,
        "written_s": written,
        "cpu_s": busy,
        "prompt_tokens": sum(len(c.prompt_token_ids) for c in choices),  # pyright: ignore
        "completion_tokens": sum(len(c.token_ids) for c in choices),  # pyright: ignore
        "trained_tokens": result.metrics["tokens/trained"],
        "updates": result.metrics["optim/updates"],
        "reward": result.metrics["train/reward"],
    }


async def group(
    job: Job, model: art.TrainableModel, prompt: int, extra: dict[str, Any]
) -> art.TrajectoryGroup:
    """All completions of one prompt: one request, or one for each planned length."""
    count = job["completions"]
    lengths = job["lengths"] and job["lengths"][prompt * count : (prompt + 1) * count]
    messages: list[Any] = [{"role": "user", "content": job["prompts"][prompt]}]
    asked = [(count, job["max_tokens"])] if not lengths else [(1, length) for length in lengths]
    client = model.openai_client()
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(
                model=model.inference_name,
                messages=messages,
                n=n,
                max_tokens=limit,
                extra_body=extra or None,
            )
            for n, limit in asked
        )
    )
    answer = job["answers"][prompt] if job["answers"] else None
    choices = [choice for response in answers for choice in response.choices]
    # Without a task a reward by the place in the group, as on TRL's side: no group is flat.
    rewards = [
        place / count if answer is None else float(choice.message.content == answer)
        for place, choice in enumerate(choices)
    ]
    return art.TrajectoryGroup(
        art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)
        for choice, reward in zip(choices, rewards, strict=True)
    )


async def compute(backend: art.LocalBackend, function: Any, *args: Any) -> Any:
    """On the backend's compute thread, as training is."""
    return await backend._compute.run(function, *args)


def check(service: Any, batch: Job) -> dict[str, Any]:
    """Log-probs, loss and gradient norm of one optimizer step's loss on a fixed batch."""
    import torch

    from gspo.data.packing import pack
    from gspo.train.expert_replay import ExpertReplay
    from gspo.train.minibatches import RolloutBatch
    from gspo.train.observe import Observer
    from gspo.train.settings import resolve
    from gspo.train.trainer import Call

    policy = service.trainer.policy
    samples = fixed_samples(batch)
    options = art.dev.TrainConfig(
        importance_sampling_level="sequence",
        epsilon=batch["epsilon"],
        epsilon_high=batch["epsilon_high"],
        packed_sequence_length=4096,
        share_prefixes=False,
    )
    settings = resolve(options=options)
    trajectories = tuple((sample,) for sample in samples)
    watch = Observer(policy, RolloutBatch(trajectories, (0.0,) * len(samples), 0))
    experts = ExpertReplay(policy, settings, watch.metrics)
    call = Call(settings, [trajectories], experts, watch)
    service.trainer.gradient(trajectories, call)
    gradients = [p.grad for p in policy.trainable.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    service.trainer.optimizer.clear()
    logprobs: list[list[float]] = [[] for _ in samples]
    with torch.no_grad():
        for microbatch in pack(samples, budget=4096):
            values = policy.logprobs(microbatch).logprobs.tolist()
            for trajectory_id in microbatch.trajectory_ids:
                count = samples[trajectory_id].sampled
                logprobs[trajectory_id], values = values[:count], values[count:]
    loss = watch.metrics.compute()["loss/policy"]
    assert math.isfinite(norm)
    return {"logprobs": logprobs, "loss": loss, "grad_norm": norm}


def fixed_samples(batch: Job) -> list[Any]:
    """The batch of `check` as samples."""
    import numpy as np

    from gspo.data.sample import Sample

    samples = []
    rows = zip(
        batch["prompts"],
        batch["completions"],
        batch["old_logprobs"],
        batch["advantages"],
        strict=True,
    )
    for i, (prompt, completion, old, advantage) in enumerate(rows):
        length = len(prompt) + len(completion)
        mask = np.arange(length) >= len(prompt)
        logprobs = np.array([0.0] * len(prompt) + old, np.float32)
        samples.append(
            Sample(
                tokens=np.array(prompt + completion),
                ratio_mask=mask,
                old_logprobs=logprobs,
                sampling_logprobs=logprobs,
                temperatures=np.ones(length, np.float32),
                turn_ids=np.where(mask, 0, -1),
                policy_versions=np.full(length, -1),  # no engine gave them these log-probs
                trajectory_id=i,
                group_id=0,
                advantage=advantage,
            )
        )
    return samples


def peak_mb() -> float:
    """Peak resident memory of this process so far, MB (10^6 bytes).

    VmHWM and not ru_maxrss, which starts at the peak of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main(*sys.argv[1:])
