"""The model that the package builds: an ordinary folder, and a tokenizer of characters."""

from __future__ import annotations

import json

from gspo.policy.embedded import embedded_folder
from gspo.policy.load import load_policy
from support import embedded


def test_embedded_model_is_an_ordinary_folder():
    folder = embedded_folder("embedded:sort")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    policy = load_policy(str(folder))
    assert 150_000 < sum(p.numel() for p in policy.lm.parameters()) < 300_000


def test_embedded_tokenizer_has_one_token_a_character():
    tokenizer = embedded().tokenizer
    text = "<|user|>0123456789ab<|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 14
    assert tokenizer.decode(ids) == text
