"""The backend of users' tests checks what the real one checks."""

from __future__ import annotations

import pytest

import gspo as art
from gspo.core.errors import ConfigError, DataError
from support import trajectory


async def test_it_answers_counts_steps_and_remembers():
    model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
    groups = [art.TrajectoryGroup([trajectory(0.0), trajectory(1.0)])]
    async with art.FakeBackend(lambda prompt, index: str(index)) as backend:
        await model.register(backend)
        answer = await model.openai_client().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "?"}], n=2
        )
        assert [choice.message.content for choice in answer.choices] == ["0", "1"]
        assert (await model.train(groups)).metrics == {"train/reward": 0.5}
        assert await model.get_step() == backend.engine.policy_version == 1
        await model.log(groups, split="val", metrics={"a": 1.0})
    assert (backend.trained, backend.logged) == ([groups], [("val", groups)])


async def test_it_refuses_what_the_real_one_refuses():
    model = art.TrainableModel(name="m", project="p", base_model="embedded:sort")
    async with art.FakeBackend() as backend:
        await model.register(backend)
        with pytest.raises(DataError, match="empty list"):
            await model.train([])
        with pytest.raises(ConfigError, match="Did you mean 'epsilon_high'"):
            await backend.train(model, [], epsilon_hig=0.2)
        with pytest.raises(ConfigError, match=r"split = '\.\./x'"):
            await model.log([], split="../x")
    assert backend.trained == []
