"""What was sampled is what is trained on, whatever a chat template makes of the conversation."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache, partial
from typing import Any, cast

import pytest

from chat_templates import TEMPLATES, tokenizer
from gspo.data.sample import SPLIT_REASONS, trajectory_samples
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import Engine
from gspo.serve.fake_engine import FakeEngine
from gspo.serve.harmony import HARMONY
from gspo.serve.tokens import ModelTokenizer
from gspo.serve.tool_calls import Parsed, completion_key
from gspo.serve.verbatim import TokenMemory, chat_tokens
from gspo.trajectories import Trajectory
from support import choice

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "string"}, "n": {"type": "integer"}},
            },
        },
    }
    for name in ("look_up", "add")
]
WORDS = ("the", "answer", "is", "42", "é", "\n", " ", "  ", "{", '"', "日本", "🙂", "<", "tool")
FORMS = [name for name in TEMPLATES if name != "chatml"]
ENDS = {"harmony": ("<|return|>", "<|call|>"), "llama": ("<|eot_id|>", "<|eom_id|>")}


class Model:
    """A sampler by a script: it says a text in tokens of its own choice, as a model may."""

    def __init__(self, name: str):
        own = tokenizer(name)
        self.name, self.tokenizer = name, ModelTokenizer(own, 9)
        self.chat = ChatFormat(own, name, ENDS.get(name))
        vocabulary = own.get_vocab()
        added = {str(token): i for i, token in own.added_tokens_decoder.items()}
        self.added = added
        self.plain = {text: i for text, i in vocabulary.items() if text not in added}
        self.longest = max(map(len, self.plain))

    def spell(self, text: str, rng: random.Random) -> list[int]:
        """Tokens of a text, any of those that it can be spelled with."""
        tokens: list[int] = []
        while text:
            special = next((t for t in self.added if text.startswith(t)), None)
            if special:
                tokens.append(self.added[special])
                text = text[len(special) :]
                continue
            ends = [i for t in self.added if (i := text.find(t)) > 0]
            piece, text = (text[: min(ends)], text[min(ends) :]) if ends else (text, "")
            letters, at = "".join(byte_letters()[b] for b in piece.encode()), 0
            while at < len(letters):
                sizes = [
                    n for n in range(1, self.longest + 1) if letters[at : at + n] in self.plain
                ]
                size = rng.choice([n for n in sizes if at + n <= len(letters)])
                tokens.append(self.plain[letters[at : at + size]])
                at += size
        return tokens


@cache
def byte_letters() -> dict[int, str]:
    from gspo.kernels.hf import bytes_to_unicode

    return bytes_to_unicode()


@cache
def model(name: str) -> Model:
    return Model(name)


def prompt_of(one: Model, messages: list[dict], **options: Any) -> list[int]:
    """Of an engine, only its chat and its tokenizer are asked."""
    return chat_tokens(cast(Engine, one), messages, **options)


def words(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(6)))


def call_text(name: str, rng: random.Random, tame: bool = False) -> str:
    """A call in the model's form, spaced as no template would, and sometimes malformed."""
    odd = not tame and rng.random() < 0.1
    tool = "unknown" if odd else rng.choice(["look_up", "add"])
    arguments = {"key": words(rng), "n": rng.randrange(99)}
    if rng.random() < 0.3:
        arguments = dict(reversed(arguments.items()))
    between = rng.choice([(",", ":"), (", ", ": "), (" ,", " :\n")])
    written = json.dumps(arguments, ensure_ascii=rng.random() < 0.5, separators=between)
    if not tame and rng.random() < 0.1:
        written = written[:-1]
    space = rng.choice(["", "\n", " "])
    if name == "coder":
        lines = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
        return f"<tool_call>{space}<function={tool}>\n{lines}</function>{space}</tool_call>"
    if name == "harmony":
        channel = rng.choice(["commentary", "commentary json"])
        header = f"<|channel|>{channel} to=functions.{tool} <|constrain|>json"
        return f"{header}<|message|>{written}<|call|>"
    key = "parameters" if name == "llama" else "arguments"
    body = f'{{"name":{space}"{tool}", "{key}":{written}}}'
    if name == "mistral":
        return f"[TOOL_CALLS]{space}[{body}]"
    if name == "llama":
        return rng.choice(["", "<|python_tag|>"]) + body
    return f"<tool_call>{space}{body}{space}</tool_call>"


