"""Text under a grammar keeps to it and ends with it, whatever the tokenizer."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from gspo.core.errors import RequestError
from gspo.policy.embedded import build_tokenizer
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.grammar import Grammars, Matcher
from gspo.serve.torch_engine import TorchEngine
from serve.test_tokens import byte_fallback, byte_level
from support import embedded

POINT = json.dumps(
    {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "on": {"type": "boolean"}},
        "required": ["x", "on"],
        "additionalProperties": False,
    }
)
CALL = 'start: "<call>" %json {"enum": ["up", "down"]} "</call>"'


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(embedded())


def sampled(engine: TorchEngine, grammar: str, **params) -> list[Completion]:
    settings = {"n": 4, "max_tokens": 40, "seed": 1, "temperature": 2.0}
    request = Request(
        tuple(engine.tokenizer.encode("12")), SamplingParams(grammar=grammar, **settings | params)
    )
    return engine.generate([request])[0]


@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"min_tokens": 35}, {"top_p": 0.9}])
def test_a_completion_keeps_to_its_schema_and_ends_with_it(engine: TorchEngine, params: dict):
    done = sampled(engine, POINT, **params)
    ended = [completion for completion in done if completion.finish_reason == "stop"]
    assert ended and all("grammar" in completion.altered_by for completion in done)
    for completion in ended:
        value = json.loads(completion.text)
        assert set(value) == {"x", "on"} and type(value["x"]) is int and type(value["on"]) is bool
        assert completion.text.endswith("}")  # nothing behind it, no end token either
        assert engine.policy.tokenizer.eos_token_id not in completion.token_ids
    for completion in done:
        assert completion in ended or len(completion.token_ids) == 40


def test_where_a_grammar_may_end_an_end_token_ends_it(engine: TorchEngine):
    done = sampled(engine, '{"type": "integer"}', n=20, temperature=5.0)
    assert all(str(int(c.text)) in ("0", "-0", c.text, c.text[1:]) for c in done)
    end = engine.policy.tokenizer.eos_token_id
    assert any(c.token_ids[-1] == end and c.finish_reason == "stop" for c in done)
    seven = engine.tokenizer.encode("7")[0]
    stopped = sampled(engine, '{"type": "integer"}', n=20, stop_token_ids=(seven,))
    assert any(c.token_ids[-1] == seven and "7" not in c.text for c in stopped)


def test_a_text_around_a_schema(engine: TorchEngine):
    texts = {completion.text for completion in sampled(engine, CALL, n=12)}
    assert texts == {'<call>"up"</call>', '<call>"down"</call>'}


def test_log_probs_are_those_of_the_whole_distribution(engine: TorchEngine):
    """A token that the grammar forces has not log-prob 0."""
    (done,) = sampled(engine, CALL, n=1)
    assert done.logprobs[0] < -0.5


def test_its_neighbours_are_as_without_it(engine: TorchEngine):
    plain = Request(
        tuple(engine.tokenizer.encode("12")), SamplingParams(n=3, max_tokens=20, seed=4)
    )
    (alone,) = engine.generate([plain])
    bound = Request(plain.prompt, SamplingParams(n=2, max_tokens=20, seed=1, grammar=POINT))
    beside = engine.generate([bound, plain])[1]
    assert [c.token_ids for c in beside] == [c.token_ids for c in alone]
    assert all(completion.altered_by == () for completion in beside)


TEXT = '{"a": "é漢🙂", "b": [1.5, null]}'


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_any_tokenizer_by_the_bytes_of_its_tokens(kind):
    """A model's vocabulary may have more entries than its tokenizer."""
    tokenizer: PreTrainedTokenizerFast = kind()
    end: Any = tokenizer.eos_token_id
    grammars = Grammars(tokenizer, len(tokenizer) + 5, [end])
    matcher = grammars.start('{"type": "object"}')
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if kind is byte_fallback:  # it begins each text by a space
        ids: Any = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in TEXT.encode()]
    for token in ids:
        assert matcher.finish is None and matcher.allowed[token]
        assert not matcher.allowed[end] and not matcher.allowed[len(tokenizer) :].any()
        matcher.take(token)
    assert matcher.finish == "stop" and matcher.accepting


def test_a_character_that_no_token_can_spell_cuts_it_short(engine: TorchEngine):
    done = sampled(engine, 'start: "aé"', n=2)
    assert [(c.text, c.finish_reason) for c in done] == [("a", "length")] * 2


def grammars() -> Grammars:
    tokenizer = build_tokenizer()
    end: Any = tokenizer.eos_token_id
    return Grammars(tokenizer, len(tokenizer), [end])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('{"type": "foo"}', "means nothing here: Invalid type: foo"),
        ('{"a"', "expected `:`"),
        ("[1]", "schema must be an object or boolean"),
        ("false", "schema is false"),
        ('{"not": {"type": "string"}}', "Unimplemented keys"),
        ('{"properties": {"a": {"$ref": "#/no"}}}', "'/no' does not exist"),
        ('strt: "a"', "no start rule"),
        ('start: "é"', "no token of this model can begin it"),
        ("x" * 10_000, "Expected token"),
    ],
)
def test_what_means_nothing_is_refused(engine: TorchEngine, grammar: str, message: str):
    with pytest.raises(RequestError, match=message) as caught:
        engine.check(Request((6,), SamplingParams(grammar=grammar)))
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 400


def test_each_start_is_a_matcher_of_its_own_and_compiled_once(monkeypatch: pytest.MonkeyPatch):
    some, calls = grammars(), []
    compiled = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda s, g: calls.append(g) or compiled(s, g))
    first, second = some.start(POINT), some.start(POINT)
    allowed = second.allowed.copy()
    first.take(int(np.flatnonzero(first.allowed)[0]))
    assert np.array_equal(second.allowed, allowed) and isinstance(second, Matcher)
    assert calls == [POINT]
    for number in range(70):
        some.start(f'{{"const": {number}}}')
    some.start(POINT)
    assert calls.count(POINT) == 2 and len(some._compiled) == 64


def test_a_known_grammar_waits_for_none_that_is_compiled():
    some = grammars()
    some.start(POINT)
    with some._compiling, ThreadPoolExecutor(1) as other:  # as while another one is compiled
        assert isinstance(other.submit(some.start, POINT).result(10), Matcher)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install -e '\.\[structured\]'"):
        grammars().start(POINT)
