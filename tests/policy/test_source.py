"""Names, folders, pickles and code of model folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from gspo import dev
from gspo.core.errors import ModelError
from gspo.policy import source
from gspo.policy.load import load_policy, save_weights
from models import folder, model


def pickled(path: Path) -> str:
    folder(path, "llama")
    (path / "model.safetensors").unlink()
    torch.save(model("llama").state_dict(), path / "pytorch_model.bin")
    return str(path)


def test_a_pickle_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        load_policy(pickled(tmp_path))


def test_a_checkpoint_of_pickles_is_not_loaded_either(tmp_path: Path):
    base = folder(tmp_path / "base", "llama")
    for lora in (None, dev.LoraConfig(r=2)):
        config = dev.InternalModelConfig(lora=lora)
        with pytest.raises(ModelError, match="a pickle"):
            load_policy(base, config, checkpoint=Path(pickled(tmp_path / "saved")))


def with_code(path: Path) -> str:
    """A folder whose config asks for Python code of its own."""
    folder(path, "llama")
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {
        "AutoConfig": "mine.MineConfig",
        "AutoModelForCausalLM": "mine.MineForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    return str(path)


def test_code_of_a_folder_runs_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked at the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    path = with_code(tmp_path / "mine")
    with pytest.raises(ModelError, match="unless you set trust_remote_code=True"):
        load_policy(path)
    policy = load_policy(path, dev.InternalModelConfig(trust_remote_code=True))
    assert type(policy.lm).__name__ == "MineForCausalLM"


def test_an_adapter_stands_for_its_model_with_it(tmp_path: Path):
    base = source.resolve("embedded:sort")  # a mixture of experts
    policy = load_policy(base, dev.InternalModelConfig(lora=dev.LoraConfig(r=2)))
    for name, weight in policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_weights(policy, tmp_path / "one")
    merged = load_policy(str(tmp_path / "one"))
    tokens = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected, plain = policy.lm(tokens).logits, load_policy(base).lm(tokens).logits
        assert torch.allclose(merged.lm(tokens).logits, expected, atol=1e-4)
        assert not torch.allclose(plain, expected, atol=1e-3)
    assert not any("lora" in name for name, _ in merged.lm.named_parameters())

    # An adapter on top of an adapter names the one below it.
    second = load_policy(str(tmp_path / "one"), dev.InternalModelConfig(lora=dev.LoraConfig(r=2)))
    save_weights(second, tmp_path / "two")
    chain = (base, [str(tmp_path / "one"), str(tmp_path / "two")])
    assert source.adapters_below(str(tmp_path / "two")) == chain


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{}", "doesn't say which model the adapter is of"),
        ('{"base_model_name_or_path": null}', "doesn't say which model the adapter is of"),
        ('{"base_model_name_or_path": "/gone"}', "adapter of '/gone', which is not a folder here"),
    ],
)
def test_an_adapter_whose_model_is_not_here(tmp_path: Path, stored: str, message: str):
    (tmp_path / "adapter_config.json").write_text(stored)
    with pytest.raises(ModelError, match=message):
        source.resolve(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "hub_answers", lambda: False)
    with pytest.raises(ModelError, match="network or its cache"):
        source.read_config("no-such-owner/no-such-model")
    offline = []

    def read(path: str, **options) -> PreTrainedConfig:
        offline.append(options["local_files_only"])
        return PreTrainedConfig()

    monkeypatch.setattr(source.AutoConfig, "from_pretrained", read)
    source.read_config("a/b")
    source.read_config("/tmp")
    monkeypatch.setattr(source, "hub_answers", lambda: True)
    source.read_config("a/b")
    assert offline == [True, False, False]


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load the tokenizer of"):
        load_policy(str(tmp_path))


def test_the_folder_of_a_run_is_told_from_a_model(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"format": 1}')
    (tmp_path / "checkpoints" / "0003").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"folder of a run: give one of its .*checkpoints/0003"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_content_of_the_same_size_is_another_model(name: str, tmp_path: Path):
    """A fine-tuned model has the sizes of the one that it was made of."""
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    before = source.fingerprint(str(tmp_path))
    assert source.fingerprint(str(tmp_path)) == before
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] = 1
    (tmp_path / name).write_bytes(content)
    assert source.fingerprint(str(tmp_path)) != before


def test_of_large_files_pieces_are_read_throughout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "_PIECE", 4)
    monkeypatch.setattr(source, "_PIECES", 10)
    path, seen = tmp_path / "model.safetensors", set()
    for tenth in range(10):
        path.write_bytes(bytes(100 * tenth) + b"\1" * (1000 - 100 * tenth))
        seen.add(source.fingerprint(str(tmp_path)))
    assert len(seen) == 10


def test_a_hub_model_is_told_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = PreTrainedConfig()
    config._commit_hash = "abc123"
    monkeypatch.setattr(source, "read_config", lambda *_, **__: config)
    assert source.fingerprint("org/model") == "commit abc123"
