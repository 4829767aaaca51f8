"""The shapes of OpenAI's answers."""

from __future__ import annotations

from gspo.serve.answers import chat_logprobs, text_logprobs, training_fields
from gspo.serve.engine import Completion
from gspo.serve.fake_engine import FakeEngine

DONE = Completion(
    token_ids=(97, 0x6F22),
    logprobs=(-1.0, -2.0),
    text="a漢",
    finish_reason="stop",
    policy_versions=(1, 2),
    temperature=0.5,
    top_logprobs=(((97, -1.0), (98, -1.5)), ((0x6F22, -2.0),)),
    altered_by=("top_p",),
)


def test_logprobs_of_a_chat():
    first, second = chat_logprobs(FakeEngine(), DONE)["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -1.0, [97])
    assert [entry["token"] for entry in first["top_logprobs"]] == ["a", "b"]
    assert bytes(second["bytes"]).decode() == "漢"


def test_logprobs_of_a_text():
    lists = text_logprobs(FakeEngine(), DONE, offset=7)
    assert (lists["tokens"], lists["text_offset"]) == (["a", "漢"], [7, 8])
    assert lists["top_logprobs"] == [{"a": -1.0, "b": -1.5}, {"漢": -2.0}]


def test_what_training_needs():
    assert training_fields(DONE) == {
        "temperature": 0.5,
        "policy_version": 1,
        "policy_versions": [1, 2],
        "altered_by": ["top_p"],
    }
