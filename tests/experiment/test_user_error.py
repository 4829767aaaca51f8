"""Whose mistake it is, by where it was raised."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import gspo as art
from gspo.core.errors import DataError, RolloutError
from gspo.experiment.user_error import FRAMES, LINES, users_errors
from gspo.tasks import Task


def told(function: Callable[[], object], step: int = 2) -> list[str]:
    with pytest.raises(RolloutError) as caught, users_errors("train", 7, step):
        function()
    return str(caught.value).splitlines()


def test_a_mistake_of_gspos_own_keeps_its_traceback():
    """The user's code called it, but the line that failed is ours."""

    with pytest.raises(AttributeError), users_errors("train", 7, 2):
        Task.problem(None, "train", 0)  # pyright: ignore[reportArgumentType]


def test_what_gspo_refuses_is_told_at_the_users_line():
    lines = told(lambda: art.Trajectory(rewrd=1.0))  # pyright: ignore[reportCallIssue]
    assert "prompt 7 (train), after step 2, raised DataError" in lines[0]
    assert "art.Trajectory(rewrd=1.0)" in lines[-2]
    assert "goes on" in lines[-1]


def test_an_error_without_a_line_of_the_users_says_which_prompt_it_is_about():
    error = DataError("a rollout returned int")
    text = "with users_errors('train', 0, 0):\n    raise error"
    code = compile(text, str(Path(art.__file__).parent / "x.py"), "exec")
    with pytest.raises(DataError) as caught:
        exec(code, {"error": error, "users_errors": users_errors})
    assert str(caught.value) == (
        "the rollout of prompt 0 (train), after step 0: a rollout returned int"
    )
    assert caught.value.__cause__ is error


def test_the_text_and_the_frames_are_bounded():
    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("\n".join(map(str, range(50)))) from KeyError("first")
        deep(n - 1)

    lines = told(lambda: deep(20))
    assert len(lines) == LINES + FRAMES + 3 < 15
    assert "caused by KeyError: 'first'" in lines


@pytest.mark.parametrize("status", [0, 3])
def test_a_call_of_exit_is_an_error_too(status: int):
    lines = told(lambda: sys.exit(status))
    assert lines[0].endswith(f"raised SystemExit: {status}")
    assert "sys.exit(status)" in lines[-2]


def test_before_the_first_step_nothing_is_said_to_be_saved():
    assert told(lambda: int("x"), step=0)[-1].startswith("Nothing was trained yet")


def test_a_folder_whose_name_begins_as_ours_is_the_users():
    """`gspo_tasks` beside `gspo`, and `python3.12-mine` beside `python3.12`."""
    for folder in (Path(art.__file__).parent, Path(sysconfig.get_path("stdlib"))):
        code = compile(
            "def fails():\n    raise ValueError('mine')\n", f"{folder}_mine/a.py", "exec"
        )
        names: dict[str, Callable[[], object]] = {}
        exec(code, names)
        assert "raised ValueError: mine" in told(names["fails"])[0]
        assert any(f"{folder}_mine/a.py, line 2" in line for line in told(names["fails"]))
