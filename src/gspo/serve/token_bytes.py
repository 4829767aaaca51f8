"""The bytes of single tokens: a token may be a part of a character, which has no text.

Two families of tokenizers have such tokens. Byte-level tokenizers (GPT-2, Llama 3, Qwen) write each byte
as a visible character; those with byte fallback (Llama 2, Gemma) have tokens such as `<0xE4>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase

from gspo.kernels.hf import bytes_to_unicode, decoder_kinds

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how sentencepiece writes a space


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token, special tokens too. Joined, they are the decoded text.

    Args:
        tokenizer: what decodes them.
        token_ids: tokens that follow each other.
    """
    kinds = decoder_kinds(tokenizer)
    parts = [_bytes_of(token, tokenizer, kinds) for token in token_ids]
    text = str(tokenizer.decode(list(token_ids), skip_special_tokens=False))
    if "ByteFallback" in kinds and parts and parts[0][:1] == b" " and not text.startswith(" "):
        parts[0] = parts[0][1:]  # sentencepiece puts a space before a text, which decoding drops
    return parts


def _bytes_of(token_id: int, tokenizer: PreTrainedTokenizerBase, kinds: frozenset[str]) -> bytes:
    added = tokenizer.added_tokens_decoder
    if token_id in added:
        return str(added[token_id]).encode()
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if "ByteLevel" in kinds:
        numbers = _byte_numbers()
        return bytes(numbers[c] for c in token) if set(token) <= numbers.keys() else token.encode()
    if "ByteFallback" in kinds:
        byte = _FALLBACK.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
    return str(tokenizer.decode([token_id])).encode()


@cache
def _byte_numbers() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    >>> _byte_numbers()["A"], _byte_numbers()["Ġ"]
    (65, 32)
    """
    return {character: byte for byte, character in bytes_to_unicode().items()}