def answer(name: str, rng: random.Random, tame: bool = False) -> tuple[str, str]:
    """What the model says next, and the token that ends it."""
    end = TEMPLATES[name][2]
    calls = rng.random() < 0.6
    if name == "harmony":
        thought = f"<|channel|>analysis<|message|>{words(rng)}<|end|><|start|>assistant"
        thought = rng.choice(["", thought])
        if calls or tame:
            return thought + call_text(name, rng, tame).removesuffix("<|call|>"), "<|call|>"
        return f"{thought}<|channel|>final<|message|>{words(rng)}", end
    thought = f"<think>\n{words(rng)}\n</think>\n\n" if rng.random() < 0.2 and not tame else ""
    if not calls:
        return thought + words(rng), end
    if name == "llama":
        return call_text(name, rng, tame), rng.choice(ENDS[name])
    count = 1 if name == "mistral" else rng.choice([1, 1, 2])
    said = thought + words(rng)
    return said + "\n".join(call_text(name, rng, tame) for _ in range(count)), end


def as_message(parsed: Parsed) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.tool_calls:
        message["tool_calls"] = [call.wire() for call in parsed.tool_calls]
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning
    return message


def conversation(
    one: Model, rng: random.Random, edits: bool = False, *, tame: bool = False
) -> tuple[Trajectory, list[int], list[str]]:
    """An episode of up to five answers: its trajectory, what was sampled, and ids handed out."""
    memory, sampled, ids = TokenMemory(), [], []
    trajectory = Trajectory()
    history: list[dict[str, Any]] = [{"role": "user", "content": words(rng) + "?"}]
    for _ in range(rng.randint(1, 5)):
        prompt = prompt_of(one, history, tools=TOOLS, memory=memory)
        text, end = answer(one.name, rng, tame)
        tokens = one.spell(text + end, rng)
        if not tame and rng.random() < 0.05:  # cut by max_tokens
            tokens = tokens[: rng.randint(1, len(tokens))]
        written = one.tokenizer.decode(tokens, special=True)
        parsed = one.chat.parse(written, tools=TOOLS, key=completion_key(prompt, 0))
        called = [call.id for call in parsed.tool_calls]
        memory.remember(prompt, tokens, partial(str, written), called)
        trajectory.messages_and_choices.append(choice(tokens, prompt))
        sampled += tokens
        ids += called
        message = as_message(parsed)
        if edits and rng.random() < 0.3:
            message = edited(message, rng)
        history.append(message)
        if message.get("tool_calls"):
            history += [
                {"role": "tool", "tool_call_id": call["id"], "content": words(rng)}
                for call in message["tool_calls"]
            ]
        else:
            history.append({"role": "user", "content": words(rng) + "?"})
        if edits and rng.random() < 0.05:
            asked = [i for i, message in enumerate(history) if message["role"] == "user"]
            history = history[rng.choice(asked) :]  # the beginning is left out
    return trajectory, sampled, ids


