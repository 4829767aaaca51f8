"""Write the conversations of a warm start: episodes played without a model.

    python examples/environments/lessons.py examples/environments/blackjack.toml

writes blackjack.jsonl beside the file, which its [sft] names. Episodes are of the train split, and
of another seed than the run's. The player knows how an action is written and not which is good: it
chooses at random among those that are possible. Only for reasoning-gym, where nothing can be chosen
from, does it give the answer; there the warm start is short.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from gspo.environments import Action, load_environment
from gspo.environments.play import episode_seed
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec

SEED = 1_000_003


def choose(spec: Spec, environment: Any, rng: random.Random) -> str:
    """An action that the environment understands."""
    if hasattr(environment, "possible"):
        return rng.choice(environment.possible)
    if "actions" in spec.environment_options:
        return rng.choice(spec.environment_options["actions"])
    return environment._problem.answer  # reasoning-gym


async def conversation(spec: Spec, make: Any, index: int) -> list[dict[str, str]]:
    """One episode as messages."""
    seed, _ = await episode_seed(make, "train", index, SEED)
    # The same from any folder: docs/environments.md measured runs from the clone's.
    named = f"examples/environments/{Path(str(spec.environment)).name}/{index}"
    environment, rng = make(), random.Random(named)
    messages = [{"role": "user", "content": environment.reset(seed)}]
    if environment.system_prompt:
        messages.insert(0, {"role": "system", "content": environment.system_prompt})
    for _ in range(spec.max_turns or environment.max_turns):
        text = choose(spec, environment, rng)
        messages.append({"role": "assistant", "content": text})
        step = environment.step(Action(text))
        if step.done:
            break
        messages.append({"role": "user", "content": step.text})
    environment.close()
    return messages if messages[-1]["role"] == "assistant" else messages[:-1]


async def main(path: Path) -> None:
    spec = read_spec(path)
    make = load_environment(str(spec.environment), spec.environment_options)
    count = int(re.findall(r"lessons = (\d+)", path.read_text())[0])
    rows = [{"messages": await conversation(spec, make, index)} for index in range(count)]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.with_suffix('.jsonl')}: {count} conversations; the first is {rows[0]}")


asyncio.run(main(Path(sys.argv[1])))
