"""Joined, the bytes of tokens are the text, also where a token is a part of a character."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gspo.policy.embedded import build_tokenizer
from gspo.serve.token_bytes import token_bytes

TEXT = "a § é 漢字 🙂\n\tb"


def byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    raw = Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_joined_they_are_the_text(kind):
    tokenizer = kind()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    each = token_bytes(tokenizer, ids)
    assert b"".join(each).decode() == tokenizer.decode(ids) == TEXT
    assert len(each) == len(ids)
    assert any(len(raw) == 1 and raw[0] >= 128 for raw in each)  # parts of characters
    assert token_bytes(tokenizer, []) == []


def test_a_part_of_a_character_alone():
    tokenizer = byte_level()
    ids = tokenizer("§", add_special_tokens=False)["input_ids"]
    assert token_bytes(tokenizer, ids) == [bytes([194]), bytes([167])]
    assert token_bytes(tokenizer, ids[1:]) == [bytes([167])]


def test_special_tokens_are_written_out():
    tokenizer = byte_level()
    assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids(["<|end|>"])) == [b"<|end|>"]


def test_other_tokenizers_decode_each_token():
    tokenizer = build_tokenizer()
    ids = tokenizer("1 a<|end|>", add_special_tokens=False)["input_ids"]
    assert token_bytes(tokenizer, ids) == [b"1", b" ", b"a", b"<|end|>"]
