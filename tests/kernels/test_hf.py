import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from gspo.kernels.hf import cache_argument, decoder_kinds

SOURCE = Path(__file__).parents[2] / "src" / "gspo"
DOOR = SOURCE / "kernels" / "hf.py"
PRIVATE = {"_attn_implementation", "_can_record_outputs", "_tied_weights_keys", "_no_split_modules"}
PRIVATE |= {"_experts_implementation", "_apply_gate"}


def reached(path: Path) -> set[str]:
    """Submodules and private names of transformers that a module uses."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            out.add(node.module or "")
        elif isinstance(node, ast.Import):
            out |= {n.name for n in node.names if n.name.startswith("transformers.")}
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            out.add(node.attr)
        elif isinstance(node, ast.Constant) and node.value in PRIVATE:
            out.add(str(node.value))
    return out


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_one_file_reaches_transformers_internals(path: Path):
    assert path == DOOR or not reached(path)


def test_the_door_is_seen_to_be_one():
    assert {"transformers.cache_utils", "_attn_implementation"} <= reached(DOOR)


def test_a_cache_is_handed_over_without_a_deprecation():
    config = Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    lm = Qwen3ForCausalLM(config)
    kv = DynamicCache(config=config)
    lm.model(input_ids=torch.ones(1, 3, dtype=torch.long), **cache_argument(lm.model, kv))
    assert kv.get_seq_length() == 3


class OfDecoder(PreTrainedTokenizerFast):
    """A tokenizer of which there is nothing but its decoder."""

    def __init__(self, decoder: Any):
        self._tokenizer: Any = SimpleNamespace(decoder=decoder)


def test_the_kinds_of_a_decoder_are_read_without_the_vocabulary():
    steps = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert decoder_kinds(OfDecoder(steps)) == {"ByteFallback", "Fuse"}
    assert decoder_kinds(OfDecoder(decoders.ByteLevel())) == {"ByteLevel"}
    assert decoder_kinds(OfDecoder(None)) == frozenset()
