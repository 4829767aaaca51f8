"""`gspo plan`: its text, its JSON, its refusals."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gspo.cli import app
from gspo.core.errors import ConfigError
from gspo.sizing.cluster import Rollouts
from gspo.sizing.report import make_report


def plan(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", *arguments])
    return done.exit_code, done.output


def test_text_and_json_agree():
    code, text = plan("Qwen/Qwen3-30B-A3B", "--gpus", "16", "--json")
    assert code == 0
    told = json.loads(text.splitlines()[-1])
    assert "30.53 B parameters, 3.04 B active" in text
    assert told["chosen"] == "all weights, checkpointing"
    best = told["layouts"][0]
    assert f"Fastest: {best['training_gpus']} GPUs train" in text
    assert f"{best['seconds']:,.1f}" in text
    assert told["assumed"]["mfu"] == 0.06
    assert "training reaches 6%" in text
    assert "   activations   " in text and "   most tokens" in text  # headers are not broken


def test_mfu_that_is_given_is_used():
    wanted = Rollouts(512, 512, 2048, 8192)
    _, slow = make_report("Qwen/Qwen3-8B", "h100", 8, wanted, 16, 0.1)
    _, fast = make_report("Qwen/Qwen3-8B", "h100", 8, wanted, 16, 0.4)
    ratio = slow["layouts"][-1]["parts"]["training"] / fast["layouts"][-1]["parts"]["training"]
    assert (slow["assumed"]["mfu"], fast["assumed"]["mfu"]) == (0.1, 0.4)
    assert ratio > 1


def test_what_does_not_fit_says_what_would():
    code, text = plan("Qwen/Qwen3-235B-A22B", "--gpus", "1")
    assert code == 0
    assert "Nothing fits on 1: LoRA 16 on a bfloat16 base, checkpointing fits on 16." in text
    code, text = plan("Qwen/Qwen3-8B", "--gpu", "l40s", "--longest", "4000000")
    assert "Nothing fits on any number of these GPUs: one sample of 4,000,512 tokens" in text


def test_wrong_words_are_named():
    with pytest.raises(ConfigError, match=r"unknown gpu 'h10'\. Did you mean 'h100'"):
        make_report("Qwen/Qwen3-8B", "h10", 8, Rollouts(1, 1, 1, 1), 16, None)
    assert "8 x h100" in make_report("embedded:sort", "H100", 8, Rollouts(1, 1, 1, 1), 16, None)[0]


def test_a_sample_longer_than_the_context_is_said():
    text, told = make_report("Qwen/Qwen3-8B", "h100", 8, Rollouts(8, 1, 8, 40_960), 16, None)
    assert told["model"]["context"] == 40_960
    assert "40,961 tokens, is longer than the model's context of 40,960" in text
    text, _ = make_report("Qwen/Qwen3-8B", "h100", 8, Rollouts(8, 0, 8, 40_960), 16, None)
    assert "longer than the model's context" not in text
