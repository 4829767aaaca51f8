"""Episodes: what one run of an agent asked and was answered, recorded where it was sampled.

A request belongs to an episode if its URL says so, `/episodes/<id>/v1/...`, or if it was made in
this process inside `art.trajectory()`. A handler asks `current(app)`, hands `episode.memory` to
`chat_tokens`, and calls `episode.record` for each choice, before the last bytes of the
answer are sent: a client that has read its answer finds it recorded.

Their routes are in `gspo.serve.episode_routes`.
"""

from __future__ import annotations

import copy
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, TypeVar

import fastapi
from openai.types.chat.chat_completion import Choice

from gspo.core.choices import as_choice
from gspo.core.draws import Word
from gspo.core.errors import BusyError, ConfigError, RequestError
from gspo.core.log import log
from gspo.core.variables import holding
from gspo.serve.histories import Conversations
from gspo.serve.refusals import Refusal
from gspo.serve.verbatim import TokenMemory
from gspo.trajectories import History, Trajectory

AnyHistory = TypeVar("AnyHistory", History, Trajectory)

MOST_EPISODES = 4096
MOST_TOKENS = 2**25
"""Tokens of the prompts and answers that all episodes of a server have recorded together."""
IDLE_SECONDS = 6 * 3600
"""How long an episode that nobody asks for is kept."""
_BLOCK = "block-"
"""Begins the ids of episodes that `art.trajectory()` made: no request makes one."""


class Episode:
    """One run of an agent. Its methods may be called from any thread.

    Args:
        trajectory: what the calls are recorded in; None: a new one.
        id: names it in URLs; None: a random one.
        purpose: what its draws are for, see `gspo.core.draws.purpose`; None: its id.

    Attributes:
        memory: for `chat_tokens`; empty once the episode has ended.
        server: the one server whose answers are recorded: the first that is asked. What another
            model says inside the block is none of this model's samples.
        ended: nothing more is recorded.
        used: when it was last asked for, by the monotonic clock.
        tokens: of all prompts and answers recorded.
    """

    def __init__(
        self,
        trajectory: Trajectory | None = None,
        *,
        id: str | None = None,
        purpose: tuple[Word, ...] | None = None,
    ):
        self.id = _BLOCK + uuid.uuid4().hex if id is None else id
        self.trajectory = Trajectory() if trajectory is None else trajectory
        self.purpose = ("episode", self.id) if purpose is None else purpose
        self.memory = TokenMemory()
        self.server: Episodes | None = None
        self.ended = False
        self.tokens, self.used = 0, 0.0
        self._conversations = Conversations(self.trajectory)
        self._lock = threading.Lock()

    def record(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        choice: Mapping[str, Any],
    ) -> None:
        """Record a choice of a chat's answer. If there are several (`n`), call it for each.

        Args:
            messages: what was asked, as a chat.
            tools: what the request offered.
            choice: as in an answer that is not streamed, with gspo's fields.
        """
        asked = [copy.deepcopy(dict(message)) for message in messages]
        offered = [copy.deepcopy(dict(tool)) for tool in tools or ()] or None
        with self._lock:
            if self._takes(choice):
                self._conversations.add(asked, offered, _choice_of(choice))

    def record_text(self, prompt: str, choice: Mapping[str, Any]) -> None:
        """Record a choice of a text completion's answer."""
        with self._lock:
            if self._takes(choice):
                self._conversations.add_text(prompt, _choice_of(choice))

    def belongs_to(self, server: Episodes) -> bool:
        """Whether the answers of this server are recorded."""
        with self._lock:
            self.server = self.server or server
            return self.server is server

    def so_far(self) -> Trajectory:
        """What is recorded by now; later calls leave it as it is."""
        with self._lock:
            t = self.trajectory
            further = [_copied(history) for history in t.additional_histories]
            return _copied(t).model_copy(update={"additional_histories": further})

    def end(self) -> None:
        """Record nothing more, and let go of what recording needed."""
        with self._lock:
            self.ended, self.memory = True, TokenMemory()
            self._conversations = Conversations(Trajectory())
        if self.server is not None:
            self.server.drop(self.id)

    def _takes(self, choice: Mapping[str, Any]) -> bool:
        """Count the choice's tokens; False if it comes too late."""
        if self.ended:
            log.warning("art.trajectory() had ended when a call inside it was answered: not kept")
            return False
        self.tokens += len(choice["prompt_token_ids"]) + len(choice["token_ids"])
        return True


