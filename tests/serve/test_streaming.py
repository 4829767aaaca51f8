"""Streams: their texts joined are the whole answer, and what breaks in their midst is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gspo.core.errors import ServeError
from gspo.serve.engine import Completion, Piece, Request, SamplingParams
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.streaming import EventStream, GrowingText, begun, pieces
from gspo.serve.tokens import ModelTokenizer


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Tokens are bytes, and a few words."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = {word: len(letters) + i for i, word in enumerate(("Ġthe", "ĠĠ", "ing", "<|end|>"))}
    inside = Tokenizer(models.BPE(vocab=letters | words, merges=[]))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    return tokenizer


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """Words that begin with a space, and the bytes that make characters of several."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128, 256))]
    names += ["▁", "▁a", "▁the", "b", "漢", ".", "é", "<unk>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    inside = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inside.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece}


class Decoder(FakeEngine):
    """An engine of which only the decoding is asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.tokenizer = ModelTokenizer(tokenizer, self.context)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [False, True])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_texts_joined_are_the_whole_text(name: str, special: bool, data: st.DataObject):
    """As the engine does it: the text is cut at the first stop text, however tokens lie to it."""
    tokenizer = TOKENIZERS[name]()
    token = st.integers(0, len(tokenizer) - 1)
    some = st.one_of(token, st.sampled_from(tokenizer("the 漢字 é")["input_ids"]))
    tokens = data.draw(st.lists(some, min_size=1, max_size=24))
    decode = Decoder(tokenizer).tokenizer.decode
    whole = decode(tokens, special=special)
    stops = ()
    if whole and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(whole) - 1))
        stops = (whole[start : start + data.draw(st.integers(1, 5))], "zz")
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count], special=special)
        if any(stop in text for stop in stops):
            tokens, whole = tokens[:count], text[: min(text.find(s) for s in stops if s in text)]
            break
    growing = GrowingText(
        Decoder(tokenizer), SamplingParams(stop=stops, skip_special_tokens=not special)
    )
    sent = []
    while len(tokens) > (step := data.draw(st.integers(1, 3))):
        sent.append(growing.add(tokens[:step]))
        assert whole.startswith("".join(sent))
        tokens = tokens[step:]
    done = Completion((1,), (0.0,), whole, "stop", (0,), 1.0)
    sent.append(growing.read(Piece(0, tuple(tokens), (), completion=done)))
    assert "".join(sent) == whole


def test_half_a_character_and_half_a_stop_text_are_held_back():
    tokenizer = byte_level()
    growing = GrowingText(Decoder(tokenizer), SamplingParams(stop=("</b>",)))
    assert [growing.add([token]) for token in tokenizer("€")["input_ids"]] == ["", "", "€"]
    sent = [growing.add([token]) for token in tokenizer("a</bx")["input_ids"]]
    assert sent == ["a", "", "", "", "</bx"]


async def test_several_requests_side_by_side():
    engine = FakeEngine(lambda prompt, index: f"{prompt}{index}")
    requests = [
        Request(tuple(engine.tokenizer.encode(t)), SamplingParams(n=2)) for t in ("ab", "c")
    ]
    texts: dict[tuple[int, int], str] = {}
    async for number, piece in pieces(engine, requests):
        key = (number, piece.index)
        texts[key] = texts.get(key, "") + engine.tokenizer.decode(piece.token_ids)
    assert texts == {(0, 0): "ab0", (0, 1): "ab1", (1, 0): "c0", (1, 1): "c1"}


class Breaking(FakeEngine):
    """Fails in the midst of the second request; the first never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        try:
            yield Piece(0, (97,), (-1.0,))
            if request.prompt == (2,):
                raise ServeError("it broke")
            await asyncio.get_running_loop().create_future()
        finally:
            self.left.append(request.prompt[0])


async def test_one_that_breaks_ends_its_neighbours():
    engine = Breaking()
    with pytest.raises(ServeError, match="it broke"):
        async for _ in pieces(engine, [Request((1,)), Request((2,))]):
            pass
    assert sorted(engine.left) == [1, 2]


async def test_who_stops_reading_lets_go():
    engine = Breaking()
    source = pieces(engine, [Request((1,)), Request((3,))])
    await anext(source)
    await source.aclose()
    assert sorted(engine.left) == [1, 3]


async def body_of(stream: EventStream) -> list[str]:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.get_running_loop().create_future()

    await stream({"type": "http", "method": "POST"}, receive, send)
    return b"".join(sent).decode().split("\n\n")


async def events(*names: str, error: Exception | None = None) -> AsyncGenerator[dict, None]:
    for name in names:
        yield {"type": name}
    if error is not None:
        raise error


async def test_events_on_the_wire():
    assert await body_of(EventStream(events("é"))) == ['data: {"type":"é"}', "data: [DONE]", ""]
    named = await body_of(EventStream(events("a"), named=True))
    assert named == ['event: a\ndata: {"type":"a"}', ""]


@pytest.mark.parametrize("named", [False, True])
async def test_an_error_in_the_midst_is_an_event(named: bool):
    error = ServeError("the engine is stuck")
    _, last, end = await body_of(EventStream(events("a", error=error), named=named))
    detail = json.loads(last.partition("data: ")[2])
    if named:
        assert last.startswith("event: error\n") and detail["type"] == "error"
    else:
        assert detail["error"]["type"] == "server_error"
        detail = detail["error"]
    assert detail["message"] == "the engine is stuck" and end == ""


async def test_an_error_before_the_first_event_is_an_error():
    with pytest.raises(ServeError, match="closed"):
        await begun(events(error=ServeError("closed")))
    assert [event async for event in await begun(events("a", "b"))] == [
        {"type": "a"},
        {"type": "b"},
    ]
