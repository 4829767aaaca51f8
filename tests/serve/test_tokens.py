"""The bytes of tokens, and what ends a completion: stop texts, stop_token_ids, min_tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gspo.core.errors import RequestError
from gspo.policy.embedded import build_tokenizer
from gspo.serve.engine import Completion, Request, SamplingParams
from gspo.serve.tokens import ModelTokenizer, ends_of
from gspo.serve.torch_engine import TorchEngine
from support import embedded

USER = "<|user|>"  # special: hidden from the text, and no end token of the model


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    engine = TorchEngine(embedded())
    # Such a token is rare in what the model writes: make it one of the likely ones.
    number = engine.tokenizer.encode(USER)[0]
    with torch.no_grad():
        engine.policy.head.weight[number] *= 0
    return engine


def sampled(engine: TorchEngine, **params) -> list[Completion]:
    settings = {"n": 40, "max_tokens": 30, "seed": 3, "temperature": 5.0, "ignore_eos": True}
    request = Request(tuple(engine.tokenizer.encode("12")), SamplingParams(**settings | params))
    return engine.generate([request])[0]


def test_a_stop_text_that_is_a_special_token_is_an_end_token(engine: TorchEngine):
    number = engine.tokenizer.encode(USER)[0]
    before, after = sampled(engine), sampled(engine, stop=(USER,))
    assert sum(number in completion.token_ids for completion in before) > 5
    for free, ended in zip(before, after, strict=True):
        if number in free.token_ids:
            cut = free.token_ids.index(number) + 1
            assert ended.token_ids == free.token_ids[:cut]  # sampled, so it counts
            assert (ended.finish_reason, len(ended.logprobs)) == ("stop", cut)
            assert USER not in ended.text
        else:
            assert ended.token_ids == free.token_ids
            assert ended.text == free.text


def test_stop_token_ids_end_as_well(engine: TorchEngine):
    number = engine.tokenizer.encode("7")[0]
    for special in (True, False):
        for completion in sampled(engine, stop_token_ids=(number,), skip_special_tokens=special):
            assert number not in completion.token_ids[:-1]
            if completion.token_ids[-1] == number:
                assert completion.finish_reason == "stop"
                assert "7" not in completion.text


def test_special_tokens_stay_in_the_text_if_that_is_asked_for(engine: TorchEngine):
    number = engine.tokenizer.encode(USER)[0]
    shown = sampled(engine, skip_special_tokens=False)
    assert any(USER in completion.text for completion in shown)
    for completion in sampled(engine, skip_special_tokens=False, stop=(USER,)):
        assert number not in completion.token_ids[:-1]
        assert USER not in completion.text


def test_min_tokens_bars_ends_and_keeps_the_full_distributions_logprobs(engine: TorchEngine):
    end = engine.policy.tokenizer.eos_token_id
    free = sampled(engine, ignore_eos=False)
    assert min(len(completion.token_ids) for completion in free) < 12
    late = sampled(engine, ignore_eos=False, min_tokens=12, stop=("1",))
    assert all(len(completion.token_ids) >= 12 for completion in late)
    assert all(end not in completion.token_ids[:11] for completion in late)
    assert any("1" in completion.text for completion in late)  # before the twelfth token
    for completion in late[:5]:
        tokens = torch.tensor([[*engine.tokenizer.encode("12"), *completion.token_ids]])
        with torch.no_grad():
            logits = engine.policy.lm(input_ids=tokens).logits[0] / 5.0
        expected = logits.log_softmax(-1)[:-1].gather(-1, tokens[0, 1:, None]).squeeze(-1)[1:]
        got = torch.tensor(completion.logprobs)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_greedy_completions_heed_min_tokens(engine: TorchEngine):
    done = sampled(engine, n=1, temperature=0.0, ignore_eos=False, min_tokens=25, max_tokens=26)
    assert len(done[0].token_ids) >= 25


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop": (USER + "1",)}, r"'<\|user\|>1' has the special token '<\|user\|>' in it"),
        ({"stop_token_ids": (10_000,)}, "10000 is not among the model's 103 tokens"),
        ({"stop_token_ids": (-1,)}, "-1 is not among"),
    ],
)
def test_stops_that_can_never_be_seen_are_refused(engine: TorchEngine, params, message: str):
    with pytest.raises(RequestError, match=message):
        engine.check(Request((1,), SamplingParams(**params)))


def test_ordinary_texts_stay_texts(engine: TorchEngine):
    tokenizer = engine.policy.tokenizer
    params = SamplingParams(stop=("7", "12", "\u00e9"))  # the last one is unknown to the tokenizer
    assert ends_of(params, tokenizer, 103) == frozenset()


@pytest.mark.parametrize("temperature", [1e-40, 1e-4, -1.0, float("nan"), 101.0])
def test_temperatures_that_leave_float32_are_refused(temperature: float):
    with pytest.raises(RequestError, match=r"must be 0, or in \[0\.001, 100\]"):
        SamplingParams(temperature=temperature)


def test_the_smallest_temperature_has_finite_logprobs(engine: TorchEngine):
    for completion in sampled(engine, temperature=1e-3):
        assert torch.tensor(completion.logprobs).isfinite().all()


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
    each = ModelTokenizer(tokenizer, 9).token_bytes(ids)
    assert b"".join(each).decode() == tokenizer.decode(ids) == TEXT
    assert len(each) == len(ids)
    assert any(len(raw) == 1 and raw[0] >= 128 for raw in each)  # parts of characters
    assert ModelTokenizer(tokenizer, 9).token_bytes([]) == []


def test_a_part_of_a_character():
    tokenizer = byte_level()
    ids = tokenizer("§", add_special_tokens=False)["input_ids"]
    assert ModelTokenizer(tokenizer, 9).token_bytes(ids) == [bytes([194]), bytes([167])]
    assert ModelTokenizer(tokenizer, 9).token_bytes(ids[1:]) == [bytes([167])]


def test_special_tokens_are_written_out():
    tokenizer = byte_level()
    assert ModelTokenizer(tokenizer, 9).token_bytes(tokenizer("<|end|>")["input_ids"]) == [
        b"<|end|>"
    ]


def test_other_tokenizers_decode_each_token():
    tokenizer = build_tokenizer()
    ids = tokenizer("1 a<|end|>", add_special_tokens=False)["input_ids"]
    assert ModelTokenizer(tokenizer, 9).token_bytes(ids) == [b"1", b" ", b"a", b"<|end|>"]
