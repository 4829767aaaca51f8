"""The model that the package builds: an ordinary folder, and a tokenizer of characters."""

from __future__ import annotations

import json

import pytest
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gspo.policy import embedded as module
from gspo.policy.embedded import build_tokenizer, embedded_folder
from gspo.policy.load import load_policy
from gspo.tasks import load_task
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


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_builds_the_whole_folder(rank, tmp_path, monkeypatch):
    """Ranks of one machine build it at the same time in a new cache, and other machines have caches
    of their own. A folder of a tokenizer alone would stay, and fail each later start."""
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path))
    monkeypatch.setitem(module.RECIPES, "sort", module.RECIPES["sort"] | {"steps": 2})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        folder = embedded_folder("embedded:sort")
    finally:
        dist.destroy_process_group()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert load_policy("embedded:sort").source == str(folder)


def test_embedded_tokenizer_has_one_token_a_character():
    tokenizer = embedded().tokenizer
    text = "<|user|>0123456789ab<|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 14
    assert tokenizer.decode(ids) == text


def test_the_template_shows_tools_and_writes_calls():
    task, tokenizer = load_task("lookup"), build_tokenizer()
    (asked, call), (answered, letter) = task.lessons(task.draw(1))

    def text(messages: list, **options: object) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))  # pyright: ignore[reportArgumentType]

    assert text(asked, tools=task.tools) == "<|system|>look_up(key)<|user|>2914"
    assert call == '<tool_call>{"name": "look_up", "arguments": {"key": 9}}</tool_call>'
    assert text(answered).endswith(f"<|assistant|>{call}<|end|><|tool|>{letter}")
    ids = tokenizer(text(answered, tools=task.tools), add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert text([{"role": "user", "content": "1"}], tools=[{"function": {"name": "f"}}]) == (
        "<|system|>f()<|user|>1"
    )
