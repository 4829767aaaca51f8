"""From a spec to cells: keys, labels, pairing, refusals and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo.core.errors import ConfigError
from gspo.experiment import spec as spec_module
from gspo.lab.compare import CompareSpec, read_compare_spec
from gspo.lab.compare_cells import Cell, make_cells
from gspo.tasks.dataset import load_dataset

STUDY = Path(__file__).parents[2] / "docs" / "study"


def grid(**fields: Any) -> CompareSpec:
    base = {"task": "sort", "steps": 3}
    return CompareSpec(**{"base": base, "presets": ["gspo", "grpo"], "seeds": 2, **fields})


def only(cells: list[Cell], **wanted: Any) -> Cell:
    found = [c for c in cells if all(getattr(c, k) == v for k, v in wanted.items())]
    assert len(found) == 1
    return found[0]


def test_presets_stressors_and_seeds_are_crossed():
    cells = make_cells(grid(stress={"learning_rate": [1e-4, 1e-3], "minibatches": [2, 4, 8]}))
    assert len(cells) == len({cell.id for cell in cells}) == 2 * 2 * 3 * 2
    assert len({cell.spec.name for cell in cells if cell.spec}) == len(cells)
    stress = {"learning_rate": 1e-3, "minibatches": 8}
    cell = only(cells, arm="grpo", stress=stress, seed=1)
    assert cell.id == "grpo learning_rate=0.001 minibatches=8 seed=1"
    assert cell.spec is not None
    assert (cell.spec.train.algorithm, cell.spec.train.minibatches) == ("grpo", 8)
    assert (cell.spec.learning_rate, cell.spec.steps, cell.spec.load.threads) == (1e-3, 3, 1)


def test_a_stressor_can_switch_gradient_clipping_off():
    cells = make_cells(grid(stress={"max_grad_norm": [1.0, "off"]}, seeds=1))
    limits = [cell.spec.train.max_grad_norm for cell in cells if cell.spec]
    assert limits == [1.0, 1.0, None, None]
    assert cells[2].stress == {"max_grad_norm": "off"}
    assert len({cell.spec.name for cell in cells if cell.spec}) == 4


def test_a_seed_decides_prompts_and_order_alike_in_every_arm():
    for cell in make_cells(grid(seeds=[3, 5])):
        assert cell.spec is not None
        assert cell.spec.seed == cell.spec.train.seed == cell.seed
        assert cell.spec.model == "embedded:sort"


def test_tables_set_several_keys_under_a_label():
    levels = [{"label": "short", "task_options": {"length": 9}}, {"temperature": 0.5}]
    cells = make_cells(grid(base={"task": "chain"}, stress={"kind": levels}, seeds=1))
    assert [cell.stress["kind"] for cell in cells[::2]] == ["short", "temperature=0.5"]
    first = cells[0].spec
    assert first is not None and first.task_options == {"length": 9}


def test_arms_have_keys_of_their_own_and_factors_scale_them():
    arms = [
        {"label": "slow", "algorithm": "gspo", "learning_rate": 1e-4},
        {"label": "fast", "algorithm": "grpo", "learning_rate": 1e-3},
    ]
    compare = grid(presets=[], arms=arms, stress={"learning_rate": ["*0.5", "*2"]}, seeds=1)
    rates = {cell.id: cell.spec.learning_rate for cell in make_cells(compare) if cell.spec}
    assert rates == {
        "slow learning_rate=*0.5 seed=0": 5e-5,
        "fast learning_rate=*0.5 seed=0": 5e-4,
        "slow learning_rate=*2 seed=0": 2e-4,
        "fast learning_rate=*2 seed=0": 2e-3,
    }


def test_what_a_preset_refuses_is_told_before_anything_runs():
    arms = [{"label": "auto", "algorithm": "gspo"}, {"label": "plain", "algorithm": "grpo"}]
    levels = [{"label": "auto", "epsilon": "auto"}, {"label": "fixed"}]
    cells = make_cells(grid(presets=[], arms=arms, stress={"range": levels}))
    refused = [cell for cell in cells if cell.status == "refused"]
    assert [cell.id for cell in refused] == [
        "plain range=auto seed=0",
        "plain range=auto seed=1",
    ]
    assert "use algorithm='gspo'" in (refused[0].error or "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presets": ["gsop"]}, "Did you mean 'gspo'"),
        ({"presets": []}, "nothing to compare"),
        ({"preset": ["gspo"]}, "Did you mean 'presets'"),
        ({"base": {"task": "sort", "stpes": 3}}, "base: unknown key 'stpes'. Did you mean 'steps'"),
        ({"base": {"task": "srot", "model": "embedded:sort"}}, "Did you mean 'sort'"),
        ({"base": {"task": "sort", "train": {"epsilonn": 1}}}, "Did you mean 'epsilon'"),
        ({"base": {"task": "sort", "train.epsilonn": 1}}, "Did you mean 'epsilon'"),
        ({"arms": [{"label": "x", "train": {"epsilonn": 1}}]}, "arm 'x'.*Did you mean 'epsilon'"),
        ({"presets": ["gspo", "gspo"]}, "arm: the same value or label twice"),
        ({"base": {"task": "sort", "trian.epochs": 1}}, "Did you mean 'train'"),
        ({"base": {"task": "sort", "seed": 1}}, "base: 'seed' is not free here: give seeds"),
        ({"base": {"task": "sort", "eval_prompts": 0}}, "held-out reward"),
        ({"stress": {"minibatchs": [1]}}, "Did you mean 'minibatches'"),
        ({"stress": {"beta": [1]}}, "use kl_penalty_coef"),
        ({"stress": {"path": ["x"]}}, "a folder of its own|comparison's path"),
        ({"stress": {"steps": []}}, "at least 1 item"),
        ({"stress": {"steps": [4, 4]}}, "stress steps: the same value or label twice"),
        ({"stress": {"rollout_dtype": ["int4", "int3"]}}, "'int3' is refused in every cell"),
        ({"stress": {"steps": ["*x"]}}, "refused in every cell"),
        ({"stress": {"kl_penalty_coef": ["*2"]}}, "no number to multiply"),
        ({"stress": {"a": [{"steps": 2}], "b": [{"steps": 3}]}}, "both set steps"),
        ({"seeds": 0}, "at least one seed"),
        ({"seeds": [1, 1]}, "given twice"),
        ({"name": "a/b"}, "name = 'a/b': must name a folder"),
        ({"name": "cells"}, "name = 'cells': .*another"),
        ({"baseline": "gsop"}, "Did you mean 'gspo'"),
        ({"arms": [{"algorithm": "dapo"}]}, "give it a label"),
        ({"arms": [{"label": "gspo"}]}, "arm: the same value or label twice"),
        (
            {"arms": [{"label": "x", "steps": 2}], "stress": {"steps": [4]}},
            "arm 'x' sets steps, which the stress 'steps' sets too",
        ),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_cells(grid(**fields))


def test_the_same_run_has_the_same_folder_in_every_comparison():
    first = make_cells(grid(name="one", stress={"minibatches": [4, 8]}))
    arms = [{"label": "another name", "algorithm": "grpo"}]
    second = make_cells(grid(name="two", presets=[], arms=arms, seeds=1))
    names = {cell.spec.name for cell in first if cell.spec}
    assert {cell.spec.name for cell in second if cell.spec} < names
    longer = make_cells(grid(base={"task": "sort", "steps": 4}))
    assert not names & {cell.spec.name for cell in longer if cell.spec}


def test_files_overrides_and_their_mistakes(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('presets = ["gspo"]\n[base]\ntask = "sort"\ntrain.epochs = 2\n')
    compare = read_compare_spec(path, ["seeds=1", "base.train.epochs=3", "stress.steps=[2, 3]"])
    assert (compare.name, compare.seeds) == ("mine", (0,))
    cells = make_cells(compare)
    assert [cell.spec.train.epochs for cell in cells if cell.spec] == [3, 3]
    assert [cell.spec.steps for cell in cells if cell.spec] == [2, 3]
    assert read_compare_spec(None, ["seeds=3"]).seeds == (0, 1, 2)
    assert read_compare_spec(None).seeds == (0, 1)
    with pytest.raises(ConfigError, match="Did you mean 'seeds'"):
        read_compare_spec(path, ["sedes=1"])
    with pytest.raises(ConfigError, match="cannot read"):
        read_compare_spec(tmp_path / "none.toml")
    path.write_text("presets = [")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_compare_spec(path)


def test_cells_come_seed_by_seed():
    cells = make_cells(grid(stress={"steps": [2, 3]}))
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4
    assert [(cell.arm, cell.stress) for cell in cells[:4]] == [
        ("gspo", {"steps": 2}),
        ("grpo", {"steps": 2}),
        ("gspo", {"steps": 3}),
        ("grpo", {"steps": 3}),
    ]


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.toml")), ids=lambda path: path.stem)
def test_the_study_is_whole(path: Path):
    cells = make_cells(read_compare_spec(path))
    assert len({cell.seed for cell in cells}) >= 5
    assert not [cell.error for cell in cells if cell.error]


def test_other_rows_of_a_dataset_are_other_cells(tmp_path: Path):
    (tmp_path / "scores.py").write_text("def same(completion, row):\n    return 0\n")
    path, data = tmp_path / "own.toml", tmp_path / "data.csv"
    base = '[base]\nmodel = "embedded:sort"\ndataset = "data.csv"\nreward = "scores:same"\n'
    more = "prompts = 4\nmax_tokens = 3\n[base.data]\nepochs = 2\nheldout = 0.2\n"
    path.write_text(f'presets = ["gspo"]\nseeds = 1\n{base}{more}')

    def named() -> str:
        (cell,) = make_cells(read_compare_spec(path))
        assert cell.spec is not None and cell.spec.steps == 4  # 8 rows, twice
        return cell.spec.name

    data.write_text("prompt\n" + "".join(f"{n}\n" for n in range(10)))
    first = named()
    assert first == named() and first.startswith("data-gspo-seed0-")
    data.write_text("prompt\n" + "".join(f"{n}\n" for n in range(1, 11)))
    assert named() != first


def test_the_rows_are_read_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scores.py").write_text("def same(completion, row):\n    return 0\n")
    (tmp_path / "data.csv").write_text("prompt\n" + "".join(f"{n}\n" for n in range(10)))
    path, read = tmp_path / "own.toml", []
    path.write_text(
        'presets = ["gspo", "grpo"]\nseeds = 3\n[stress]\nlearning_rate = [1e-4, 1e-3]\n[base]\n'
        'model = "embedded:sort"\ndataset = "data.csv"\nreward = "scores:same"\n'
    )

    def counted(*arguments: Any):
        read.append(arguments[0])
        return load_dataset(*arguments)

    monkeypatch.setattr(spec_module, "load_dataset", counted)
    cells = make_cells(read_compare_spec(path))
    assert len(cells) == 12 and read == [str(tmp_path / "data.csv")]
    assert len({cell.spec.name for cell in cells if cell.spec}) == 12
