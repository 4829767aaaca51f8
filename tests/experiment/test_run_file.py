from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.core.errors import ConfigError
from gspo.experiment.run_file import flat, put, read_spec
from gspo.experiment.spec import Spec


def test_toml_with_overrides(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('task = "sort"\nsteps = 5\n[train]\nminibatches = 2\n')
    spec = read_spec(path, ["steps=7", "train.epsilon=0.01", "load.dtype=bfloat16", "name=x"])
    assert (spec.steps, spec.name, spec.model) == (7, "x", "embedded:sort")
    assert (spec.train.minibatches, spec.train.epsilon) == (2, 0.01)
    assert spec.load.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("task = 'sort'\nstep = 5", [], "Did you mean 'steps'"),
        ("task = 'sort'\n[train]\nepsilonn = 5", [], "Did you mean 'epsilon'"),
        ("task = 'sort'", ["stps=3"], "Did you mean 'steps'"),
        ("task = 'sort'", ["steps"], "write key=value"),
        ("task = 'sort'", ["algorithm=grpo"], "Did you mean 'train.algorithm'"),
        ("task = 'sort'", ["train.learning_rate=1"], "Did you mean 'learning_rate'"),
        ("task = 'sort'", ["train.dtype=bfloat16"], "Did you mean 'load.dtype'"),
        ("task = 'sort'", ["train.beta=1"], "use kl_penalty_coef"),
        ("task = 'sort'", ["steps=0"], "steps = 0"),
        ("task = ", [], "is not TOML"),
        ("steps = 1", [], "give a task"),
        ("rollout = 'a:b'", [], "give a model"),
        ("task = 'sort'\nrollout_timeout = 3", [], "rollout_timeout limits a rollout function"),
        ("rollout = 'a:b'\nmodel = 'embedded:sort'\nrollout_timeout = 0", [], "rollout_timeout"),
        ("rollout = 'a:b'\nmodel = 'embedded:sort'\nmax_tokens = 3", [], "rollout function"),
        ("rollout = 'a:b'\nmodel = 'embedded:sort'\n[task_options]\na = 1", [], "but no task"),
        ("task = 'sort'\ndynamic_sampling = true\n[train]\nalgorithm = 'reinforce'", [], "learns"),
        ("task = 'reasoning-gym:gcd'", [], "give a model"),
        ("task = 'sort'\nlearning_rate = -1", [], "learning_rate = -1"),
        ("task = 'sort'\ntrain.max_grad_norm = 'none'", [], "'off' for no gradient clipping"),
        ("task = 'sort'\ntrain.max_grad_norm = 0", [], "max_grad_norm = 0"),
        ("task = 'sort'\nlearning_rate = 3.0", [], "learning_rate = 3.0: .* equal to 1"),
        ("task = 'sort'", ["steps=1_000_000_000_000"], "steps = 10*: .* equal to 1000000000"),
        ("task = 'sort'", ["temperature=nan"], "temperature = nan: .*finite"),
        ("task = 'sort'", ["prompts=true"], "prompts = True: must be a number"),
        ("task = 'sort'", ["load.threads=1000000000"], "threads = 1000000000"),
        ("task = 'sort'", ["load.lora.alpha=inf"], "alpha = inf"),
        ("task = 'sort'\nname = 'a'", ["name.x=1"], "name = {'x': 1}: .*string"),
        ("task = 'sort'", ["steps.x=1"], "steps = {'x': 1}"),
        ("steps = " + "[" * 3000, [], "nested too deeply"),
        ("task = 'sort'", ["steps=" + "[" * 3000], "valid integer"),
        ("", ["num_generations=4"], "'num_generations'. It is not supported: .* completions"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_spec(path, overrides)


@pytest.mark.parametrize("spelling", ['"off"', "inf"])
def test_a_file_can_switch_gradient_clipping_off(tmp_path: Path, spelling: str):
    path = tmp_path / "run.toml"
    path.write_text(f"task = 'sort'\n[train]\nmax_grad_norm = {spelling}\n")
    spec = read_spec(path)
    assert spec.train.max_grad_norm is None
    assert read_spec(path, ["train.max_grad_norm=2"]).train.max_grad_norm == 2
    assert read_spec(path, ["train.max_grad_norm=off"]).train.max_grad_norm is None
    sent = json.dumps(spec.model_dump(mode="json", exclude_unset=True))  # as to a worker
    assert Spec(**json.loads(sent)).train.max_grad_norm is None


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_spec(tmp_path / "none.toml")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"task = 'sort' # \xe9")
    with pytest.raises(ConfigError, match=r"run\.toml is not TOML in UTF-8: .*0xe9 in position 16"):
        read_spec(path)


def test_a_rollout_beside_the_file_comes_before_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "here").mkdir()
    text = "rollout = 'mine:f'\nmodel = 'embedded:sort'"
    (tmp_path / "runs" / "run.toml").write_text(text)
    (tmp_path / "here" / "mine.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert read_spec(Path("../runs/run.toml")).rollout == "mine:f"
    (tmp_path / "runs" / "mine.py").touch()
    assert read_spec(Path("../runs/run.toml")).rollout == "../runs/mine.py:f"


KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.dictionaries(KEYS, st.recursive(st.integers(), lambda s: st.dictionaries(KEYS, s)))


@settings(max_examples=15, deadline=None)
@given(TREES)
def test_a_tree_is_made_again_from_its_dotted_keys(tree: dict):
    made: dict = {}
    for key, value in flat(tree).items():
        made = put(made, key.split("."), value)
    assert made == tree


def test_what_is_no_table_is_replaced_by_one():
    tree = {"a": 1}
    assert put(tree, ["a", "b"], 2) == {"a": {"b": 2}}
    assert tree == {"a": 1}
