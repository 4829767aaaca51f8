"""`verifiers:<taskset>`: the tasks of an installed package, and their own scoring."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

from gspo.core.byname import optional
from gspo.core.errors import ConfigError, RolloutError
from gspo.environments.environment import Action, Environment, Step


class Verifiers(Environment):
    """A task as an episode of one turn: its prompt, and its rewards and metrics of the answer.

    Tasks with a container, with servers of tools or with an environment program of their own are
    refused: they bring the agent that plays, and here the model plays.

    Args:
        taskset: its id, as verifiers finds it.
        rows: how many tasks are read, at most.
        config: the fields of the taskset's config.
    """

    max_turns = 1
    max_tokens = 512

    def __init__(self, taskset: str, rows: int = 1000, config: dict[str, Any] | None = None):
        self._vf = optional("verifiers.v1", "verifiers", "", f"verifiers:{taskset}")
        load = optional("verifiers.v1.utils.loaders", "verifiers", "", f"verifiers:{taskset}")
        try:
            made = load.taskset_config_type(taskset)(id=taskset, **config or {})
            found = load.load_taskset(made)
            self._tasks = list(itertools.islice(found, rows))
        except Exception as error:
            raise ConfigError(f"verifiers:{taskset}: {type(error).__name__}: {error}") from error
        task = type(self._tasks[0])
        own = load.environment_class(taskset) is not load.SingleAgentEnv
        tools = found.toolsets(found.config) or task.toolsets(found.config.task)
        if own or tools or task.NEEDS_CONTAINER:
            what = "an environment program" if own else "tools" if tools else "a container"
            raise ConfigError(f"verifiers:{taskset} brings {what} of its own: gspo plays none")

    def instance(self, seed: int) -> str:
        return self._tasks[seed % len(self._tasks)].key

    def reset(self, seed: int) -> str:
        self._task = self._tasks[seed % len(self._tasks)]
        self.system_prompt = self._task.data.system_prompt
        return self._task.data.prompt_text

    async def step(self, action: Action) -> Step:
        vf, task = self._vf, self._task
        trace = import_module("verifiers.v1.trace")
        node = import_module("verifiers.v1.graph").MessageNode
        said = [
            node(message=vf.UserMessage(content=task.data.prompt_text)),
            node(message=vf.AssistantMessage(content=action.text), parent=0, sampled=True),
        ]
        told = trace.TraceTask(
            type=type(task).__name__, data=task.data, key=task.key, hash=task.hash
        )
        agent = trace.AgentInfo(config=vf.AgentConfig())
        record = vf.Trace(task=told, agent=agent, nodes=said)
        await task.score(record)
        if missing := [name for name, reward in record.rewards.items() if reward is None]:
            raise RolloutError(f"verifiers did not score {', '.join(missing)}")
        metrics = {name: value for name, value in record.metrics.items() if value is not None}
        return Step(reward=record.reward, done=True, metrics=metrics)
