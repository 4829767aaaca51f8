"""What a model card says of a run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from experiment.small_runs import stored_run
from gspo.experiment.model_card import model_card
from gspo.experiment.saved_run import read_run
from gspo.experiment.spec import Spec


def card(folder: Path, **options) -> str:
    run = read_run(folder)
    assert run is not None
    return model_card(run, 3, **{"adapter": False, "dtype": "bfloat16"} | options)


def test_the_card_says_what_when_and_how(tmp_path: Path):
    text = card(stored_run(tmp_path, lineage=[{"run": "p/first", "step": 5}]))
    for told in ("`embedded:sort`", "all weights", "`gspo`: -(1/N)", "epsilon 0.0003 / 0.0004"):
        assert told in text
    assert "| 0 | 0.200" in text and "| 3 | 0.400" in text and "| 2 |" not in text
    assert "over 8 prompts" in text and "from `p/first`, step 5" in text and "bfloat16" in text
    header: Any = ModelCard(text).data
    assert header.library_name == "transformers" and header.license is None
    assert header.base_model is None and header.tags == ["gspo", "reinforcement-learning"]
    assert "write `license:`" in text


def test_the_command_is_a_file_that_gives_the_same_run(tmp_path: Path):
    folder = stored_run(tmp_path)
    toml = card(folder).split("```toml\n")[1].split("```")[0]
    stored = Spec(**json.loads((folder / "spec.json").read_text()))
    assert Spec(**tomllib.loads(toml), path=stored.path) == stored


def test_a_hub_model_is_linked_and_folders_of_the_machine_are_not_told(tmp_path: Path):
    lora = {"r": 4, "alpha": 8.0, "target_modules": "all-linear"}
    folder = stored_run(tmp_path, base_model="Qwen/Qwen3-0.6B", lora=lora)
    spec = json.loads((folder / "spec.json").read_text())
    spec |= {"task": None, "rollout": "/home/me/secret/mine.py:rollout", "model": "Qwen/Qwen3-0.6B"}
    (folder / "spec.json").write_text(json.dumps(spec))
    text = card(folder, adapter=True)
    header: Any = ModelCard(text).data
    assert header.base_model == "Qwen/Qwen3-0.6B"
    assert "mine.py:rollout" in text and "secret" not in text and str(tmp_path) not in text
    assert "LoRA adapters (r = 4" in text and "AutoPeftModelForCausalLM" in text
    merged = card(folder)
    assert "merged into the weights" in merged and "AutoModelForCausalLM" in merged


def test_a_program_of_the_users_own_has_no_file(tmp_path: Path):
    folder = stored_run(tmp_path)
    (folder / "spec.json").unlink()
    (folder / "metrics.jsonl").unlink()
    text = card(folder)
    assert "A program of its own" in text and "It was not measured." in text


def test_rows_and_rewards_of_ones_own_are_named_and_a_warm_start_is_measured(tmp_path: Path):
    folder = stored_run(tmp_path)
    spec = json.loads((folder / "spec.json").read_text())
    named = {
        "dataset": "/home/me/secret/rows.jsonl",
        "reward": ["/home/me/secret/s.py:exact", "s:x"],
    }
    spec |= {
        "task": None,
        "sft": {"data": "a/lessons.jsonl"},
        "reward_weights": [1.0, 0.2],
        **named,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    text = card(folder)
    assert "| data | `rows.jsonl`, 4 prompts x 8 a step; before it SFT on `lessons.jsonl` |" in text
    assert "| reward | 1 x `s.py:exact` + 0.2 x `s:x` |" in text
    assert 'reward = ["s.py:exact", "s:x"]' in text and "secret" not in text
    assert "| 0 | 0.200" in text and "| 1, after the SFT | 0.500" in text and "| 3 | 0.400" in text
    spec |= {
        "dataset": None,
        "reward": [],
        "reward_weights": None,
        "environment": "textworld:house",
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    assert "| data | `textworld:house`, 4 prompts" in card(folder)
