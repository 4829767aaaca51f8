"""Judges: scripted servers on loopback, honest ones and others."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

import gspo as art
from gspo.core.errors import ConfigError, JudgeError
from gspo.rewards import DEFAULT_RUBRIC, _question, ruler, ruler_score_group
from gspo.tasks import load_task
from support import choice

Answer = Callable[[dict[str, Any]], Any]


def group_of(*texts: str) -> art.TrajectoryGroup:
    """One rollout per text, behind the same task."""
    return art.TrajectoryGroup(
        art.Trajectory(
            messages_and_choices=[
                {"role": "user", "content": "write a long text"},
                choice([4], message={"role": "assistant", "content": text}),
            ],
            reward=0.25,
            metrics={"length": len(text)},
        )
        for text in texts
    )


def by_length(body: dict[str, Any]) -> str:
    """Score each attempt by its length, and answer in another order, with words around."""
    asked = body["messages"][1]["content"]
    attempts = re.findall(r'<attempt trajectory_id="(\d+)">\n(.*?)\n</attempt>', asked, re.DOTALL)
    texts = [
        (int(number), json.loads(text.splitlines()[-1])["content"]) for number, text in attempts
    ]
    scores = [
        {"trajectory_id": n, "explanation": f"{len(t)} letters", "score": min(1.0, len(t) / 10)}
        for n, t in reversed(texts)
    ]
    return f"Here it is: {json.dumps({'scores': scores})} Good luck!"


@asynccontextmanager
async def judged_by(answer: Answer) -> AsyncIterator[tuple[art.Model, list[dict[str, Any]]]]:
    """A judge on loopback, and the bodies of the requests that it gets."""
    app, bodies = fastapi.FastAPI(), []

    @app.post("/v1/chat/completions")
    async def chat(request: fastapi.Request) -> Any:
        bodies.append(await request.json())
        text = answer(bodies[-1])
        if not isinstance(text, str):
            return text
        message = {"role": "assistant", "content": text}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
        }

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        judge = art.Model(name="judge", project="p", inference_base_url=url, inference_api_key="k")
        yield judge, bodies
        await judge.openai_client().close()
        server.should_exit = True
        await serving


async def test_scores_become_rewards_and_the_group_that_was_given_stays() -> None:
    group = group_of("abc", "abcdefgh")
    async with judged_by(by_length) as (judge, bodies):
        scored = await ruler_score_group(group, judge)
    assert scored is not None
    assert [t.reward for t in scored] == [0.3, 0.8]
    assert [t.metrics for t in scored] == [
        {"length": 3, "independent_reward": 0.25, "ruler_score": 0.3},
        {"length": 8, "independent_reward": 0.25, "ruler_score": 0.8},
    ]
    assert scored.trajectories[0].logs == ["judge: 0.3: 3 letters"]
    assert scored.metadata == {"judge_prompt_tokens": 100, "judge_completion_tokens": 7}
    assert [t.reward for t in group] == [0.25, 0.25]
    assert "ruler_score" not in group.trajectories[0].metrics
    assert bodies[0]["response_format"]["type"] == "json_schema"
    assert DEFAULT_RUBRIC in bodies[0]["messages"][0]["content"]


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_question_holds_each_message_of_each_attempt(texts: list[list[str]]) -> None:
    lists = [[{"role": "user", "content": text} for text in attempt] for attempt in texts]
    question = _question(lists, "r", None)[1]["content"]
    task = re.match(r"<task>\n(.*?)\n</task>", question, re.DOTALL)
    shared = [json.loads(line) for line in task[1].splitlines()] if task else []
    attempts = re.findall(r"<attempt [^>]*>\n(.*?)\n</attempt>", question, re.DOTALL)
    told = [shared + [json.loads(line) for line in text.splitlines()] for text in attempts]
    assert told == lists


@pytest.mark.parametrize(
    "text",
    [
        "no idea",
        '{"scores": []}',
        '{"scores": [{"trajectory_id": 1, "explanation": "", "score": 0.5}]}',
        '{"scores": [{"trajectory_id": 1, "explanation": "", "score": 0.5},'
        '{"trajectory_id": 1, "explanation": "", "score": 0.5}]}',
        '{"scores": [{"trajectory_id": 1, "explanation": "", "score": 1.5},'
        '{"trajectory_id": 2, "explanation": "", "score": 0.5}]}',
        '{"scores": [{"trajectory_id": 1, "explanation": "", "score": NaN},'
        '{"trajectory_id": 2, "explanation": "", "score": 0.5}]}',
    ],
)
async def test_nonsense_is_asked_again_and_then_an_error(text: str) -> None:
    async with judged_by(lambda body: text) as (judge, bodies):
        with pytest.raises(JudgeError, match="nonsense 2 times"):
            await ruler_score_group(group_of("a", "b"), judge, attempts=2)
    assert len(bodies) == 2


async def test_a_second_answer_may_be_right_and_both_are_counted() -> None:
    answers = iter(["?"])
    async with judged_by(lambda body: next(answers, None) or by_length(body)) as (judge, _):
        scored = await ruler_score_group(group_of("a", "b"), judge)
    assert scored is not None and scored.metadata["judge_prompt_tokens"] == 200


async def test_a_judge_without_schemas_is_asked_in_words() -> None:
    def answer(body: dict[str, Any]) -> Any:
        if "response_format" in body:
            error = {"message": "no schemas here", "type": "invalid_request_error"}
            return fastapi.responses.JSONResponse({"error": error}, status_code=400)
        return by_length(body)

    async with judged_by(answer) as (judge, bodies):
        scores = await ruler([[{"role": "user", "content": "abc"}]], judge)
    assert [score.score for score in scores] == [0.3]
    assert len(bodies) == 2


async def test_a_judge_that_is_down_is_named_and_may_drop_the_group(
    caplog: pytest.LogCaptureFixture,
) -> None:
    judge = art.Model(
        name="j", project="p", inference_base_url="http://127.0.0.1:9/v1", inference_api_key="k"
    )
    judge._client = judge.openai_client().with_options(max_retries=0)
    group = group_of("a", "b")
    with pytest.raises(JudgeError, match="the judge 'j' gave no answer"):
        await ruler_score_group(group, judge)
    assert [t.reward for t in group] == [0.25, 0.25]
    assert await ruler_score_group(group, judge, swallow_exceptions=True) is None
    await judge._client.close()
    assert "a group is dropped" in caplog.text


async def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    async with judged_by(by_length) as (judge, bodies):
        first = await ruler_score_group(group_of("a", "bc"), judge, cache=tmp_path)
        again = await ruler_score_group(group_of("a", "bc"), judge, cache=tmp_path)
        other = await ruler_score_group(group_of("a", "bc"), judge, cache=tmp_path, rubric="x")
    assert first is not None and again is not None and other is not None
    assert [t.reward for t in again] == [t.reward for t in first]
    assert again.metadata["judge_prompt_tokens"] == 0
    assert len(bodies) == 2


async def test_what_art_calls_otherwise_is_refused_by_name(monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="judge="):
        await ruler_score_group(group_of("a"), judge_model="openai/o3")  # pyright: ignore[reportCallIssue]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        await ruler_score_group(group_of("a"), "openai/o3")
    with pytest.raises(ConfigError, match="attempts"):
        await ruler_score_group(group_of("a"), "o3", attempts=0)
    with pytest.raises(ConfigError, match=r"params: .*Did you mean 'temperature'"):
        await ruler([[]], "o3", params={"temprature": 0})
    with pytest.raises(ConfigError, match="'model' is not supported"):
        await ruler([[]], "o3", params={"model": "x"})


async def test_nothing_to_score_asks_nobody() -> None:
    empty = art.TrajectoryGroup([], exceptions=[ValueError("x")])
    assert await ruler_score_group(empty, "o3") is empty
    assert await ruler([], "o3") == []


def by_order(body: dict[str, Any]) -> str:
    """A rubric as a program: how many digits stand where the sorted ones stand."""
    asked = body["messages"][1]["content"]
    task = json.loads(re.search(r"<task>\n(.*?)\n</task>", asked, re.DOTALL)[1])["content"]  # type: ignore[index]
    right = "".join(sorted(task))
    attempts = re.findall(r'<attempt trajectory_id="(\d+)">\n(.*?)\n</attempt>', asked, re.DOTALL)
    scores = []
    for number, told in attempts:
        text = json.loads(told)["content"]
        share = sum(a == b for a, b in zip(text, right, strict=False)) / len(right)
        scores.append({"trajectory_id": int(number), "explanation": "", "score": share})
    return json.dumps({"scores": scores})


@pytest.mark.slow
async def test_a_model_learns_from_a_judge(tmp_path: Path) -> None:
    task = load_task("sort", {})
    model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
    scores = []

    async def rollout(problem: Any) -> art.Trajectory:
        messages: list[Any] = [{"role": "user", "content": problem.prompt}]
        answer = await model.openai_client().chat.completions.create(
            model=model.inference_name, messages=messages, max_tokens=16
        )
        # No reward of its own: only the judge's counts.
        return art.Trajectory(messages_and_choices=[*messages, answer.choices[0]])

    async with judged_by(by_order) as (judge, _), art.LocalBackend(path=tmp_path) as backend:
        await model.register(backend)

        async def judged(group: art.TrajectoryGroup) -> art.TrajectoryGroup | None:
            return await ruler_score_group(group, judge)

        for step in range(60):
            problems = [task.problem("train", 16 * step + i) for i in range(16)]
            groups = await art.gather_trajectory_groups(
                (art.TrajectoryGroup(rollout(p) for _ in range(16)) for p in problems),
                after_each=judged,
            )
            rewards = [t.reward for group in groups for t in group]
            scores.append(sum(rewards) / len(rewards))
            config = art.dev.TrainConfig(lr_warmup_steps=5)
            await model.train(groups, art.TrainConfig(learning_rate=3e-4), config)
    assert sum(scores[-8:]) / 8 > sum(scores[:8]) / 8 + 0.03, scores


async def test_a_judge_that_never_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        judge = art.Model(name="j", project="p", inference_base_url=url, inference_api_key="k")
        judge._client = judge.openai_client().with_options(max_retries=0)
        with pytest.raises(JudgeError, match=r"'j' gave no answer: Request timed out.*'timeout'"):
            await ruler_score_group(group_of("a", "b"), judge, params={"timeout": 0.1})
        await judge._client.close()
