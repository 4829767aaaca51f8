"""Rewards from a judge: a language model that compares the rollouts of one prompt (RULER)."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI, BadRequestError
from openai.resources.chat.completions import AsyncCompletions
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gspo.absent import refusing
from gspo.core.errors import ConfigError, JudgeError, check_names, shown
from gspo.core.files import write_whole
from gspo.core.log import log
from gspo.model import Model
from gspo.trajectories import Message, Tools, TrajectoryGroup

__all__ = ["DEFAULT_RUBRIC", "TrajectoryScore", "ruler", "ruler_score_group"]

DEFAULT_RUBRIC = """\
- What counts first is whether the goal was reached.
- Of two that reached it, or both did not, the one that came nearer to it is better.
- Of two that are equal in that, the one that needed fewer and more useful steps is better.
- A claim that the rollout itself shows to be false counts against it.
- Equal work gets equal scores, also if the words differ. Small differences get small distances."""
"""What is compared, if the caller says nothing else."""
_TASK = Path(__file__).with_name("judge.txt").read_text(encoding="utf-8")
_OURS: dict[str, str] = dict.fromkeys(("self", "model", "messages", "stream"), "it is set here.")


class TrajectoryScore(BaseModel):
    """What the judge says of one rollout.

    Attributes:
        trajectory_id: its number, from 1.
        explanation: why.
        score: from 0 to 1.
    """

    model_config = ConfigDict(frozen=True)

    trajectory_id: int
    explanation: str
    score: float = Field(ge=0, le=1, allow_inf_nan=False)


class _Answer(BaseModel):
    scores: list[TrajectoryScore]


class Verdict(BaseModel):
    """The scores of all rollouts, in their order, and the tokens that they cost."""

    scores: list[TrajectoryScore]
    prompt_tokens: int = 0
    completion_tokens: int = 0


@refusing
async def ruler_score_group(
    group: TrajectoryGroup,
    judge: str | Model = "o3",
    *,
    rubric: str | None = None,
    params: Mapping[str, Any] | None = None,
    attempts: int = 3,
    cache: str | Path | None = None,
    swallow_exceptions: bool = False,
    debug: bool = False,
) -> TrajectoryGroup | None:
    """Score a group's rollouts against each other: a new group, whose rewards are the scores.

    The reward that a rollout had is in `metrics["independent_reward"]`, the score in
    `metrics["ruler_score"]`, the judge's words in `logs`, and the tokens that the judge read and
    wrote in the new group's metadata. The group that was given stays as it is.

    Args:
        group: what is scored; its exceptions go along.
        judge: a model's name at OPENAI_BASE_URL, or a `Model` (a `TrainableModel` too).
        rubric: what is compared; None: `DEFAULT_RUBRIC`.
        params: of the request, such as `{"temperature": 0}`.
        attempts: how often the judge may answer before its answer counts as nonsense.
        cache: folder of answers. The same question is not asked again, in a resumed run neither.
        swallow_exceptions: log a `JudgeError` and return None, which drops the group in
            `gather_trajectory_groups(after_each=)`.
        debug: print what the judge says.

    Raises:
        JudgeError: the judge cannot be reached, or its answers are nonsense.
        ConfigError: an unknown argument, or no server for the judge.
    """
    if not group.trajectories:
        return group
    tools = next((t.tools for t in group.trajectories if t.tools), None)
    question = _question([trajectory.messages() for trajectory in group], rubric, tools)
    try:
        verdict = await _verdict(question, len(group.trajectories), judge, params, attempts, cache)
    except JudgeError as error:
        if not swallow_exceptions:
            raise
        log.warning("a group is dropped: %s", error)
        return None
    scored = []
    for trajectory, score in zip(group, verdict.scores, strict=True):
        if debug:
            print(f"{score.trajectory_id}: {score.score:.3f} {score.explanation}")
        metrics = {"independent_reward": trajectory.reward, "ruler_score": score.score}
        update = {
            "reward": score.score,
            "metrics": trajectory.metrics | metrics,
            "logs": [*trajectory.logs, f"judge: {score.score:g}: {score.explanation}"],
        }
        scored.append(trajectory.model_copy(update=update))
    tokens = {
        "judge_prompt_tokens": verdict.prompt_tokens,
        "judge_completion_tokens": verdict.completion_tokens,
    }
    return TrajectoryGroup(scored, metadata=group.metadata | tokens, exceptions=group.exceptions)


@refusing
async def ruler(
    message_lists: Sequence[Sequence[Mapping[str, Any]]],
    judge: str | Model = "o3",
    *,
    rubric: str | None = None,
    tools: Tools | None = None,
    params: Mapping[str, Any] | None = None,
    attempts: int = 3,
    cache: str | Path | None = None,
) -> list[TrajectoryScore]:
    """Score conversations against each other, as `ruler_score_group` does.

    Returns one score per conversation, in their order.

    Raises:
        JudgeError, ConfigError: as there.
    """
    if not message_lists:
        return []
    question = _question(message_lists, rubric, tools)
    return (await _verdict(question, len(message_lists), judge, params, attempts, cache)).scores


async def _verdict(
    question: list[Message],
    count: int,
    judge: str | Model,
    params: Mapping[str, Any] | None,
    attempts: int,
    cache: str | Path | None,
) -> Verdict:
    """Ask the judge about `count` rollouts, or find what it has answered to the same question."""
    if attempts < 1:
        raise ConfigError(f"attempts = {shown(attempts)}: must be at least 1")
    names = inspect.signature(AsyncCompletions.create).parameters.keys() - _OURS.keys()
    check_names("params", params or (), sorted(names), _OURS)
    client, name = _server(judge)
    asked = {"model": name, "messages": question, **(params or {})}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    path = None if cache is None else Path(cache) / f"{key}.json"
    if path is not None and path.exists():
        stored = Verdict.model_validate_json(path.read_bytes())
        return Verdict(scores=stored.scores)  # the tokens were counted when it was asked
    try:
        verdict = await _ask(client, asked, count, attempts)
    finally:
        if not isinstance(judge, Model):
            await client.close()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, verdict.model_dump_json(indent=1).encode())
    return verdict


def _server(judge: str | Model) -> tuple[AsyncOpenAI, str]:
    """The judge's client, and its name there."""
    if isinstance(judge, Model):
        return judge.openai_client(), judge.inference_name
    try:
        # ART's names begin with the provider, as litellm's do.
        return AsyncOpenAI(), judge.removeprefix("openai/")
    except Exception as error:  # no key
        raise ConfigError(
            f"the judge {judge!r} is a model at OPENAI_BASE_URL, but: {str(error).rstrip('.')}. "
            "Set OPENAI_API_KEY, or give judge=art.Model(...) with its inference_base_url and "
            "inference_api_key"
        ) from None