def _copied(history: AnyHistory) -> AnyHistory:
    return history.model_copy(update={"messages_and_choices": [*history.messages_and_choices]})


def _choice_of(fields: Mapping[str, Any]) -> Choice:
    choice = as_choice(fields)
    assert choice is not None, "a choice has a message or a text"
    return choice


_current: ContextVar[Episode | None] = ContextVar("gspo_episode", default=None)


def current(app: fastapi.FastAPI) -> Episode | None:
    """The episode that a request to this app belongs to, or None. To be called by its handler."""
    episode, server = _current.get(), app.state.episodes
    return episode if episode is not None and episode.belongs_to(server) else None


def current_episode() -> Episode | None:
    """The episode that the code that asks is in, or None."""
    return _current.get()


def recording(episode: Episode | None) -> AbstractContextManager[Any]:
    """Record the calls that are made inside the block, in this process; None: record none."""
    return holding(_current, episode)


class Episodes:
    """The episodes of one server, by id."""

    def __init__(self) -> None:
        self._episodes: dict[str, Episode] = {}
        self._lock = threading.Lock()

    def find(self, id: str) -> Episode:
        """The episode of this id.

        Raises:
            Refusal: it never was, was dropped, or was idle for too long (HTTP 404).
        """
        with self._lock:
            self._forget_idle()
            if (episode := self._episodes.get(id)) is None:
                raise Refusal(
                    404,
                    f"there is no episode {id!r} here: it made no request yet, was deleted, or was "
                    f"not asked for in {IDLE_SECONDS // 3600} hours",
                    "not_found",
                    "episode",
                )
            return self._put(episode)

    def open(self, id: str) -> Episode:
        """The episode of this id, a new one if there is none.

        Raises:
            BusyError: there are too many, or they have recorded too much.
            RequestError: it belonged to a block of `art.trajectory()`, which has ended.
        """
        with self._lock:
            self._forget_idle()
            tokens = sum(episode.tokens for episode in self._episodes.values())
            if tokens > MOST_TOKENS or (
                id not in self._episodes and len(self._episodes) >= MOST_EPISODES
            ):
                raise BusyError(
                    f"this server holds {len(self._episodes)} episodes with {tokens} tokens, of at "
                    f"most {MOST_EPISODES} with {MOST_TOKENS}: DELETE /episodes/<id> those that "
                    "you have read"
                )
            if id in self._episodes:
                return self._put(self._episodes[id])
            if id.startswith(_BLOCK):
                message = f"the art.trajectory() block of the episode {id!r} has ended"
                raise RequestError(message, param="episode")
            return self._put(Episode(id=id))

    def add(self, episode: Episode) -> None:
        """Let requests come to an episode that was made in this process.

        Raises:
            ConfigError: it records another server.
        """
        if not episode.belongs_to(self):
            raise ConfigError("this art.trajectory() records another model: give each its own")
        with self._lock:
            self._put(episode)

    def drop(self, id: str) -> None:
        """Forget an episode, if it is there."""
        with self._lock:
            self._episodes.pop(id, None)

    def _put(self, episode: Episode) -> Episode:
        episode.used = time.monotonic()
        self._episodes[episode.id] = episode
        return episode

    def _forget_idle(self) -> None:
        limit = time.monotonic() - IDLE_SECONDS
        self._episodes = {id: e for id, e in self._episodes.items() if e.used >= limit}
