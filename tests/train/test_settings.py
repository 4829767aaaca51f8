"""One call of `train`, resolved: what applies, and which contradictions are refused."""

from __future__ import annotations

import pytest

from gspo import TrainConfig, dev
from gspo.core.errors import ConfigError
from gspo.objective import PRESETS
from gspo.train.settings import resolve


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


def test_each_option_stands_once_with_the_value_that_applies():
    options = dev.TrainConfig(importance_sampling_level="sequence", epsilon=0.01, seed=3)
    settings = resolve(TrainConfig(learning_rate=0.1, kl_penalty_coef=0.2), options)
    config = settings.as_config()
    assert set(config) == {*dev.TrainConfig.model_fields, "learning_rate"}
    assert (config["algorithm"], config["epsilon"], config["epsilon_high"]) == ("gspo", 0.01, 0.01)
    assert (config["kl_penalty_coef"], config["learning_rate"], config["seed"]) == (0.2, 0.1, 3)
    assert (settings.epsilon, settings.objective.epsilon_low) == (0.01, 0.01)
    with pytest.raises(Exception, match="frozen"):
        settings.seed = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_a_method_without_a_range_has_no_epsilon():
    settings = resolve(options=dev.TrainConfig(algorithm="reinforce"))
    assert (settings.epsilon, settings.epsilon_high, settings.scale_rewards) == (None, None, None)


def test_a_steered_range_is_the_objectives():
    settings = resolve(options=dev.TrainConfig(epsilon="auto"))
    steered = settings.with_objective(settings.objective.with_epsilon(0.01, 0.02))
    assert steered.epsilon == settings.as_config()["epsilon"] == "auto"
    assert (steered.objective.epsilon_low, steered.objective.epsilon_high) == (0.01, 0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "reinforce", "epsilon": 0.1}, "has no clip range: leave epsilon out"),
        ({"epsilon_high": 2.0}, "give at most 1"),
        ({"algorithm": "grpo", "epsilon": "auto"}, "steers a sequence-level clip range"),
        ({"algorithm": "cispo", "epsilon": 0.1}, "use epsilon_high"),
        ({"epsilon": "auto", "epsilon_high": 0.1}, "leave epsilon_high out"),
        ({"algorithm": "grpo", "epsilon_scale": "sqrt_length"}, "needs a sequence-level ratio"),
        ({"correction_low": 0.1}, "need a correction"),
        ({"kl_reference": "teacher"}, "kl_reference is of a KL term: give a kl_penalty_coef too"),
        ({"correction": "token_mask"}, "set old_logprobs='trainer'"),
        ({"algorithm": "rloo", "scale_rewards": True}, "leave scale_rewards out"),
        ({"precalculate_logprobs": True, "old_logprobs": "rollout"}, "give one of the two"),
    ],
)
def test_contradictions_name_the_remedy(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(options=dev.TrainConfig(**options))


def test_turn_weights_are_the_presets_and_refused_where_there_is_one_advantage():
    weights = {
        name: resolve(options=dev.TrainConfig(algorithm=name)).turn_weight for name in PRESETS
    }
    assert {name for name, weight in weights.items() if weight} == {"gspo_token", "sampo"}
    own = resolve(options=dev.TrainConfig(algorithm="grpo", turn_weight=0.5, turn_discount=1.0))
    assert (own.turn_weight, own.preset.turn_weight, own.turn_discount) == (0.5, 0.5, 1.0)
    for name in ("gspo", "luspo", "gmpo"):
        with pytest.raises(ConfigError, match=r"has one advantage for all turns.*gspo_token"):
            resolve(options=dev.TrainConfig(algorithm=name, turn_weight=1.0))
    by_turn = dev.TrainConfig(algorithm="gspo", turn_weight=1.0, sequence_unit="turn")
    assert resolve(options=by_turn).turn_weight == 1.0
    with pytest.raises(ConfigError, match="leave turn_discount out"):
        resolve(options=dev.TrainConfig(algorithm="grpo", turn_discount=0.5))
