"""Which history a call goes on in."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo.core.choices import as_choice
from gspo.serve.histories import Conversations, call_ids, form
from gspo.trajectories import Trajectory
from support import choice

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Agent:
    """Talks to a `Conversations` as a server does, with tokens that are never the same twice."""

    def __init__(self) -> None:
        self.trajectory = Trajectory()
        self.calls = Conversations(self.trajectory)
        self.token = 0

    def ask(
        self, messages: list[Any], answer: Any = "yes", tools: Any = None, prompt: Any = None
    ) -> dict[str, Any]:
        """Ask, and return the answer as a client sends it back."""
        self.token += 1
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        said = choice([self.token], prompt or [1000 + self.token], message=message)
        self.calls.add(messages, tools, said)
        return dict(message)

    def sampled(self) -> list[list[int]]:
        """The sampled tokens of each history."""
        return [
            [c.token_ids[0] for c in history.choices()]  # pyright: ignore[reportAttributeAccessIssue]
            for history in self.trajectory.histories()
        ]


def called(arguments: str, id: str = "c1", content: Any = None) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    calls = [{"id": id, "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def test_a_conversation_stays_in_one_history():
    agent = Agent()
    messages = [user("a")]
    for _ in range(3):
        messages = [*messages, agent.ask(messages), user("b")]
    assert agent.sampled() == [[1, 2, 3]]
    assert agent.trajectory.messages() == [
        m | ({"content": "yes"} if m["role"] == "assistant" else {}) for m in messages[:-1]
    ]


def test_a_call_that_extends_nothing_begins_a_history():
    agent = Agent()
    answer = agent.ask([user("a")])
    agent.ask([user("other")])
    agent.ask([user("a"), answer, user("b")])
    assert agent.sampled() == [[1, 3], [2]]


def test_a_branch_has_the_earlier_turns_as_context():
    """Each sampled token is recorded once, wherever the conversation goes on."""
    agent = Agent()
    answer = agent.ask([user("a")])
    agent.ask([user("a"), answer, user("b")])
    agent.ask([user("a"), answer, user("c")])
    assert agent.sampled() == [[1, 2], [3]]
    assert agent.trajectory.additional_histories[0].messages() == [
        *(user("a"), answer, user("c")),
        {"role": "assistant", "content": "yes"},
    ]


def test_other_tools_begin_a_history():
    agent = Agent()
    answer = agent.ask([user("a")], tools=TOOLS)
    agent.ask([user("a"), answer, user("b")])
    agent.ask([user("a"), answer, user("b")], tools=TOOLS)
    assert agent.sampled() == [[1, 3], [2]]
    assert [h.tools for h in agent.trajectory.histories()] == [TOOLS, None]


@pytest.mark.parametrize(
    "sent_back",
    [
        called('{"b": 2,"a": 1}'),  # the arguments written anew
        called('{"a":1,"b":2}', content=""),  # None became ""
        called('{"a":1,"b":2}', id="renamed"),
        called('{"a":1,"b":2}') | {"refusal": None, "name": "planner", "audio": None},
        called('{"a":1,"b":2}') | {"reasoning_content": "hm"},
        called('{"a":1,"b":2}', content=[{"type": "text", "text": ""}]),
    ],
)
def test_an_answer_that_the_client_wrote_anew_goes_on(sent_back: dict[str, Any]):
    agent = Agent()
    agent.ask([user("a")], called('{"a": 1, "b": 2}'))
    agent.ask([user("a"), sent_back, {"role": "tool", "tool_call_id": "c1", "content": "3"}])
    assert agent.sampled() == [[1, 2]]


@pytest.mark.parametrize(
    "sent_back",
    [
        called('{"a": 1, "b": 3}'),
        {"role": "assistant", "content": "yes"},
        called('{"a": 1, "b": 2}') | {"tool_calls": []},
        called('{"a": 1, "b": 2}', content="And:"),
        called('{"a": 1, "b": 2}') | {"role": "user"},
    ],
)
def test_an_answer_that_says_something_else_does_not(sent_back: dict[str, Any]):
    agent = Agent()
    agent.ask([user("a")], called('{"a": 1, "b": 2}'))
    agent.ask([user("a"), sent_back, user("b")])
    assert agent.sampled() == [[1], [2]]


def test_arguments_that_are_no_json_are_compared_as_text():
    agent = Agent()
    agent.ask([user("a")], called('{"a": '))
    agent.ask([user("a"), called('{"a": '), user("b")])
    agent.ask([user("a"), called('{"a":'), user("b")])
    assert agent.sampled() == [[1, 2], [3]]


def test_of_equal_answers_the_ids_decide():
    """Two sub-agents with one prompt said the same: each goes on in its own history."""
    agent = Agent()
    for id in ("c1", "c2"):
        agent.ask([user("a")], called("{}", id))
    for id in ("c2", "c1"):
        agent.ask([user("a"), called("{}", id), {"role": "tool", "tool_call_id": id}])
    assert agent.sampled() == [[1, 4], [2, 3]]


def test_of_equal_answers_the_tokens_decide():
    agent = Agent()
    agent.ask([user("a")], prompt=[9])
    agent.ask([user("a")], prompt=[9])  # sampled 2
    answer = {"role": "assistant", "content": "yes"}
    agent.ask([user("a"), answer, user("b")], prompt=[9, 2, 5])
    assert agent.sampled() == [[1], [2, 3]]


def test_the_longest_fitting_history_goes_on():
    agent = Agent()
    agent.ask([user("a")])
    answer = {"role": "assistant", "content": "yes"}
    agent.ask([user("a")])
    agent.ask([user("a"), answer, user("b")])  # extends the first
    agent.ask([user("a"), answer, user("b"), answer, user("c")])
    assert agent.sampled() == [[1, 3, 4], [2]]


def test_text_completions_go_on_too():
    agent = Agent()
    for prompt in ("ab", "abyes?", "cd"):
        text = {"text": "yes", "prompt_token_ids": [1], "token_ids": [2]}
        agent.calls.add_text(prompt, as_choice(text))  # pyright: ignore[reportArgumentType]
    assert agent.sampled() == [[2, 2], [2]]
    contents = [m.get("content") for m in agent.trajectory.messages()]
    assert contents == ["ab", "yes", "?", "yes"]
    agent.ask([user("ab")])  # a chat is no text
    assert agent.sampled() == [[2, 2], [2], [1]]


def test_messages_that_the_user_put_in_stay_where_they_are():
    agent = Agent()
    agent.trajectory.messages_and_choices.append(user("mine"))
    agent.ask([user("a")])
    assert agent.sampled() == [[], [1]]


def test_forms_and_ids():
    assert form({"role": "tool", "content": " 3", "tool_call_id": "x", "name": "add"}) == form(
        {"role": "tool", "content": [{"type": "text", "text": " 3"}], "tool_call_id": "y"}
    )
    assert form(user("a")) != form(user("a ")) != form(user("a") | {"name": "ann"})
    assert call_ids(called("{}", "c1")) == ["c1"]
    assert call_ids({"role": "tool", "tool_call_id": "c2"}) == ["c2"]


@given(st.integers(0, 10**6))
def test_agents_side_by_side_are_kept_apart(seed: int):
    """Any order of the calls of several agents with tools gives each agent one history."""
    rng = random.Random(seed)
    agent = Agent()
    count = rng.randint(1, 5)
    said: list[list[Any]] = [[user(f"task {i}")] for i in range(count)]
    turns: list[list[int]] = [[] for _ in range(count)]
    for _ in range(rng.randint(count, 15)):
        i = rng.randrange(count)
        arguments = {"x": rng.randrange(3), "y": [None, "é", 1.5][rng.randrange(3)]}
        answer = called(json.dumps(arguments, ensure_ascii=rng.random() < 0.5), f"c{agent.token}")
        agent.ask(said[i], answer)
        turns[i].append(agent.token)
        again = called(json.dumps(arguments, indent=rng.choice([None, 2])), f"c{agent.token - 1}")
        result = {"role": "tool", "tool_call_id": f"c{agent.token - 1}", "content": "done"}
        said[i] = [*said[i], again, result]
    assert sorted(agent.sampled()) == sorted(t for t in turns if t)
