"""What of a conversation is trained on: the assistant's turns, as the engine would sample them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import gspo as art
from chat_templates import tokenizer
from gspo.backend.sft_samples import sft_samples
from gspo.core.errors import DataError, SampleTooLongError
from gspo.policy.embedded import build_tokenizer
from gspo.serve.chat import ChatFormat
from gspo.serve.tokens import ModelTokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a key up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "integer"}}},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"key": 1}'},
}
TALK: art.Messages = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]
WITH_CALL: art.Messages = [
    {"role": "user", "content": "find it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "seven"},
    {"role": "assistant", "content": "it is seven"},
]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>"
    "{% generation %}{{ m.content if loop.last else '-' }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def engine_of(spelling: Any) -> Any:
    """What reading asks of an engine."""
    return SimpleNamespace(
        chat=ChatFormat(spelling, "this model"), tokenizer=ModelTokenizer(spelling, 999)
    )


def read(spelling: Any, *rows: Any, last: bool = False, context: int = 999):
    trajectories = [
        art.Trajectory(messages_and_choices=row, tools=[TOOL] if row is WITH_CALL else None)
        for row in rows
    ]
    return sft_samples(trajectories, engine_of(spelling), context, last=last)


def spelled(spelling: Any, sample: Any) -> tuple[str, list[str]]:
    """The whole text, and the text of each answer."""
    turns = sorted(set(sample.turn_ids[sample.ratio_mask].tolist()))
    ids = sample.tokens
    answers = [spelling.decode(ids[sample.turn_ids == turn]) for turn in turns]
    return spelling.decode(ids), answers


def test_the_embedded_template():
    spelling = build_tokenizer()
    (sample,) = read(spelling, TALK)
    text, answers = spelled(spelling, sample)
    assert text == "<|user|>a<|assistant|>bc<|end|><|user|>d<|assistant|>e<|end|>"
    assert answers == ["bc<|end|>", "e<|end|>"]
    (last,) = read(spelling, TALK, last=True)
    assert spelled(spelling, last) == (text, ["e<|end|>"])
    with_context = [*TALK, {"role": "user", "content": "not asked"}]
    assert spelled(spelling, read(spelling, with_context)[0]) == (text, answers)


def test_a_template_with_tools():
    spelling = tokenizer("qwen")
    (sample,) = read(spelling, WITH_CALL)
    text, answers = spelled(spelling, sample)
    call = '<tool_call>\n{"name": "look_up", "arguments": {"key": 1}}\n</tool_call><|im_end|>'
    assert answers == [call, "it is seven<|im_end|>"]
    assert '"name": "look_up", "description"' in text.split("<|im_start|>user")[0]
    whole = ChatFormat(spelling).render(WITH_CALL, tools=[TOOL], ask=False)
    assert text == whole.removesuffix("\n")  # which the model never samples


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_answers():
    spelling = tokenizer("qwen")
    thought = [dict(TALK[0]), {"role": "assistant", "content": "<think>x</think>bc"}, *TALK[2:]]
    with pytest.raises(DataError, match=r"trajectory 1, message 1: the chat template of this mode"):
        read(spelling, TALK, thought)
    marked = build_tokenizer()
    marked.chat_template = MARKED.replace("<|im_start|>", "<|user|>").replace("im_end", "end")
    (sample,) = read(marked, TALK)
    assert spelled(marked, sample)[1] == ["-<|end|>", "e<|end|>"]


def test_each_history_is_a_sample():
    history = art.History(messages_and_choices=[*TALK[:2]])
    both = art.Trajectory(messages_and_choices=[*TALK], additional_histories=[history])
    found = sft_samples([both], engine_of(build_tokenizer()), 99, last=False)
    assert [sample.sampled for sample in found] == [5, 3]
    assert [sample.trajectory_id for sample in found] == [0, 1]


@pytest.mark.parametrize(
    "row, told",
    [
        ([], "trajectory 1 has no assistant turn"),
        (TALK[:1], "trajectory 1 has no assistant turn: there is nothing to train on"),
        ([{"content": "x"}], "trajectory 1, message 0 is .* it needs a role"),
        ([{"role": "assistant", "content": 5}], "message 0: content is 5 .int.; give a text"),
        ([{"role": "assistant"}], "message 0: content is None .*; give a text"),
        (TALK * 9, "trajectory 1 has 99 tokens, but the model's context is 20"),
    ],
)
def test_bad_rows(row: Any, told: str):
    with pytest.raises((DataError, SampleTooLongError), match=told):
        read(build_tokenizer(), TALK, row, context=20)


def test_bad_calls():
    engine = engine_of(build_tokenizer())
    with pytest.raises(DataError, match="got no trajectories"):
        sft_samples([], engine, 9, last=False)
    with pytest.raises(DataError, match=r"trajectory 0 is .*; give art.Trajectory"):
        sft_samples([{"messages": TALK}], engine, 9, last=False)
    tools = [{"type": "function", "function": {}}]
    broken = art.Trajectory(messages_and_choices=[*TALK], tools=tools, metadata={"row": "x, row 3"})
    with pytest.raises(DataError, match=r"^x, row 3: "):
        sft_samples([broken], engine, 9, last=False)
