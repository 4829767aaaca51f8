"""`art.trajectory()`: what an agent asks becomes a trajectory, whoever asks it and wherever."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

import gspo as art
from gspo.core.errors import ConfigError, DataError
from gspo.data.sample import trajectory_samples


def user(text: str) -> Any:
    return {"role": "user", "content": text}


@pytest.fixture
async def model():
    model = art.TrainableModel(name="m", project="p", base_model="any")
    async with art.FakeBackend() as backend:
        await model.register(backend)
        yield model


@pytest.fixture
async def served():
    """A model on a port."""
    model = art.TrainableModel(name="m", project="p", base_model="any")
    async with art.FakeBackend(port=0) as backend:
        await model.register(backend)
        yield model


async def ask(model: art.TrainableModel, *messages: Any, **options: Any) -> Any:
    answer = await model.openai_client().chat.completions.create(
        model=model.inference_name, messages=list(messages), **options
    )
    return answer.choices[0]


async def talk(model: art.TrainableModel, task: str, turns: int = 2) -> list[Any]:
    """A conversation; the choices."""
    messages, choices = [user(task)], []
    for _ in range(turns):
        choices.append(await ask(model, *messages))
        said = {"role": "assistant", "content": choices[-1].message.content}
        messages += [said, user("go on")]
    return choices


async def test_a_block_is_a_trajectory_of_its_calls(model: art.TrainableModel):
    async with art.trajectory() as t:
        choices = await talk(model, "a")
        t.reward = 1.0
    t.metrics["turns"] = 2
    await ask(model, user("after"))
    assert isinstance(t, art.Trajectory)
    assert (t.choices(), t.reward, t.additional_histories) == (choices, 1.0, [])
    (sample,) = trajectory_samples(t)
    sampled = [token for choice in choices for token in choice.token_ids]
    assert sample.tokens[sample.ratio_mask].tolist() == sampled
    assert copy.deepcopy(t).choices() == choices


async def test_with_does_the_same_and_so_does_a_thread(model: art.TrainableModel):
    """`asyncio.to_thread` copies the context, so calls of a thread are recorded too."""
    with art.trajectory(model) as t:
        choice = await asyncio.to_thread(lambda: asyncio.run(ask(model, user("a"))))
    assert t.choices() == [choice]


async def test_sub_agents_have_histories_of_their_own(model: art.TrainableModel):
    async with art.trajectory() as t:
        first = await ask(model, user("plan"))
        parts = await asyncio.gather(*(talk(model, f"part {i}") for i in range(3)))
        said = {"role": "assistant", "content": first.message.content}
        last = await ask(model, user("plan"), said, user("sum up"))
    assert t.choices() == [first, last]
    assert sorted((h.choices() for h in t.additional_histories), key=str) == sorted(parts, key=str)
    assert sum(len(s.turn_ids[s.ratio_mask]) for s in trajectory_samples(t)) == sum(
        len(choice.token_ids) for choice in [first, last, *(c for part in parts for c in part)]
    )


def calls_once(prompt: str, index: int) -> str:
    """Calls the tool, and says what it gave."""
    if "<tool>" not in prompt:
        return 'Hm.<tool_call>{"name":"add",  "arguments": {"b": 2,"a":1}}</tool_call>'
    return "3"


TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


async def streamed(client: AsyncOpenAI, messages: list[Any]) -> tuple[Any, list[int]]:
    """A streamed answer: the message that its chunks add up to, and their tokens."""
    tokens: list[int] = []
    message: Any = {"role": "assistant", "content": "", "tool_calls": []}
    stream = await client.chat.completions.create(
        model="m", messages=messages, tools=TOOLS, stream=True
    )
    async for chunk in stream:
        part: Any = chunk.choices[0]
        tokens += part.token_ids or []
        message["content"] += part.delta.content or ""
        message["tool_calls"] += [
            call.model_dump(exclude={"index"}) for call in part.delta.tool_calls or ()
        ]
    return {name: value for name, value in message.items() if value}, tokens


@pytest.mark.parametrize("port", [None, 0])
async def test_streams_with_tools_are_captured_token_by_token(port: int | None):
    model = art.TrainableModel(name="m", project="p", base_model="any")
    async with art.FakeBackend(calls_once, port=port) as backend:
        await model.register(backend)
        async with (
            art.trajectory(model) as t,
            AsyncOpenAI(
                base_url=t.base_url if port == 0 else "http://unused", api_key="gspo"
            ) as own,
        ):
            client = model.openai_client() if port is None else own
            messages: list[Any] = [user("1 + 2?")]
            asked, first = await streamed(client, messages)
            result = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "3"}
            told, second = await streamed(client, [*messages, asked, result])
            # Whoever reads a stream is done with it once its last choice has ended.
    assert asked["tool_calls"][0]["function"]["name"] == "add"
    assert [c.token_ids for c in t.choices()] == [first, second]  # pyright: ignore
    assert [c.finish_reason for c in t.choices()] == ["tool_calls", "stop"]
    assert t.messages()[-1]["content"] == told["content"] == "3"  # pyright: ignore
    assert (t.tools, t.additional_histories) == (TOOLS, [])
    (sample,) = trajectory_samples(t)
    assert sample.tokens[sample.ratio_mask].tolist() == [*first, *second]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_responses_route_is_captured_as_the_chat_that_it_is(stream: bool):
    model = art.TrainableModel(name="m", project="p", base_model="any")
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]

    async def respond(items: list[Any]) -> list[Any]:
        create = model.openai_client().responses.create
        answer: Any = await create(model="m", input=items, tools=tools, stream=stream)
        if stream:
            *_, last = [event async for event in answer]
            answer = last.response
        return [item.model_dump(exclude_none=True) for item in answer.output]

    async with art.FakeBackend(calls_once) as backend:
        await model.register(backend)
        async with art.trajectory() as t:
            items: list[Any] = [user("1 + 2?")]
            items += await respond(items)
            call_id = items[-1]["call_id"]
            items.append({"type": "function_call_output", "call_id": call_id, "output": "3"})
            items += await respond(items)
    assert items[-1]["content"][0]["text"] == "3"
    assert t.additional_histories == []
    assert [m["role"] for m in t.messages()] == ["user", "assistant", "tool", "assistant"]
    assert t.tools and t.tools[0]["function"]["name"] == "add"
    (sample,) = trajectory_samples(t)
    assert sample.sampled == sum(len(c.token_ids) for c in t.choices())  # pyright: ignore


async def test_a_stream_that_is_left_is_not_recorded():
    model = art.TrainableModel(name="m", project="p", base_model="any")
    async with art.FakeBackend(lambda prompt, index: "a" * 500) as backend:
        await model.register(backend)
        async with art.trajectory() as t:
            stream = await model.openai_client().chat.completions.create(
                model="m", messages=[user("a")], stream=True
            )
            async for _ in stream:
                break
            await stream.close()
            await asyncio.sleep(0.05)
    assert t.choices() == []


async def test_the_innermost_block_records(model: art.TrainableModel):
    async with art.trajectory() as outer:
        async with art.trajectory() as inner:
            choice = await ask(model, user("a"))
            assert art.auto_trajectory() is inner
        assert art.auto_trajectory(required=True) is outer
    assert (inner.choices(), outer.choices()) == ([choice], [])


async def test_rollouts_of_a_gather_are_kept_apart(model: art.TrainableModel):
    async def rollout(task: str, i: int) -> art.Trajectory:
        async with art.trajectory() as t:
            for choice in await talk(model, task, 1 + i):
                t.reward += len(choice.message.content)
        return t

    groups = await art.gather_trajectory_groups(
        art.TrajectoryGroup(rollout(task, i) for i in range(4)) for task in "xy"
    )
    for group, task in zip(groups, "xy", strict=True):
        for i, t in enumerate(group):
            assert (t.messages()[0], len(t.choices())) == (user(task), i + 1)
    assert (await model.train(groups)).step == 1


async def test_a_block_that_raises_keeps_what_was_recorded(model: art.TrainableModel):
    with pytest.raises(ValueError, match="tool"):
        async with art.trajectory() as t:
            choice = await ask(model, user("a"))
            raise ValueError("tool")
    assert t.choices() == [choice]
    assert art.auto_trajectory() is None


async def test_a_task_that_outlives_its_block_is_not_recorded(
    model: art.TrainableModel, caplog: pytest.LogCaptureFixture
):
    gate = asyncio.Event()

    async def late() -> None:
        await gate.wait()
        await ask(model, user("late"))

    async with art.trajectory() as t:
        task = asyncio.create_task(late())
    gate.set()
    await task
    assert t.choices() == []
    assert "had ended" in caplog.text


async def test_a_block_is_entered_once(model: art.TrainableModel):
    block = art.trajectory()
    with block, pytest.raises(ConfigError, match="entered already"):
        block.__enter__()
    with block as t:  # one after the other is fine
        assert t.choices() == []


async def test_a_decorated_rollout_returns_its_trajectory(model: art.TrainableModel):
    @art.trajectory
    async def rollout(model: art.TrainableModel, task: str) -> float:
        """Talk."""
        await talk(model, task)
        art.auto_trajectory(required=True).metrics["n"] = 2
        return 0.5

    one, two = await asyncio.gather(rollout(model, "a"), rollout(model, task="b"))
    assert (one.reward, one.metrics["n"], one.messages()[0]) == (0.5, 2, user("a"))
    assert 0 <= one.metrics["duration"] < 60
    assert two.messages()[0] == user("b")
    assert rollout.__doc__ == "Talk."


@pytest.mark.parametrize("own", [True, False])
async def test_a_decorated_rollout_may_return_a_trajectory(model: art.TrainableModel, own: bool):
    class Mine(art.Trajectory):
        answer: str = ""

    @art.trajectory(model)
    async def rollout() -> art.Trajectory:
        choices = await asyncio.gather(talk(model, "a", 1), talk(model, "b", 1))
        items: Any = [user("mine"), choices[0][0]] if own else []
        return Mine(messages_and_choices=items, reward=2.0, answer="x")

    t = await rollout()
    assert (t.reward, t.answer) == (2.0, "x")  # pyright: ignore[reportAttributeAccessIssue]
    assert t.messages()[0] == user("mine" if own else "a")
    assert len(t.additional_histories) == (0 if own else 1)


async def test_a_decorated_rollout_may_return_nothing_but_no_text(model: art.TrainableModel):
    @art.trajectory()
    async def nothing() -> None:
        art.auto_trajectory(required=True).reward = 3.0

    @art.trajectory
    async def text() -> str:
        return "good"

    assert (await nothing()).reward == 3.0
    with pytest.raises(DataError, match=r"text returned 'good'"):
        await text()


def test_what_cannot_be_decorated_is_refused():
    for target in (lambda: None, "model", 3):
        with pytest.raises(ConfigError, match="a model or an async function"):
            art.trajectory(target)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ConfigError, match="async functions"):
        art.trajectory()(print)  # pyright: ignore[reportArgumentType]


async def test_another_program_is_captured_by_the_blocks_base_url(served: art.TrainableModel):
    """A plain, blocking client that knows nothing of gspo."""

    def program(base_url: str, api_key: str) -> Any:
        with OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            answer = client.chat.completions.create(model="m", messages=[user("a")])
        return answer.choices[0]

    async with art.trajectory(served) as t:
        choice = await asyncio.to_thread(program, t.base_url, t.api_key)
        own = await ask(served, user("b"))  # of this process, in the same trajectory
        assert (t.inference_name, t.openai_client()) == ("m", served.openai_client())
        url = t.base_url
    assert t.choices() == [choice]
    assert [h.choices() for h in t.additional_histories] == [[own]]
    with pytest.raises(ConfigError, match="block has ended"):
        t.base_url  # noqa: B018
    with pytest.raises(Exception, match="has ended"):
        await asyncio.to_thread(program, url, "gspo")


async def test_a_base_url_needs_a_port_and_a_model(model: art.TrainableModel):
    with art.trajectory(model) as t, pytest.raises(ConfigError, match=r"LocalBackend\(port=0\)"):
        t.base_url  # noqa: B018
    with art.trajectory() as t, pytest.raises(ConfigError, match=r"art.trajectory\(model\)"):
        t.base_url  # noqa: B018


async def test_a_decorated_rollout_has_the_base_url_of_its_model(served: art.TrainableModel):
    @art.trajectory
    async def rollout(model: art.TrainableModel) -> None:
        assert art.auto_trajectory().base_url.startswith("http://127.0.0.1:")  # pyright: ignore

    await rollout(served)


async def test_arts_names(model: art.TrainableModel):
    t = await art.capture_auto_trajectory(talk(model, "a"))
    assert len(t.choices()) == 2
    assert art.auto_trajectory() is None
    with pytest.raises(ConfigError, match="capture_auto_trajectory"):
        art.auto_trajectory(required=True)

    async def agent() -> str:
        art.yield_trajectory(art.Trajectory(reward=1.0))
        await asyncio.create_task(asyncio.sleep(0))
        art.yield_trajectory(art.Trajectory(reward=2.0))
        return "an answer"

    assert (await art.capture_yielded_trajectory(agent())).reward == 2.0
    assert await agent() == "an answer"  # where nobody trains
    with pytest.raises(DataError, match="talk yielded no trajectory"):
        await art.capture_yielded_trajectory(talk(model, "a"))
