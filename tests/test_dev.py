"""Options: typed, strict, with the nearest right name in the error."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from gspo import TrainConfig, dev
from gspo.core.errors import ConfigError
from gspo.objective import BOUNDS, PRESETS, CorrectionKind
from gspo.train.settings import resolve


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_sampling_levl": "sequence"}, "Did you mean 'importance_sampling_level'"),
        ({"importance_sampling_level": "sequnce"}, "Did you mean 'sequence'"),
        ({"algorithm": "gpso"}, "Did you mean 'gspo'"),
        ({"epsilon": 0}, "epsilon = 0"),
        ({"epsilon": 1.5}, "epsilon = 1.5"),
        ({"epsilon": "aut"}, "Did you mean 'auto'"),
        ({"epsilon": float("nan")}, "epsilon = nan"),
        ({"minibatches": 0}, "minibatches = 0"),
        ({"lr_schedule": "cosine"}, "needs lr_total_steps"),
        ({"lr_total_steps": 9}, "lr_total_steps means nothing with lr_schedule='constant'"),
        ({"lr_final": 0.1}, "lr_final means nothing"),
        ({"lr_warmup_steps": 9, "lr_total_steps": 9}, "must be larger"),
        ({"mask_prob_ratio": True}, "'mask_prob_ratio' is not supported"),
        ({"kimi_k2_tau": 0.1}, "'kimi_k2_tau' is not supported"),
        ({"ppo": False}, "use algorithm='cispo'"),
        ({"normalize_by_length": False}, "use algorithm='dr_grpo'"),
        ({"overlong_cache": 5}, "belong together"),
    ],
)
def test_wrong_options_name_themselves_and_the_remedy(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        dev.TrainConfig(**options)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        (
            dev.TrainConfig,
            {"adam_betas": (5.0, -3.0)},
            r"from 0 to below 1, such as \(0.9, 0.999\)",
        ),
        (dev.TrainConfig, {"adam_betas": (0.9, 1.0)}, "from 0 to below 1"),
        (dev.TrainConfig, {"adam_betas": (NAN, 0.9)}, "finite"),
        (dev.TrainConfig, {"weight_decay": INF}, "finite"),
        (dev.TrainConfig, {"weight_decay": -1}, "greater than or equal to 0"),
        (dev.TrainConfig, {"weight_decay": 1e9}, "less than or equal to 100"),
        (dev.TrainConfig, {"adam_epsilon": INF}, "finite"),
        (dev.TrainConfig, {"adam_epsilon": 0}, "greater than 0"),
        (dev.TrainConfig, {"correction_high": NAN}, "finite"),
        (dev.TrainConfig, {"epochs": 10**30}, "less than or equal to 1000000000"),
        (dev.TrainConfig, {"epochs": True}, "must be a number"),
        (dev.InternalModelConfig, {"threads": 10**9}, "less than or equal to 4096"),
        (dev.LoraConfig, {"r": 10**9}, "less than or equal to 4096"),
        (dev.LoraConfig, {"alpha": INF}, "finite"),
        (dev.LoraConfig, {"alpha": 1e30}, "less than or equal to 65536"),
        (dev.LoraConfig, {"target_modules": []}, "at least 1 item"),
        (TrainConfig, {"learning_rate": 1e308}, "less than or equal to 1"),
        (TrainConfig, {"learning_rate": NAN}, "finite"),
        (TrainConfig, {"kl_penalty_coef": INF}, "finite"),
    ],
)
def test_values_that_mean_nothing_are_named(options: Any, value: dict, message: str):
    with pytest.raises(ConfigError, match=rf"{next(iter(value))} = .*{message}"):
        options(**value)


def test_every_option_of_art_is_honoured_or_refused_by_name():
    # ART 0.5, src/art/dev/train.py
    art = [
        "advantage_balance",
        "allow_training_without_logprobs",
        "epsilon",
        "normalize_by_length",
        "epsilon_high",
        "importance_sampling_level",
        "kimi_k2_tau",
        "kl_penalty_coef",
        "kl_ref_adapter_path",
        "logprob_calculation_chunk_size",
        "mask_prob_ratio",
        "max_negative_advantage_importance_sampling_weight",
        "moe_routing_replay_bundle",
        "moe_routing_replay_path",
        "moe_routing_replay_strict",
        "num_trajectories_learning_rate_multiplier_power",
        "packed_sequence_length",
        "plot_tensors",
        "ppo",
        "precalculate_logprobs",
        "scale_learning_rate_by_reward_std_dev",
        "scale_rewards",
        "truncated_importance_sampling",
    ]
    for name in art:
        honoured, refused = name in dev.TrainConfig.model_fields, name in dev.TrainConfig.refused
        assert honoured != refused, name


def test_the_options_name_what_the_objective_has():
    """dev.py lies below objective/ and repeats its names; they must not drift apart."""
    assert get_args(dev.CorrectionKind) == get_args(CorrectionKind) == tuple(BOUNDS)


@pytest.mark.parametrize(
    "options",
    [
        TrainConfig(),
        TrainConfig(learning_rate=0.1),
        dev.TrainConfig(),
        dev.TrainConfig(algorithm="dapo", max_grad_norm=None, adam_betas=(0.8, 0.9)),
        dev.TrainConfig(lr_schedule="cosine", lr_total_steps=9, lr_final=0.1),
        dev.TrainConfig(precalculate_logprobs=True, overlong_max_tokens=9, overlong_cache=3),
        dev.TrainConfig(algorithm=PRESETS["vespo"]),
        dev.InternalModelConfig(),
        dev.InternalModelConfig(lora=dev.LoraConfig(r=4, target_modules=["q_proj"]), threads=2),
    ],
    ids=repr,
)
def test_options_that_were_dumped_whole_can_be_read_back(options: Any):
    kind = type(options)
    again = (kind(**options.model_dump()), kind(**json.loads(options.model_dump_json())))
    assert again == (options, options)
    if kind is dev.TrainConfig:
        assert resolve(options=again[0]) == resolve(options=options)
