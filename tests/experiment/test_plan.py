"""What `--dry-run` tells, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gspo import dev
from gspo.core.errors import ConfigError, ModelError
from gspo.experiment.plan import make_plan
from gspo.experiment.spec import Spec
from models import folder as saved_model


def test_the_plan_of_the_embedded_model():
    plan = make_plan(Spec(task="add", prompts=8, completions=4))
    assert plan.splitlines()[0] == "gspo, ratios clipped to [0.9997, 1.0004]"
    assert "32 sequences per step, 8 per optimizer step; optimizer steps per step: 4" in plan
    assert "completions of up to 80 tokens; microbatches of up to 16384 tokens" in plan
    assert re.search(r"\n229,184 parameters, learning rate 0.00015 by the model's size\n", plan)
    total, *parts = map(int, re.findall(r"(\d+)(?: MiB|,|$)", plan.splitlines()[-1]))
    assert total * 2**20 > 16 * 229_184
    assert len(parts) == 6 and abs(total - sum(parts)) <= 3  # each is rounded


def test_options_that_change_the_plan():
    train = dev.TrainConfig(epsilon="auto", packed_sequence_length=512, epochs=2)
    plan = make_plan(Spec(task="sort", learning_rate=1e-3, train=train))
    assert "1.0004], to begin with\n" in plan
    assert "learning rate 0.001\n" in plan
    assert "optimizer steps per step: 8\n" in plan
    assert "of up to 512 tokens" in plan
    assert "no ratios are clipped" in make_plan(
        Spec(task="sort", train=dev.TrainConfig(algorithm="rloo"))
    )


def test_every_name_is_checked():
    with pytest.raises(ConfigError, match="Did you mean 'sort'"):
        make_plan(Spec(task="srot", model="embedded:sort"))
    with pytest.raises(ModelError, match="unknown model"):
        make_plan(Spec(task="sort", model="./nowhere"))
    with pytest.raises(ModelError, match="Did you mean"):
        make_plan(Spec(task="sort", model="embedded:sortt"))
    with pytest.raises(ConfigError, match="cannot import nothing_here"):
        make_plan(Spec(rollout="nothing_here:f", model="embedded:sort"))
    with pytest.raises(ConfigError, match="engines: 'localhost:8000'"):
        make_plan(Spec(task="sort", engines=["localhost:8000"]))
    teacher = dev.TrainConfig(kl_penalty_coef=1.0, kl_reference="./nobody")
    with pytest.raises(ModelError, match="kl_reference, the teacher: unknown model"):
        make_plan(Spec(task="sort", train=teacher))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cp_size": 2}, "cp_size=2, but 1 process trains: give nproc"),
        ({"nproc": 4, "ep_size": 3}, "ep_size=3 does not divide 4 ranks"),
        ({"nproc": 2, "engines": ["http://localhost:1"]}, "engines= is not built for more"),
        ({"nproc": 2, "load": {"exact": True}}, "exact=True and rollout_dtype are not built"),
        ({"nproc": 2, "ep_size": 2, "load": {"lora": {}}}, "ep_size and lora"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_they_start(fields, message: str):
    with pytest.raises(ConfigError, match=message):
        make_plan(Spec(task="sort", **fields))


def test_the_number_of_processes_is_told():
    assert "trained by 2 processes" in make_plan(Spec(task="sort", nproc=2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 600}, "max_tokens = 600: 'embedded:sort' has a context of 512 tokens"),
        ({"max_tokens": 512}, "give max_tokens = 511 or less"),
        ({"load": dev.InternalModelConfig(max_context=16)}, "max_tokens = 16: .* context of 16"),
    ],
)
def test_completions_that_leave_no_room_for_a_prompt_are_refused(
    fields: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_plan(Spec(task="sort", **fields))
    make_plan(Spec(task="sort", max_tokens=511))


def test_the_plan_has_the_models_own_context():
    plan = make_plan(Spec(task="lookup", max_tokens=600))  # embedded:lookup takes 2,048 tokens
    assert "completions of up to 600 tokens" in plan


def test_experts_that_a_model_lacks_are_not_divided(tmp_path: Path):
    dense = saved_model(tmp_path / "dense", "llama")
    with pytest.raises(ModelError, match=r"ep_size=2: .*dense.* has 0 experts that transformers"):
        make_plan(Spec(task="sort", model=str(dense), nproc=2, ep_size=2))
    with pytest.raises(
        ModelError, match=r"ep_size=3: 'embedded:sort' has \d+ experts that .* a divisor"
    ):
        make_plan(Spec(task="sort", nproc=3, ep_size=3))


def test_adapters_beside_divided_experts_are_named():
    load = {"lora": {"target_modules": ["q_proj", "v_proj"]}}
    assert "trained by 2" in make_plan(Spec(task="sort", nproc=2, ep_size=2, load=load))
