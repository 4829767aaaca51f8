"""gpt-oss' channels. What all forms have in common is in `test_tool_calls.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gspo as art
from chat_templates import tokenizer
from gspo.serve.harmony import HarmonyParser
from gspo.serve.tool_calls import Parsed, joined
from models import model

CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'
THOUGHT = "<|channel|>analysis<|message|>hm <|end|><|start|>assistant"


def read(text: str) -> Parsed:
    parser = HarmonyParser({"f": {}})
    return joined(parser.feed(text, last=True))


def test_reasoning_stands_apart():
    assert read(f"{THOUGHT}<|channel|>final<|message|>so<|return|>") == Parsed("so", (), "hm ")
    assert read(THOUGHT + CALL).reasoning == "hm "
    assert read("<|channel|>analysis<|message|>cut") == Parsed("", (), "cut")


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"x": 1} 2', '{"x": NaN}'])
def test_a_malformed_call_in_a_channel_is_text(arguments: str):
    text = f"<|channel|>commentary to=functions.f<|message|>{arguments}<|call|>"
    assert read(text) == Parsed(arguments)
    assert read(CALL.replace("functions.f", "functions.g")) == Parsed('{"x": 1}')


def test_reasoning_and_content_are_passed_on_at_once():
    parser = HarmonyParser({})
    pieces = ["<|channel|>final<|mess", "age|>a", "b<|ret", "urn|>"]
    assert [[d.content for d in parser.feed(piece)] for piece in pieces] == [[], ["a"], ["b"], []]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["harmony", "mistral"])
async def test_calls_whose_marks_are_special_tokens_are_sampled_read_and_trained_on(
    form: str, tmp_path: Path
):
    """By a model of random weights, which the grammar of the calls holds to their form."""
    spelled: Any = tokenizer(form)
    vocabulary = spelled.get_vocab()
    lm = model("llama", vocab_size=len(spelled), max_position_embeddings=2048)
    named = {"harmony": ("<|return|>", "<|call|>"), "mistral": ("</s>",)}
    ends = [vocabulary[end] for end in named[form]]
    assert lm.generation_config is not None
    lm.generation_config.eos_token_id = ends
    lm.save_pretrained(tmp_path / "model")
    spelled.save_pretrained(tmp_path / "model")
    key = {"type": "object", "properties": {"key": {"enum": [1, 2]}}, "required": ["key"]}
    function = {"name": "look_up", "parameters": {**key, "additionalProperties": False}}
    asked: dict[str, Any] = {
        "tools": [{"type": "function", "function": function}],
        "seed": 1,
        "max_tokens": 300,
        "logit_bias": {str(vocabulary["<"]): -100},  # else it may think, without an end
    }
    async with art.LocalBackend(tmp_path / "runs") as backend:
        trained = art.TrainableModel(name="m", project="p", base_model=str(tmp_path / "model"))
        await trained.register(backend)
        client, name = trained.openai_client(), trained.inference_name

        async def rollout(reward: float) -> art.Trajectory:
            messages: list[Any] = [{"role": "user", "content": "which key?"}]
            with art.trajectory(trained) as t:
                for _ in range(2):
                    response = await client.chat.completions.create(
                        model=name, messages=messages, tool_choice="required", **asked
                    )
                    said: Any = response.choices[0].message
                    assert response.choices[0].finish_reason == "tool_calls"
                    assert said.tool_calls[0].function.arguments in ('{"key": 1}', '{"key": 2}')
                    assert not set(spelled.all_special_tokens) & {said.content}
                    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "a"}
                    messages += [said.model_dump(exclude_none=True), result]
                t.reward = reward
            return t

        rollouts = [rollout(1.0), rollout(0.0)]
        groups = await art.gather_trajectory_groups([art.TrajectoryGroup(rollouts)])
        for t in groups[0]:
            one, two = t.choices()
            tokens: Any = [*one.prompt_token_ids, *one.token_ids]  # pyright: ignore[reportAttributeAccessIssue]
            assert two.prompt_token_ids[: len(tokens)] == tokens  # pyright: ignore[reportAttributeAccessIssue]
            assert set(tokens[len(one.prompt_token_ids) :]) & set(spelled.all_special_ids)  # pyright: ignore[reportAttributeAccessIssue]
        result = await trained.train(groups, _config=art.dev.TrainConfig(minibatches=1))
        assert result.skipped is None and result.metrics["tokens/completion"] > 0
