"""A conversation of three turns with a checker: a rollout function for multi_turn.toml.

    cd examples
    gspo train multi_turn.toml

The embedded model has been taught to sort one list and then to stop. Here the user brings three,
one after the other, and a checker says after each how many digits are in their place. What was
measured stands in docs/multi-turn.md.
"""

from __future__ import annotations

import gspo as art
from gspo.experiment.rollout import Scenario
from gspo.tasks import load_task

TASK = load_task("sort")
TURNS = 3


async def conversation(model: art.TrainableModel, scenario: Scenario) -> art.Trajectory:
    """Three lists to sort. The reward is the share of digits in their place."""
    trajectory = art.Trajectory()
    say = trajectory.messages_and_choices.append
    for turn in range(TURNS):
        problem = TASK.problem(scenario.split, scenario.index * TURNS + turn, scenario.seed)
        say({"role": "user", "content": problem.prompt})
        response = await model.openai_client().chat.completions.create(
            model=model.inference_name, messages=trajectory.messages(), max_tokens=16
        )
        choice = response.choices[0]
        say(choice)  # the Choice, not its text: it carries the sampled tokens

        pairs = zip(choice.message.content or "", problem.answer, strict=False)
        right = sum(given == wanted for given, wanted in pairs)
        say({"role": "tool", "content": f"{right} of {len(problem.answer)}"})
        share = right / len(problem.answer)
        trajectory.reward += share / TURNS
        trajectory.metrics[f"turn_{turn + 1}"] = share
    return trajectory
