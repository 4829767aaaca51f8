"""On-policy distillation: a student learns from what a teacher thinks of its answers. No reward.

    python examples/distill.py

The teacher is `embedded:sort` after SFT on sorted digits, the student `embedded:sort` as it is.
Each step the student answers; all rewards are 0, so the KL term against the teacher is the whole
loss (docs/objective.md, 'A teacher'). The true answers are only used to measure.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time

import gspo as art
from gspo.experiment.heldout import Estimate, estimate_reward
from gspo.tasks import load_task
from gspo.tasks.task import Problem

TASK = load_task("sort")


def lesson(index: int) -> art.Trajectory:
    """What the teacher is taught: a question, and its right answer."""
    problem = TASK.problem("train", index, 1)  # the student is asked those of even seeds
    return art.Trajectory(
        messages_and_choices=[
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": problem.answer},
        ]
    )


async def rollout(model: art.TrainableModel, problem: Problem, scored: bool) -> art.Trajectory:
    """One answer. Only those that measure are compared with the right one."""
    messages = [{"role": "user", "content": problem.prompt}]
    response = await model.openai_client().chat.completions.create(
        model=model.inference_name,
        messages=messages,  # pyright: ignore[reportArgumentType]
        max_tokens=TASK.max_tokens,
    )
    choice = response.choices[0]
    reward = TASK.score(problem, choice.message.content or "") if scored else 0.0
    return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)


async def groups(
    model: art.TrainableModel, problems: list[Problem], size: int, *, scored: bool = False
) -> list[art.TrajectoryGroup]:
    """`size` answers to each question."""
    return await art.gather_trajectory_groups(
        (art.TrajectoryGroup(rollout(model, p, scored) for _ in range(size)) for p in problems),
        pbar_desc=None,
    )


async def heldout(model: art.TrainableModel, prompts: int) -> Estimate:
    """Reward on questions that neither model was trained on."""
    problems = [TASK.problem("heldout", index) for index in range(prompts)]
    return estimate_reward(await groups(model, problems, 1, scored=True))


async def distill(
    path: str,
    *,
    lessons: int = 6000,
    steps: int = 80,
    prompts: int = 64,
    completions: int = 2,
    eval_prompts: int = 400,
    learning_rate: float = 2e-4,
    seed: int = 0,
) -> tuple[Estimate, Estimate, Estimate]:
    """Held-out reward of the teacher, and of the student before and after."""
    began = time.process_time()
    async with art.LocalBackend(path=path, seed=seed, keep_checkpoints=1) as backend:
        teacher, student = (
            art.TrainableModel(name=name, project="distill", base_model="embedded:sort")
            for name in ("teacher", "student")
        )
        await teacher.register(backend)
        taught = art.TrainSFTConfig(learning_rate=2e-3, lr_schedule="linear", batch_size=16)
        checkpoint = (await teacher.train_sft(map(lesson, range(lessons)), taught)).checkpoint_path
        found = [await heldout(teacher, eval_prompts)]
        await student.register(backend)
        found.append(await heldout(student, eval_prompts))
        config = art.TrainConfig(learning_rate=learning_rate, kl_penalty_coef=1.0)
        against = art.dev.TrainConfig(kl_reference=str(checkpoint))
        for step in range(steps):
            drawn = range(step * prompts, (step + 1) * prompts)
            problems = [TASK.problem("train", index, 2 * seed) for index in drawn]
            batch = await groups(student, problems, completions)
            result = await student.train(batch, config, against)
            if step % 10 == 0:
                print(f"step {step}: KL term {result.metrics['loss/kl']:.3f}", flush=True)
        found.append(await heldout(student, eval_prompts))
    teaching, before, after = found
    print(f"held out: teacher {teaching}, student before {before}, after {after}")
    print(f"{time.process_time() - began:.0f} CPU seconds")
    return teaching, before, after


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a sorter, without a reward.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the questions, and of what is sampled"
    )
    options = parser.parse_args()
    asyncio.run(distill(tempfile.mkdtemp(prefix="distill-"), **vars(options)))


if __name__ == "__main__":
    main()
