from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

import gspo as art
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


TOOLS = """
import verifiers.v1 as vf

__all__ = ["LettersTaskset"]


class Letters(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def look_up(self, key: int) -> str:
        "Look a key up."
        return "abcdefghij"[key]


class Data(vf.TaskData):
    answer: str


class LettersTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Letters(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, trace):
        return float(trace.last_reply == self.data.answer)


class LettersTaskset(vf.Taskset[LettersTask, vf.TasksetConfig]):
    def load(self):
        yield LettersTask(Data(prompt="the largest?", answer="e"), self.config.task)


if __name__ == "__main__":
    Letters.run()
"""


@pytest.mark.slow
async def test_its_own_agent_with_tools_is_captured_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The rollout of docs/environments.md, as it stands there."""
    (tmp_path / "gspo_letters.py").write_text(TOOLS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("GSPO_KEY", "")
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    section = page.split("## Tasksets of verifiers with tools")[1]
    names: dict[str, Any] = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    loaders: Any = importlib.import_module("verifiers.v1.utils.loaders")
    (task,) = loaders.load_taskset(loaders.taskset_config_type("gspo_letters")(id="gspo_letters"))
    call = '<tool_call>{"name": "look_up", "arguments": {"key": 4}}</tool_call>'
    said = iter([call, "e"])
    async with art.FakeBackend(lambda prompt, index: next(said), port=0) as backend:
        model = art.TrainableModel(name="m", project="p", base_model="any")
        await model.register(backend)
        t = await names["rollout"](model, task)
    assert t.reward == 1 and not t.additional_histories
    assert [m["role"] for m in t.messages()] == ["user", "assistant", "tool", "assistant"]
    assert t.messages()[2]["content"] == "e"
    first, second = t.choices()
    tokens = first.prompt_token_ids + first.token_ids  # pyright: ignore
    assert second.prompt_token_ids[: len(tokens)] == tokens  # pyright: ignore
