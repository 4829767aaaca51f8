"""Constrained decoding: which tokens may come next, so that the text keeps to a grammar.

The grammars are llguidance's (the extra `structured`): a JSON schema, or a grammar in its Lark
syntax, which has `%json {...}` for a schema within a text, such as a tool call:

    start: "<tool_call>" %json {"type": "object"} "</tool_call>"

It works for any tokenizer, from the bytes of its tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from gspo.core.errors import MissingDependencyError, RequestError, shown
from gspo.serve.engine import FinishReason
from gspo.serve.tokens import vocabulary_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

_REMEMBERED = 64
"""Compiled grammars, of which each takes up to a few megabytes."""


class Grammars:
    """Compiles grammars for a tokenizer, and remembers them. From any thread.

    Args:
        tokenizer: the model's.
        size: V, the tokens that the model has a probability for.
        ends: its end tokens, which are allowed where the grammar may end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]):
        self._tokenizer, self._size, self._ends = tokenizer, size, sorted(ends)
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._vocabulary: Any = None

    def start(self, grammar: str) -> Matcher:
        """Return a matcher that is at the beginning of the grammar.

        Raises:
            RequestError: it means nothing, no token can begin it, or llguidance is not installed.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            with self._compiling:  # one at a time; who asks for a known one doesn't wait for it
                compiled = self._compiled.get(grammar) or self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
            return compiled.copy()

    def _compile(self, grammar: str) -> Matcher:
        try:
            from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
        except ImportError:
            missing = MissingDependencyError("llguidance", "structured", "a grammar")
            raise _refusal(str(missing)) from None
        if self._vocabulary is None:
            wrapped = TokenizerWrapper(_Vocabulary(self._tokenizer, self._size, self._ends))
            self._vocabulary = LLTokenizer(wrapped, n_vocab=self._size, eos_token=self._ends)
        schema = grammar.lstrip()[:1] in ("{", "[") or grammar.strip() in ("true", "false")
        try:
            read = LLMatcher.grammar_from_json_schema if schema else LLMatcher.grammar_from_lark
            text = read(grammar)
        except ValueError as error:  # no JSON
            raise _refusal(f"the schema {shown(grammar)} is no JSON: {error}") from None
        matcher = LLMatcher(self._vocabulary, text, log_level=0)
        kind = "schema" if schema else "grammar"
        if matcher.is_error():
            why = matcher.get_error().partition("\n<state>")[0][:200]
            raise _refusal(f"the {kind} {shown(grammar)} means nothing here: {why}")
        begun = Matcher(matcher, self._size)
        if begun.finish is not None:
            raise _refusal(f"the {kind} {shown(grammar)}: no token of this model can begin it")
        return begun


class Matcher:
    """How far a completion has come in its grammar.

    Attributes:
        allowed: [V] True at the tokens that may come next.
        finish: "stop" once the grammar has ended; "length" if no token can follow though it has
            not, because the tokenizer cannot spell it or the grammar grew too complex.
    """

    def __init__(self, matcher: LLMatcher, size: int):
        self._matcher, self._size = matcher, size
        self.finish: FinishReason | None = None
        self._look()

    def copy(self) -> Matcher:
        """Return another matcher at the same place."""
        new = object.__new__(Matcher)
        new.__dict__.update(self.__dict__, _matcher=self._matcher.deep_copy())
        return new

    @property
    def accepting(self) -> bool:
        """Whether the grammar may end here."""
        return self._matcher.is_accepting()

    def take(self, token: int) -> None:
        """Go on by a token that was drawn."""
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        words = np.zeros((self._size + 31) // 32, dtype=np.int32)
        if not self._matcher.is_stopped():  # it says too late that no token can follow
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        bits = np.unpackbits(words.view(np.uint8), count=self._size, bitorder="little")
        self.allowed: Bool[np.ndarray, " V"] = bits.astype(bool)
        if self._matcher.is_stopped():
            done = self.accepting and not self._matcher.is_error()
            self.finish = "stop" if done else "length"


class _Vocabulary:
    """A tokenizer, as llguidance wants to see one."""

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]):
        self._tokenizer, self.eos_token_id = tokenizer, ends[0]
        self.tokens = vocabulary_bytes(tokenizer, size)
        added = tokenizer.added_tokens_decoder.items()
        self.special_token_ids = [i for i, token in added if token.special and i < size]
        special = set(self.special_token_ids)
        pairs = reversed(list(enumerate(self.tokens)))  # the first of equal tokens wins
        self._ids = {token: i for i, token in pairs if token and i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that the grammar leaves no choice of."""
        written = text.decode(errors="replace")
        ids = self._tokenizer(written, add_special_tokens=False)["input_ids"]
        if b"".join(self.tokens[i] for i in ids) == text:
            return ids
        # The tokenizer puts a space before it, or cannot spell it: the longest tokens that fit.
        ids = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((size for size in sizes if text[:size] in self._ids), None)
            if size is None:
                break
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="response_format")
