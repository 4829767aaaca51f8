"""Conversations that somebody else wrote -> samples of which the assistant's turns are trained on.

The conversation is rendered by the model's own chat template. Each answer is what its text adds to
the prompt that asks for it, up to the token that ends it, and is tokenized by itself: the tokens
are those that the engine is given and samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from gspo.core.errors import DataError, RequestError, SampleTooLongError, shown
from gspo.data.sample import Sample, sample_of
from gspo.data.turn import Turn
from gspo.serve.chat import ChatFormat
from gspo.serve.engine import Engine
from gspo.serve.verbatim import encoded_after
from gspo.trajectories import Trajectory
from gspo.utils.sft import check_conversation


def sft_samples(
    trajectories: Sequence[Any], engine: Engine, context: int, *, last: bool
) -> list[Sample]:
    """One sample for each conversation: a trajectory's own, and its additional histories.

    Args:
        trajectories: their rewards mean nothing here.
        engine: of the model, for its chat format and its tokens.
        context: the most tokens of a sample.
        last: only the last answer of each is trained on.

    Raises:
        DataError: none is given; no trajectory; a conversation without an answer, or one that
            the template refuses or does not write turn by turn.
        SampleTooLongError: a sample is longer than the context.
    """
    samples: list[Sample] = []
    for number, trajectory in enumerate(trajectories):
        if not isinstance(trajectory, Trajectory):
            raise DataError(f"trajectory {number} is {shown(trajectory)}; give art.Trajectory")
        # Those that were read from a file say where, and errors name it.
        where = str(trajectory.metadata.get("row", f"trajectory {number}"))
        for history in trajectory.histories():
            messages: list[Any] = list(history.messages())
            check_conversation(messages, where)
            try:
                turns = _turns(engine, messages, history.tools, where)
            except RequestError as error:
                raise DataError(f"{where}: {error}") from None
            if last:
                turns = turns[-1:]
            sample = sample_of(turns, trajectory_id=len(samples), group_id=len(samples))
            if len(sample) > context:
                raise SampleTooLongError(
                    f"{where} has {len(sample)} tokens, but the model's context is {context}: "
                    "shorten it, or leave it out"
                )
            samples.append(sample)
    if not samples:
        raise DataError("train_sft got no trajectories: give at least one")
    return samples


def _turns(engine: Engine, messages: list[Any], tools: Any, where: str) -> list[Turn]:
    """Each answer as the engine would have been asked for it, and would have sampled it."""
    chat = engine.chat
    whole = chat.render(messages, tools=tools, ask=False)
    turns: list[Turn] = []
    ids: list[int] = []
    done = 0  # characters of `whole` that are in `ids`
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = chat.render(messages[:number], tools=tools) if number else ""
        said = chat.render(messages[: number + 1], tools=tools, ask=False)
        if not (said.startswith(asked) and whole.startswith(said) and done <= len(asked)):
            return _marked(chat, messages, tools, f"{where}, message {number}")
        answer = said[len(asked) :]
        ends = [place + len(end) for end in chat.ends if (place := answer.rfind(end)) >= 0]
        answer = answer[: max(ends, default=len(answer))]  # what follows is never sampled
        between = whole[done : len(asked)]
        ids += encoded_after(engine, between) if done else engine.tokenizer.encode(between)
        turns.append(_turn(ids, encoded_after(engine, answer)))
        ids, done = [*ids, *turns[-1].tokens], len(asked) + len(answer)
    return turns


def _marked(chat: ChatFormat, messages: list[Any], tools: Any, where: str) -> list[Turn]:
    """The answers by the template's own marks."""
    marked = chat.marked_tokens(messages, tools=tools)
    if marked is None:
        raise DataError(
            f"{where}: the chat template of {chat.source} writes this answer, or what stands "
            "before it, otherwise once more turns follow (some leave earlier reasoning out), so "
            "the text that the model would have seen is not known: give each answer a row of its "
            "own, or a template with {% generation %} marks"
        )
    turns, place = [], 0
    for answer, group in groupby(zip(*marked, strict=True), key=lambda pair: pair[1]):
        size = len(list(group))
        if answer:
            turns.append(_turn(marked[0][:place], marked[0][place : place + size]))
        place += size
    if not turns:
        raise DataError(f"{where}: the marks of the chat template name no token of an answer")
    return turns


def _turn(prompt: list[int], tokens: list[int]) -> Turn:
    return Turn(prompt, tokens, [0.0] * len(tokens))
