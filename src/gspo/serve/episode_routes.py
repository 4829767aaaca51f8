"""The routes of episodes: the API below `/episodes/<id>/v1`, and the episode itself.

`GET /episodes/<id>` reads an episode (a trajectory as JSON, its choices with token ids),
`POST /episodes/<id>/reward` gives it a reward, and `DELETE /episodes/<id>` drops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import fastapi
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from gspo.core.draws import drawing_for
from gspo.core.errors import RequestError
from gspo.serve.episodes import Episodes, recording
from gspo.serve.refusals import DOCUMENTED

Id = Annotated[
    str,
    fastapi.Path(
        alias="episode",
        pattern=r"^[A-Za-z0-9._~-]{1,128}$",
        description="Names the episode; chosen by the client, made at the first use.",
    ),
]
Reward = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
router = fastapi.APIRouter(tags=["episodes"], responses=DOCUMENTED)


def include_episodes(app: fastapi.FastAPI, v1: fastapi.APIRouter) -> None:
    """Add the routes of episodes to a server.

    Args:
        app: the server. Its `state.episodes` are the server's `Episodes`.
        v1: routes of OpenAI's API without the `/v1` before them: they answer below
            `/episodes/<id>/v1` too.
    """
    app.state.episodes = Episodes()
    app.include_router(router)
    inside = [fastapi.Depends(_inside)]
    app.include_router(v1, prefix="/episodes/{episode}/v1", dependencies=inside)


async def _inside(http: fastapi.Request, id: Id) -> AsyncIterator[None]:
    """Make the URL's episode the current one while a request is answered."""
    episode = http.app.state.episodes.open(id)
    with recording(episode), drawing_for(*episode.purpose):
        yield


class RewardBody(BaseModel):
    """POST /episodes/<id>/reward."""

    model_config = ConfigDict(extra="forbid", strict=True)
    reward: Reward
    turn_rewards: Annotated[list[Reward], Field(fail_fast=True)] | None = None


@router.get("/episodes/{episode}")
async def read_episode(http: fastapi.Request, id: Id) -> Response:
    episode = http.app.state.episodes.find(id)
    text = await asyncio.to_thread(episode.so_far().model_dump_json)  # which may take a while
    return Response(text, media_type="application/json")


@router.post("/episodes/{episode}/reward")
async def reward_episode(http: fastapi.Request, id: Id, body: RewardBody) -> dict[str, Any]:
    trajectory, given = http.app.state.episodes.find(id).trajectory, body.turn_rewards
    if given is not None and len(given) != (turns := len(trajectory.sampled_turns())):
        message = f"turn_rewards has {len(given)} numbers, but episode {id!r} has {turns} turns"
        raise RequestError(message, "turn_rewards")
    trajectory.reward, trajectory.turn_rewards = body.reward, given
    return body.model_dump(exclude_none=True)


@router.delete("/episodes/{episode}")
async def drop_episode(http: fastapi.Request, id: Id) -> dict[str, bool]:
    episodes = http.app.state.episodes
    episodes.drop(episodes.find(id).id)
    return {"deleted": True}
