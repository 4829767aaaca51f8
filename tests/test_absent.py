"""What ART has and gspo has not says why."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from gspo import absent, dev
from gspo.config import TrainConfig, TrainSFTConfig
from gspo.core.options import title_of
from gspo.dev import InternalModelConfig
from gspo.experiment.spec import Spec
from gspo.mcp import generate_scenarios
from gspo.utils import iterate_dataset
from gspo.utils.sft import train_sft_from_file


@pytest.mark.parametrize("name", absent.REASONS["modules"])
def test_modules(name: str):
    with pytest.raises(ModuleNotFoundError, match=rf"gspo has no module '{name}': \w+"):
        importlib.import_module(f"gspo.{name}")


def test_a_module_that_is_there_is_found_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(absent.REASONS["modules"], "core.draws", "it is there.")
    monkeypatch.delitem(sys.modules, "gspo.core.draws")
    importlib.import_module("gspo.core.draws")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'gspo\.nothing'$"):
        importlib.import_module("gspo.nothing")


def test_attributes(tmp_path: Path):
    model = art.Model(name="m", project="p")
    owners = (art, "gspo"), (art.dev, "gspo.dev"), (model, "a model")
    for owner, lacks in (*owners, (art.LocalBackend(tmp_path), "a backend")):
        for name, reason in absent.REASONS[lacks].items():
            with pytest.raises(AttributeError) as caught:
                getattr(owner, name)
            assert reason in str(caught.value)
            assert not hasattr(owner, name)
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            getattr(owner, "nothing_of_this_name")  # noqa: B009


@pytest.mark.parametrize(
    ("function", "title"),
    [
        (art.LocalBackend, "LocalBackend"),
        (art.LocalBackend.fork_checkpoint, "fork_checkpoint"),
        (art.Model.register, "register"),
        (art.rewards.ruler, "ruler"),
        (art.rewards.ruler_score_group, "ruler_score_group"),
        (generate_scenarios, "generate_scenarios"),
        (iterate_dataset, "iterate_dataset"),
        (train_sft_from_file, "train_sft_from_file"),
    ],
)
def test_arguments(function: Any, title: str):
    for name, reason in absent.REASONS[title].items():
        with pytest.raises(art.errors.ConfigError) as caught:
            function(**{name: 1})
        assert str(caught.value) == f"{title}: {name!r} is not supported: {reason}"
    with pytest.raises(art.errors.ConfigError, match=f"^{title}: unknown argument 'nothing'"):
        function(nothing=1)


def test_each_table_has_a_user():
    """None is left behind when what it is of is renamed."""
    kinds = TrainConfig, TrainSFTConfig, art.Model, dev.TrainConfig, InternalModelConfig
    options = {title_of(kind) for kind in kinds}
    functions = {"LocalBackend", "fork_checkpoint", "register", "ruler", "ruler_score_group"}
    functions |= {"generate_scenarios", "iterate_dataset", "train_sft_from_file", "train"}
    names = {"modules", "gspo", "gspo.dev", "a model", "a backend", "other trainers"}
    assert set(absent.REASONS) == options | functions | names


OTHERS = absent.REASONS["other trainers"]
HERE = {*Spec.model_fields, *TrainConfig.model_fields, *dev.TrainConfig.model_fields}
HERE |= set(InternalModelConfig.model_fields)


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_trainers(name: str):
    """Wherever they are given, and what they lead to is there."""
    options: Any
    for options in (Spec, TrainConfig, dev.TrainConfig, InternalModelConfig, art.TrainableModel):
        if name in options.model_fields:
            continue
        with pytest.raises(art.errors.ConfigError) as caught:
            options(**{name: 1})
        assert OTHERS[name] in str(caught.value) or name in absent.REASONS[title_of(options)]
    assert set(re.findall(r"\buse (\w+)", OTHERS[name])) <= HERE | {"base_model"}


def test_each_name_in_the_docs_leads_to_the_option_beside_it():
    page = (Path(__file__).parents[1] / "docs/coming-from.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    seen = 0
    for theirs, ours in ((row[1], row[2]) for row in rows if len(row) == 5):
        words = set(re.findall(r"`(?:\w+\.)?(\w+)(?: = [^`]*)?`", re.sub(r"\[.*?\]", "", ours)))
        for name in re.findall(r"`-*([\w.]+)", re.sub(r"\[.*?\]", "", theirs)):
            parts = [part for part in name.split(".") if part]
            if not parts or parts[-1] in HERE:
                continue
            told = " ".join(OTHERS[part] for part in parts[1:] or parts if part in OTHERS)
            assert told, name
            assert not words or words & set(re.findall(r"\w+", told)), (name, told)
            seen += 1
    assert seen > 60
