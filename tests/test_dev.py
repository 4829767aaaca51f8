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


def test_options_are_frozen():
    config = dev.TrainConfig()
    with pytest.raises(Exception, match="frozen"):
        config.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf")])
def test_learning_rate_must_be_positive(rate: float):
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig(learning_rate=rate)


class TestResolve:
    def test_one_setting_is_the_papers_gspo(self):
        settings = resolve(options=dev.TrainConfig(importance_sampling_level="sequence"))
        assert settings.algorithm == "gspo"
        objective = settings.objective
        assert (objective.level, objective.epsilon_low, objective.epsilon_high) == (
            "sequence",
            3e-4,
            4e-4,
        )
        assert objective.kl_coef == 0
        assert settings.minibatches == settings.as_config()["minibatches"] == 4

    def test_no_setting_is_gspo_too(self):
        named = resolve(options=dev.TrainConfig(algorithm="gspo"))
        assert (resolve().algorithm, resolve().objective) == ("gspo", named.objective)

    @pytest.mark.parametrize(
        ("level", "algorithm", "epsilon"),
        [
            ("token", "grpo", 0.2),
            ("sequence_token", "gspo_token", 3e-4),
            ("average", "level:average", 0.2),
            ("geometric_average", "level:geometric_average", 0.2),
        ],
    )
    def test_a_level_implies_its_preset(self, level: str, algorithm: str, epsilon: float):
        settings = resolve(options=dev.TrainConfig(importance_sampling_level=level))  # pyright: ignore[reportArgumentType]
        assert settings.algorithm == algorithm
        assert settings.objective.epsilon_low == epsilon

    def test_epsilon_alone_sets_both_sides_as_in_art(self):
        objective = resolve(options=dev.TrainConfig(epsilon=0.01)).objective
        assert (objective.epsilon_low, objective.epsilon_high) == (0.01, 0.01)

    def test_epsilon_high_alone_keeps_the_lower_side(self):
        objective = resolve(options=dev.TrainConfig(epsilon_high=0.01)).objective
        assert (objective.epsilon_low, objective.epsilon_high) == (3e-4, 0.01)

    def test_contradiction_says_what_to_use(self):
        options = dev.TrainConfig(algorithm="grpo", importance_sampling_level="sequence")
        with pytest.raises(ConfigError, match="use algorithm='gspo'"):
            resolve(options=options)

    @pytest.mark.parametrize("algorithm", list(PRESETS))
    def test_methods_without_a_ratio_take_one_step_a_batch(self, algorithm: str):
        options = dev.TrainConfig(algorithm=algorithm)  # pyright: ignore[reportArgumentType]
        expected = 1 if algorithm in ("rloo", "reinforce") else 4
        assert resolve(options=options).minibatches == expected
        more = options.model_copy(update={"minibatches": 3})
        assert resolve(options=more).minibatches == 3

    def test_kl_coefficient_of_either_config(self):
        assert resolve(TrainConfig(kl_penalty_coef=0.1)).objective.kl_coef == 0.1
        both = resolve(TrainConfig(kl_penalty_coef=0.1), dev.TrainConfig(kl_penalty_coef=0.0))
        assert both.objective.kl_coef == 0.0


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
