"""The public surface, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gspo
import gspo as art
from gspo.tasks import load_task


def test_all_is_sorted_and_importable():
    assert gspo.__all__ == sorted(gspo.__all__)
    for name in gspo.__all__:
        assert getattr(gspo, name) is not None
    assert dir(gspo) == gspo.__all__


def test_surface_is_frozen():
    assert gspo.__all__ == [
        "Backend",
        "ClusterBackend",
        "Engine",
        "FakeBackend",
        "FakeEngine",
        "GspoError",
        "History",
        "LocalBackend",
        "Messages",
        "MessagesAndChoices",
        "Model",
        "Tools",
        "TrainConfig",
        "TrainResult",
        "TrainSFTConfig",
        "TrainableModel",
        "Trajectory",
        "TrajectoryGroup",
        "__version__",
        "auto_trajectory",
        "capture_auto_trajectory",
        "capture_yielded_trajectory",
        "dev",
        "errors",
        "gather_trajectories",
        "gather_trajectory_groups",
        "langgraph",
        "objective",
        "register_algorithm",
        "retry",
        "rewards",
        "train",
        "trajectory",
        "trajectory_group_batches",
        "yield_trajectory",
    ]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        gspo.Trainer  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match=r"'LocalBakend'. Did you mean 'LocalBackend'\?"):
        gspo.LocalBakend  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["local", "mcp", "metrics", "utils"])
def test_modules_of_arts_names_need_no_import(name: str):
    assert gspo.__getattr__(name).__name__ == f"gspo.{name}"  # pyright: ignore[reportCallIssue]


def test_import_is_light():
    code = (
        "import sys, gspo; "
        "heavy = {'torch', 'transformers', 'openai', 'numpy', 'fastapi'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_the_art_snippet_runs_verbatim():
    """The issue's snippet: one changed import, one option."""
    model = art.TrainableModel(name="sorter", project="demo", base_model="embedded:sort")
    backend = art.FakeBackend()
    await model.register(backend)
    client = model.openai_client()

    async def rollout(model: art.TrainableModel, task: str) -> art.Trajectory:
        messages = [{"role": "user", "content": task}]
        response = await client.chat.completions.create(
            model=model.inference_name,
            messages=messages,  # pyright: ignore[reportArgumentType]
        )
        choice = response.choices[0]
        reward = float("a" in (choice.message.content or ""))
        return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)

    trajectory_groups = await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout(model, task) for _ in range(8)) for task in ("x", "y")
    )

    await model.train(
        trajectory_groups, _config=art.dev.TrainConfig(importance_sampling_level="sequence")
    )

    assert await model.get_step() == 1
    assert backend.trained == [trajectory_groups]
    await backend.close()


def test_task_problems_are_functions_of_their_arguments():
    one, two = load_task("sort"), load_task("sort")
    assert one.problem("train", 3, seed=1) == two.problem("train", 3, seed=1)


def test_the_lock_installs_from_registries_only() -> None:
    lock = Path(__file__).parents[1] / "requirements.lock"
    assert not [line for line in lock.read_text().splitlines() if "@" in line or "://" in line]
