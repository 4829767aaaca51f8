"""What an engine must know of tokens: which of them end a completion, and their bytes.

A token may be a part of a character, which has no text. Two families of tokenizers have such
tokens. Byte-level tokenizers (GPT-2, Llama 3, Qwen) write each byte as a visible character; those
with byte fallback (Llama 2, Gemma) have tokens such as `<0xE4>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gspo.core.errors import RequestError
from gspo.kernels.hf import bytes_to_unicode, decode, decoder_kinds
from gspo.policy.policy import Policy
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import SamplingParams

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how sentencepiece writes a space


def end_tokens(policy: Policy) -> Bool[Tensor, " V"]:
    """Mark the end tokens that the model's generation config and its tokenizer name."""
    config = getattr(policy.lm, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [named])
    ids.add(policy.tokenizer.eos_token_id)
    ends = torch.zeros(policy.head.size, dtype=torch.bool, device=policy.device)
    ends[[i for i in ids if i is not None and i < len(ends)]] = True
    return ends


def ends_of(
    params: SamplingParams, tokenizer: PreTrainedTokenizerBase, size: int
) -> frozenset[int]:
    """Return the tokens that end a completion of this request: its `stop_token_ids`, and each stop
    text that is one token which the completion's text leaves out, such as `<|im_end|>`.

    Raises:
        RequestError: a token that the model doesn't have; or a stop text that can never be found,
            because a part of it is a token that the text leaves out.
    """
    for token in params.stop_token_ids:
        if not 0 <= token < size:
            raise RequestError(
                f"stop_token_ids: {token} is not among the model's {size} tokens",
                param="stop_token_ids",
            )
    ends = set(params.stop_token_ids)
    for text in params.stop if params.skip_special_tokens else ():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        hidden = [
            token
            for token in ids
            if token != tokenizer.unk_token_id
            and not tokenizer.decode([token], skip_special_tokens=True)
            and tokenizer.decode([token], skip_special_tokens=False)
        ]
        if hidden and len(ids) == 1:
            ends |= {token for token in hidden if token < size}
        elif hidden:
            name = tokenizer.decode([hidden[0]], skip_special_tokens=False)
            raise RequestError(
                f"stop = {text!r} has the special token {name!r} in it, which the text of a "
                f"completion leaves out: give only {name!r}, or skip_special_tokens=false",
                param="stop",
            )
    return frozenset(ends)


class ModelTokenizer:
    """A model's tokenizer, as its engine shows it (`gspo.serve.engine.TokenizerView`).

    Args:
        tokenizer: the model's.
        context: how many tokens the model takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int):
        self._tokenizer = tokenizer
        self.most_characters = context * max(map(len, tokenizer.get_vocab()))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens; with `special`, of special tokens too.

        What follows never changes a text that doesn't end in a part of a character. So texts are
        not cleaned up, and bytes that are no character spoil only themselves: byte fallback would
        give up all bytes that stand together.
        """
        ids = list(token_ids)
        text = decode(self._tokenizer, ids, special=special)
        if "\ufffd" in text and "ByteFallback" in decoder_kinds(self._tokenizer):
            hidden = set() if special else set(self._tokenizer.all_special_ids)
            parts = self.token_bytes([token for token in ids if token not in hidden])
            return b"".join(parts).decode(errors="replace")
        return text

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token, special tokens too. Joined, they are the decoded text."""
        parts, tokenizer = _bytes_of(token_ids, self._tokenizer), self._tokenizer
        begins = parts and parts[0][:1] == b" " and "ByteFallback" in decoder_kinds(tokenizer)
        if begins and not decode(tokenizer, list(token_ids), special=True).startswith(" "):
            parts[0] = parts[0][1:]  # sentencepiece puts a space before a text; decoding drops it
        return parts


def chat_format(policy: Policy, tokenizer: ModelTokenizer, ends: Sequence[int]) -> ChatFormat:
    """How the conversations of a policy's engine are written: its answers end in `ends`."""
    texts = [tokenizer.decode([token], special=True) for token in ends]
    return ChatFormat(policy.tokenizer, str(policy.source), texts)


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes]:
    """Return the bytes of the tokens 0 to size - 1; none of those that the tokenizer lacks."""
    known = _bytes_of(range(min(size, len(tokenizer))), tokenizer)
    return known + [b""] * (size - len(known))


def _bytes_of(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    kinds, added = decoder_kinds(tokenizer), tokenizer.added_tokens_decoder
    numbers = _byte_numbers()

    def of(token_id: int) -> bytes:
        if token_id in added:
            return str(added[token_id]).encode()
        token = str(tokenizer.convert_ids_to_tokens(token_id))
        if "ByteLevel" in kinds:
            known = set(token) <= numbers.keys()
            return bytes(numbers[c] for c in token) if known else token.encode()
        if "ByteFallback" in kinds:
            byte = _FALLBACK.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
        return str(tokenizer.decode([token_id])).encode()

    return [of(token_id) for token_id in token_ids]


@cache
def _byte_numbers() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    >>> _byte_numbers()["A"], _byte_numbers()["Ġ"]
    (65, 32)
    """
    return {character: byte for byte, character in bytes_to_unicode().items()}
