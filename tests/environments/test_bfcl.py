from __future__ import annotations

import sys

import pytest

pytest.importorskip("bfcl_eval")

from gspo.core.errors import ConfigError
from gspo.environments import Action, Call, load_environment


def test_a_right_call_earns_one_and_any_other_nothing():
    asked = load_environment("bfcl:simple_python")()
    assert "factorial of 5" in asked.reset(1)
    assert asked.tools is not None
    function = asked.tools[0]["function"]
    assert function["name"] == "math_factorial"  # math.factorial in the data
    assert function["parameters"]["type"] == "object"
    right = Call("math_factorial", {"number": 5})
    for calls, reward in [
        ([right], 1),
        ([right, right], 0),
        ([Call("math_factorial", {"number": 6})], 0),
        ([Call("math_factorial", {"number": "5"})], 0),
        ([Call("factorial", {"number": 5})], 0),
        ([], 0),
    ]:
        step = asked.step(Action("", calls))
        assert (step.reward, step.done) == (reward, True), calls
    assert asked.instance(1) == asked.instance(401) == "simple_python_1"


def test_where_no_function_helps_none_is_called():
    asked = load_environment("bfcl:irrelevance")()
    asked.reset(0)
    assert asked.step(Action("I cannot.")).reward == 1
    assert asked.step(Action("", [Call("f", {})])).reward == 0


@pytest.mark.parametrize("kind", ["parallel", "multiple", "live_simple", "live_parallel_multiple"])
def test_every_kind_is_read_and_most_first_answers_are_right(kind: str):
    asked = load_environment(f"bfcl:{kind}")()
    rewards = []
    for seed in range(16):
        asked.reset(seed)
        calls = []
        for call in asked._answers[asked._row["id"]]:
            ((name, values),) = call.items()
            given = {key: value[0] for key, value in values.items() if value[0] != ""}
            calls.append(Call(name.replace(".", "_"), given))
        rewards.append(asked.step(Action("", calls)).reward)
    assert sum(rewards) >= 12


def test_the_stand_in_does_not_stay():
    test_a_right_call_earns_one_and_any_other_nothing()
    module = sys.modules.get("bfcl_eval.constants.model_config")
    assert module is None or hasattr(module, "__file__")


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="Did you mean 'simple_python'"):
        load_environment("bfcl:simple_pyton")
