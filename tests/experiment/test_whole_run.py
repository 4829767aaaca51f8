"""`art.train`: six lines from rows and a function to a trained model."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest

import gspo as art
import gspo.train
from gspo.core.errors import ConfigError, DataError
from gspo.experiment.loop import Outcome

ROWS = [{"prompt": f"{n:03d}", "answer": f"{n % 7}"} for n in range(10)]
SIZES: dict[str, Any] = {"prompts": 2, "completions": 4, "max_tokens": 4, "learning_rate": 1e-3}


def short(completions, **columns):
    return [-len(text) for text in completions]


def first(completion, row):
    return float(completion[:1] == row["answer"])


def trained(path: Path, **options: Any) -> Outcome:
    given = {"dataset": ROWS, "reward": [short, first], "reward_weights": [0.1, 1.0], **options}
    return art.train(model="embedded:sort", path=str(path), **SIZES | given)


def test_a_run_in_one_call_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcome = trained(tmp_path, steps=1)
    assert outcome.steps == 1 and outcome.prompts == 1
    assert outcome.before and outcome.after and outcome.run == tmp_path / "gspo" / "run"
    assert "9 rows to train on and 1 held out" in capsys.readouterr().out
    with pytest.raises(DataError, match="10 rows in memory has changed since the run"):
        trained(tmp_path, steps=2, dataset=[*ROWS[:-1], {"prompt": "x", "answer": ""}])

    async def notebook() -> Outcome:
        return trained(tmp_path, steps=2)

    assert asyncio.run(notebook()).steps == 2


def test_the_package_is_the_function_too():
    assert art.train is gspo.train and inspect.ismodule(gspo.train)
    assert gspo.train.__path__
    assert callable(art.train)


def test_options_that_are_wrong_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown option 'stepz'\. Did you mean 'steps'"):
        trained(tmp_path, stepz=2)
    with pytest.raises(
        ConfigError, match=r"'epoch'\. Did you mean 'epochs' in train or sft or data"
    ):
        trained(tmp_path, epoch=3)
    with pytest.raises(ConfigError, match="cannot import nothing_here"):
        trained(tmp_path, reward="nothing_here:f", reward_weights=None)
    with pytest.raises(DataError, match=r"dataset is 5 \(int\); give a path"):
        trained(tmp_path, dataset=5)
    with pytest.raises(TypeError, match="reward"):
        art.train(model="embedded:sort", dataset=ROWS)  # pyright: ignore[reportCallIssue]
    assert not list(tmp_path.iterdir())
