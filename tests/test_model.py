"""`Model` and `TrainableModel`: what they take, and what they say of what they don't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

import gspo as art
from gspo.core.errors import ConfigError, DataError


class Settings(BaseModel):
    turns: int


def make(**options: Any) -> art.TrainableModel:
    return art.TrainableModel(name="m", project="p", base_model="embedded:sort", **options)


async def test_the_internal_config_may_be_set_until_the_model_is_registered():
    model = make()
    model._internal_config = art.dev.InternalModelConfig(max_context=64)
    assert model.internal_config.max_context == 64
    model._internal_config = {"max_context": 32}  # pyright: ignore[reportAttributeAccessIssue]
    assert model._internal_config.max_context == 32
    assert make(_internal_config={"max_context": 16}).internal_config.max_context == 16
    with pytest.raises(ConfigError, match=r"_internal_config is 5 .*InternalModelConfig"):
        model._internal_config = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="Did you mean 'max_context'"):
        model._internal_config = {"max_contxt": 32}  # pyright: ignore[reportAttributeAccessIssue]
    async with art.FakeBackend() as backend:
        await model.register(backend)
        with pytest.raises(ConfigError, match="set _internal_config before register"):
            model._internal_config = art.dev.InternalModelConfig()
    assert model.internal_config.max_context == 32


def test_the_users_config_is_a_model_or_a_dict():
    for kind in (art.Model, art.TrainableModel):
        more: dict[str, Any] = {"base_model": "embedded:sort"} if kind is art.TrainableModel else {}
        assert kind(name="m", project="p", config={"a": 1}, **more).config == {"a": 1}
        settings = Settings(turns=2)
        assert kind(name="m", project="p", config=settings, **more).config is settings
        assert kind(name="m", project="p", **more).config is None
    named = art.TrainableModel[Settings](
        name="m",
        project="p",
        base_model="embedded:sort",
        config={"turns": 3},  # pyright: ignore[reportArgumentType]
    )
    assert named.config == Settings(turns=3)

    @dataclass
    class Other:
        a: int = 1

    for other in (Other(), "x", 5):
        with pytest.raises(ConfigError, match="config = "):
            make(config=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_name": "x"}, "'run_name' is not supported: .*name="),
        ({"report_metrics": ["wandb"]}, r"LocalBackend\(logger="),
        ({"base_path": "x"}, r"LocalBackend\(path="),
        ({"entity": "x"}, "WANDB_ENTITY"),
        ({"projct": "x"}, "Did you mean 'project'"),
    ],
)
def test_arguments_of_arts_models_are_told_where_they_are(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_an_argument_that_is_missing_or_of_another_type_is_named():
    with pytest.raises(ConfigError, match=r"TrainableModel: give base_model=\.\.\."):
        art.TrainableModel(name="m", project="p")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="Model: name = 5: Input should be a valid string"):
        art.Model(name=5, project="p")  # pyright: ignore[reportArgumentType]


def test_a_model_that_is_only_asked_says_what_trains():
    with pytest.raises(AttributeError, match=r"no 'train': .*art\.TrainableModel"):
        _ = art.Model(name="m", project="p").train  # pyright: ignore[reportAttributeAccessIssue]


async def test_calls_with_arts_other_arguments_say_why_not():
    model = make()
    async with art.FakeBackend() as backend:
        with pytest.raises(ConfigError, match=r"'_openai_client_config' is not .*max_context="):
            await model.register(backend, _openai_client_config={})  # pyright: ignore[reportCallIssue]
        with pytest.raises(ConfigError, match="unknown argument 'openai_client_config'"):
            await model.register(backend, openai_client_config={})  # pyright: ignore[reportCallIssue]
        for nothing in (None, art.LocalBackend):
            with pytest.raises(ConfigError, match="give a backend"):
                await model.register(nothing)  # pyright: ignore[reportArgumentType]
        await model.register(backend)
        for name, message in (
            ("loss_fn", "algorithm="),
            ("verbose", r"model\.train\(groups, verbose=True\)"),
        ):
            options: dict[str, Any] = {name: True}
            with pytest.raises(ConfigError, match=f"'{name}' is not supported: .*{message}"):
                await backend.train(model, [], **options)
        for wrong in (5, art.dev.TrainConfig()):
            with pytest.raises(ConfigError, match=r"config is .*give a TrainConfig"):
                await backend.train(model, [], wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match=r"_config is .*give a dev\.TrainConfig"):
            await backend.train(model, [], _config=art.TrainConfig())  # pyright: ignore[reportArgumentType]


async def test_metrics_can_be_logged_alone():
    model = make()
    async with art.FakeBackend() as backend:
        await model.register(backend)
        await model.log(metrics={"x": 1.0})
        with pytest.raises(DataError, match=r"metrics\['x'\] is None"):
            await model.log(metrics={"x": None})  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match=r"log: give metrics by name, as metrics=\{'x': 1.0\}"):
            await model.log({"x": 1.0})  # pyright: ignore[reportArgumentType]


async def test_a_prompted_model_has_no_steps_and_a_dump_no_config():
    model = art.Model(name="m", project="p", config={"anything": object})
    assert await model.get_step() == 0
    assert model.safe_model_dump()["config"] is None
    assert model.get_inference_name() == "m"
    async with art.FakeBackend() as backend:
        await model.register(backend)
        await model.log(None, metrics={"a": 1.0})
        with pytest.raises(ConfigError, match="a batch is what one call of train is given"):
            art.TrainConfig(batch_size=4)  # pyright: ignore[reportCallIssue]


async def test_what_was_collected_is_kept_if_it_could_not_be_logged():
    model = art.Model(name="m", project="p")
    async with art.FakeBackend() as backend:
        await model.register(backend)
        model.metrics_builder().add_metric("data/tools", 2)
        with pytest.raises(DataError):
            await model.log(metrics={"bad": "x"})  # pyright: ignore[reportArgumentType]
        assert model.metrics_builder().take() == {"data/tools": 2.0}
