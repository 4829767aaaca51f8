from __future__ import annotations

import pytest

from gspo.core.errors import ConfigError
from gspo.tasks import Problem, load_task, task_names
from gspo.tasks.built_in import Add, Climb, Lookup


@pytest.mark.parametrize("name", task_names())
def test_the_reference_answer_scores_one_and_others_zero(name: str):
    task = load_task(name)
    for index in range(20):
        problem = task.problem("train", index)
        assert task.score(problem, problem.answer) == 1.0
        assert task.score(problem, problem.answer + "0") == 0.0
        assert task.score(problem, "") == 0.0
        assert len(problem.answer) + task.ends <= task.max_tokens


def test_add_looks_at_the_result_alone():
    task = Add()
    problem = task.draw(1)
    result = problem.answer.rpartition(";")[2]
    assert task.score(problem, f"nonsense;{result}") == 1.0
    assert len(problem.answer) >= 60


def test_a_chain_counts_until_the_first_mistake():
    task = load_task("chain", {"length": 10})
    problem = task.problem("train", 0)
    assert (len(problem.answer), task.max_tokens) == (10, 10)
    for right in range(10):
        wrong = "x" + problem.answer[right + 1 :]
        assert task.score(problem, problem.answer[:right] + wrong) == right / 10
    assert task.score(problem, problem.answer[:4]) == 0.4


def test_a_long_chain_continues_a_short_one():
    short, long = (load_task("chain", {"length": n}).problem("heldout", 3) for n in (16, 200))
    assert short.prompt == long.prompt
    assert long.answer.startswith(short.answer)


def test_climbs_of_different_length_are_right():
    task = Climb()
    problem = Problem("1391", "")
    for way in ("1401", "1391", "1396,1396,1400", "1396,1400,1400", "1399,1408", "1396,140", ""):
        assert task.score(problem, way) == 0.0, way
    for way in ("1396,1400", "1392,1393,1394,1400", "1395,1399,1400"):
        assert task.score(problem, way) == 1.0, way
    lengths = {len(task.problem("train", i).answer) for i in range(50)}
    assert min(lengths) < 40 < 80 < max(lengths) < task.max_tokens


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("srot", {}, "Did you mean 'sort'"),
        ("sort", {"digits": 3}, "unknown argument 'digits'. Known arguments: none"),
        ("chain", {"lenght": 3}, "Did you mean 'length'"),
        ("chain", {"length": 401}, "from 1 to 400"),
        ("chain", {"length": True}, "from 1 to 400"),
        ("climb", {"length": 3}, "unknown argument 'length'. Known arguments: none"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_task(name, options)


def test_the_letter_is_known_to_the_tool_only():
    task = Lookup()
    problems = [task.draw(key) for key in range(40)]
    for problem in problems:
        largest = max(map(int, problem.prompt))
        assert task.look_up(problem, largest) == problem.answer
        assert (
            task.look_up(problem, str(largest))
            == task.look_up(problem, 10)
            == "key must be a digit"
        )
    assert len({problem.answer for problem in problems}) > 5
    others = [task.look_up(p, (max(map(int, p.prompt)) + 1) % 10) == p.answer for p in problems]
    assert sum(others) < 15  # by chance, one of ten
