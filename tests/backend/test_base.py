"""What each backend checks of its arguments, and the means that it logs."""

from __future__ import annotations

import math

import pytest

import gspo as art
from gspo.backend.base import (
    completion_lengths,
    group_means,
    train_options,
    user_metrics,
)
from gspo.core.errors import ConfigError, DataError
from support import choice, trajectory


def test_keyword_options_go_to_the_configuration_that_has_them():
    public, private = train_options(
        art.TrainConfig(kl_penalty_coef=0.1), None, {"learning_rate": 1e-4, "epsilon": 0.2}
    )
    assert (public.learning_rate, public.kl_penalty_coef) == (1e-4, 0.1)
    assert private.model_dump(exclude_unset=True) == {"epsilon": 0.2}


def test_options_that_mean_nothing_are_named():
    with pytest.raises(ConfigError, match=r"'loss_fn' is not supported: name the objective"):
        train_options(None, None, {"loss_fn": "cispo"})
    with pytest.raises(ConfigError, match=r"config is 3 \(int\); give a TrainConfig"):
        train_options(3, None, {})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("split", ["", ".", "..", "a/b", "a\\b", "a\0", "\ud800", 3, None])
def test_a_split_that_cannot_name_a_folder(split: object):
    with pytest.raises(ConfigError, match="give a plain name, such as 'val'"):
        user_metrics({}, split, {})  # pyright: ignore[reportArgumentType]


def test_metrics_of_a_user_replace_none_of_ours_and_a_result_handed_back_adds_nothing():
    line = {"loss/policy": 0.5, "train/reward": math.nan}
    given = {"loss/policy": 0.5, "reward": math.nan, "right": 1.0}
    assert user_metrics(given, "train", line) == {"train/right": 1.0}
    assert user_metrics({"loss/policy": 0.6}, "train", line) == {"train/user/loss/policy": 0.6}
    assert user_metrics(None, "train", line) == {}
    with pytest.raises(DataError, match="metrics is 5"):
        user_metrics(5, "train", line)


def test_means_are_over_trajectories_and_failures_are_counted():
    first, second, third = (trajectory(float(reward)) for reward in (0, 1, 5))
    first.metrics["right"], third.metrics["reward"] = 1.0, 7.0
    groups = [art.TrajectoryGroup([first, second]), art.TrajectoryGroup([third, OSError("no")])]
    assert group_means(groups, "val") == {
        "val/reward": 2.0,
        "val/right": 1.0,
        "val/user/reward": 7.0,
        "val/exceptions": 1.0,
    }
    assert group_means([], "val") == {}


def test_completion_lengths_and_what_was_cut():
    cut = trajectory(0.0, choice([4, 5, 6], finish_reason="length"))
    two = trajectory(0.0, choice([4]), choice([5, 6, 7, 8]))
    told = completion_lengths([art.TrajectoryGroup([cut, two])])
    assert told == {
        "tokens/completion_min": 3,
        "tokens/completion_max": 5,
        "tokens/truncated_share": 0.5,
    }
    assert completion_lengths([]) == {}