def edited(message: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return message | {"content": (message["content"] or "").strip()}
    if kind == 1:
        return message | {"content": words(rng) + "."}
    if kind == 2:
        return {k: v for k, v in message.items() if k != "reasoning_content"}
    calls = message.get("tool_calls", ())
    changed = [
        call | {"function": call["function"] | {"arguments": '{"key": "other"}'}} for call in calls
    ]
    return message | {"tool_calls": changed} if calls else message


def check(name: str, count: int, first: int = 0, **how: bool) -> Counter[str]:
    """Run that many conversations. Returns how often each reason of a split occurred."""
    one, reasons = model(name), Counter()
    for number in range(first, first + count):
        rng = random.Random(f"{name}/{how}/{number}")
        trajectory, sampled, ids = conversation(one, rng, **how)
        samples = trajectory_samples(trajectory)
        trained = [token for s in samples for token in s.tokens[s.ratio_mask].tolist()]
        assert trained == sampled, (name, number)
        assert len(set(ids)) == len(ids)
        splits = [sample.split for sample in samples]
        assert splits[0] is None
        for split in splits[1:]:
            assert split is not None
            assert split.reason in SPLIT_REASONS
            reasons[split.reason] += 1
        reasons["conversations"] += 1
        reasons["answers"] += len(trajectory.messages_and_choices)
    return reasons


@pytest.mark.parametrize("name", FORMS)
def test_what_was_sampled_is_trained_on(name: str):
    found = check(name, 30, edits=False) + check(name, 30, edits=True)
    assert 0 < sum(found[reason] for reason in SPLIT_REASONS) < found["answers"] / 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("name", FORMS)
def test_what_was_sampled_is_trained_on_in_a_hundred_thousand_conversations(
    name: str, quarter: int
):
    found = check(name, 25_000, quarter // 2 * 25_000, edits=quarter % 2 == 1)
    print(name, dict(found))
    assert found["conversations"] == 25_000


@pytest.mark.parametrize("name", FORMS)
def test_well_formed_calls_and_answers_stay_one_sample(name: str):
    """However they are spaced and spelled: no client changed them, no template left any out."""
    assert set(check(name, 40, tame=True)) == {"conversations", "answers"}


USER = [{"role": "user", "content": "hi"}]


def said(one: Model, memory: TokenMemory, text: str, history: list[dict] = USER) -> tuple:
    """Ask and answer by `text`: the message, and the tokens so far."""
    prompt = prompt_of(one, history, tools=TOOLS, memory=memory)
    tokens = one.spell(text, random.Random(text))
    parsed = one.chat.parse(text, tools=TOOLS, key=completion_key(prompt, 0))
    memory.remember(prompt, tokens, lambda: text, [call.id for call in parsed.tool_calls])
    return as_message(parsed), prompt + tokens


RESULT = {"role": "tool", "tool_call_id": "x", "content": "5"}
CALL = '<tool_call>{"name":"add",   "arguments":{"n":1}}</tool_call><|im_end|>'


def test_without_a_memory_the_same_text_is_other_tokens():
    one, memory = model("qwen"), TokenMemory()
    message, tokens = said(one, memory, CALL)
    history = [*USER, message, RESULT]
    assert prompt_of(one, history, tools=TOOLS)[: len(tokens)] != tokens
    assert prompt_of(one, history, tools=TOOLS, memory=memory)[: len(tokens)] == tokens
    assert prompt_of(one, history, tools=TOOLS, memory=TokenMemory())[: len(tokens)] != tokens


def test_of_like_calls_the_one_that_is_named_is_used():
    one, memory = model("qwen"), TokenMemory()
    message, tokens = said(one, memory, CALL)
    other, others = said(one, memory, CALL.replace("   ", "\n"))
    assert message["tool_calls"][0]["id"] != other["tool_calls"][0]["id"]
    for chosen, expected in ((message, tokens), (other, others)):
        prompt = prompt_of(one, [*USER, chosen, RESULT], tools=TOOLS, memory=memory)
        assert prompt[: len(expected)] == expected


@pytest.mark.parametrize("change", ["name", "arguments", "content"])
def test_a_changed_message_is_not_what_was_sampled(change: str):
    one, memory = model("qwen"), TokenMemory()
    message, tokens = said(one, memory, "so " + CALL)
    function = message["tool_calls"][0]["function"]
    if change == "content":
        message = message | {"content": "but"}
    else:
        function[change] = {"name": "look_up", "arguments": '{"n": 2}'}[change]
    history = [*USER, message, RESULT]
    prompt = prompt_of(one, history, tools=TOOLS, memory=memory)
    assert prompt == one.tokenizer.encode(one.chat.render(history, tools=TOOLS))
    assert prompt[: len(tokens)] != tokens


def test_what_the_template_leaves_out_stays_out():
    """Qwen's leaves out the reasoning before the user's last message: so the prompt has none."""
    one, memory = model("qwen"), TokenMemory()
    message, tokens = said(one, memory, "<think>\nhm\n</think>\n\nyes<|im_end|>")
    history = [*USER, message, {"role": "user", "content": "sure?"}]
    prompt = prompt_of(one, history, tools=TOOLS, memory=memory)
    assert "hm" not in one.tokenizer.decode(prompt, special=True)
    assert prompt[: len(tokens)] != tokens


def test_a_cut_answer_goes_on_with_the_end_that_was_not_sampled():
    one, memory = model("qwen"), TokenMemory()
    message, tokens = said(one, memory, "the ans")
    history = [*USER, message, {"role": "user", "content": "go on"}]
    prompt = prompt_of(one, history, tools=TOOLS, memory=memory)
    assert prompt[: len(tokens)] == tokens
    assert one.tokenizer.decode(prompt[len(tokens) :], special=True).startswith("<|im_end|>\n")


def test_reasoning_that_a_client_has_no_field_for_comes_back():
    one, memory = model("harmony"), TokenMemory()
    assert one.chat.form is HARMONY
    thought = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.add json<|message|>{"n":1}<|call|>'
    message, tokens = said(one, memory, thought + call)
    assert message.pop("reasoning_content") == "so"
    prompt = prompt_of(one, [*USER, message, RESULT], tools=TOOLS, memory=memory)
    assert prompt[: len(tokens)] == tokens


def test_another_models_tokens_are_not_used():
    memory = TokenMemory()
    message, tokens = said(model("qwen"), memory, CALL)
    other = Model("qwen")
    prompt = prompt_of(other, [*USER, message, RESULT], tools=TOOLS, memory=memory)
    assert prompt[: len(tokens)] != tokens


def test_a_text_prompt_goes_on_from_sampled_tokens():
    engine, memory = FakeEngine(), TokenMemory()
    encode = engine.tokenizer.encode
    prompt = memory.prompt(engine, "once", None, ())
    memory.remember(prompt, [-1, -2], lambda: "upon")  # tokens that no text is encoded as
    assert memory.prompt(engine, "onceupon a", None, ()) == [
        *prompt,
        -1,
        -2,
        32,
        97,
    ]
    assert memory.prompt(engine, "onceup", None, ()) == encode("onceup")
    memory.remember([7], [8], lambda: "x")  # nobody asked for it
    assert memory.prompt(engine, "x", None, ()) == encode("x")
