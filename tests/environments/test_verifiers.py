from __future__ import annotations

from pathlib import Path

import pytest

from gspo.core.errors import ConfigError
from gspo.environments import Action, load_environment

try:
    import verifiers.v1  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError as error:  # it, or one of its many packages
    pytest.skip(f"verifiers cannot be imported: {error}", allow_module_level=True)

TASKSET = """
import verifiers.v1 as vf

__all__ = ["CountTaskset"]


class Data(vf.TaskData):
    answer: int


class CountTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    NEEDS_CONTAINER = {box}

    @vf.reward(weight=2.0)
    async def right(self, trace):
        return float(trace.last_reply == str(self.data.answer))

    @vf.metric
    async def length(self, trace):
        return len(trace.last_reply)


class CountConfig(vf.TasksetConfig):
    count: int = 5


class CountTaskset(vf.Taskset[CountTask, CountConfig]):
    def load(self):
        for n in range(self.config.count):
            data = Data(prompt="a" * n + "b", system_prompt="Count a.", answer=n)
            yield CountTask(data, self.config.task)
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, box in (("gspo_count", False), ("gspo_box", True)):
        (tmp_path / f"{name}.py").write_text(TASKSET.replace("{box}", str(box)))
    monkeypatch.syspath_prepend(tmp_path)


async def test_an_episode_is_a_task_and_its_scoring():
    task = load_environment("verifiers:gspo_count", {"config": {"count": 7}})()
    assert (task.reset(10), task.system_prompt) == ("aaab", "Count a.")  # 10 % 7
    step = await task.step(Action("3"))
    assert (step.reward, step.done, step.metrics) == (2.0, True, {"length": 1.0})
    assert (await task.step(Action("12"))).reward == 0
    assert task.instance(3) == task.instance(10) != task.instance(4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nosuch", {}, "taskset 'nosuch' not found"),
        ("gspo_count", {"config": {"cuont": 7}}, "cuont"),
        ("gspo_count", {"cuont": 7}, "unknown argument 'cuont'"),
        ("gspo_box", {}, "brings a container of its own"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_environment(f"verifiers:{name}", options)