def _question(
    message_lists: Sequence[Sequence[Mapping[str, Any]]], rubric: str | None, tools: Tools | None
) -> list[Message]:
    """What the judge is asked: messages that all rollouts begin with are shown once."""
    shared = 0  # each attempt keeps its last message
    while all(len(m) > shared + 1 and m[shared] == message_lists[0][shared] for m in message_lists):
        shared += 1
    parts = [f"<task>\n{_told(message_lists[0][:shared])}\n</task>"] if shared else []
    if tools:
        parts.append(f"<tools>\n{json.dumps(tools)}\n</tools>")
    for number, messages in enumerate(message_lists, 1):
        told = _told(messages[shared:])
        parts.append(f'<attempt trajectory_id="{number}">\n{told}\n</attempt>')
    system = {"role": "system", "content": _TASK.format(rubric=rubric or DEFAULT_RUBRIC)}
    return [system, {"role": "user", "content": "\n\n".join(parts)}]


def _told(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(json.dumps(dict(message), ensure_ascii=False) for message in messages)


async def _ask(client: AsyncOpenAI, asked: dict[str, Any], count: int, attempts: int) -> Verdict:
    """Ask until an answer has a score for each of `count` rollouts."""
    name = asked["model"]
    schema = {"name": "scores", "schema": _Answer.model_json_schema()}
    form: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}}
    verdict, fault = Verdict(scores=[]), ""
    tries = 0
    while tries < attempts:
        try:
            answer = await client.chat.completions.create(**(form | asked))
        except BadRequestError as error:
            if not form:
                raise JudgeError(f"the judge {name!r} refuses: {error}") from error
            form = {}  # not every server takes a schema; the question says the form too
            continue
        except APIError as error:
            status = f" (HTTP {error.status_code})" if isinstance(error, APIStatusError) else ""
            told = f"the judge {name!r} gave no answer{status}: {error} Is its server up? "
            raise JudgeError(told + "params={'timeout': seconds} limits a request") from error
        tries += 1
        if answer.usage is not None:
            verdict.prompt_tokens += answer.usage.prompt_tokens
            verdict.completion_tokens += answer.usage.completion_tokens
        text = (answer.choices[0].message.content or "") if answer.choices else ""
        try:
            verdict.scores = _scores(text, count)
            return verdict
        except ValueError as error:
            fault = f"{error}; it wrote {shown(text)}"
    raise JudgeError(
        f"the judge {name!r} answered nonsense {attempts} times, last: {fault}. The rewards are "
        "untouched: take a stronger judge, or a shorter rubric"
    )


def _scores(text: str, count: int) -> list[TrajectoryScore]:
    """Read an answer: from the first brace to the last, since some judges put words around it.

    Raises:
        ValueError: it has another form, or not one score for each rollout.
    """
    try:
        answer = _Answer.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part} " for part in first["loc"])
        raise ValueError(f"{place}{first['msg']}") from None
    ids = sorted(score.trajectory_id for score in answer.scores)
    if ids != list(range(1, count + 1)):
        raise ValueError(f"it scores the attempts {ids}, but there are {count}, numbered from 1")
    return sorted(answer.scores, key=lambda score: score.trajectory_id)
