"""A comparison read from its file: what is named there is looked for beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo.core.errors import ConfigError
from gspo.lab.compare import read_compare_spec
from gspo.lab.compare_cells import make_cells

FILE = """
seeds = 1
[base]
task = "sort"
eval_prompts = 8
[[arms]]
label = "bare"
algorithm = "objectives:wide"
[[arms]]
label = "dotted"
"train.algorithm" = "objectives:wide"
[[arms]]
label = "table"
[arms.train]
algorithm = "objectives:wide"
[stress]
task = ["sort", "objectives:Mine"]
method = [{algorithm = "objectives:wide", label = "w"}, {steps = 3}]
"""


def test_arms_and_stressors_name_what_lies_beside_the_file(tmp_path: Path) -> None:
    beside = tmp_path / "objectives.py"
    beside.write_text(
        "from gspo.objective import Objective\nwide = Objective('sequence', 0.01, 0.02)\n"
    )
    (tmp_path / "compare.toml").write_text(FILE)
    spec = read_compare_spec(tmp_path / "compare.toml")
    wide = f"{beside}:wide"
    assert [arm.get("algorithm") for arm in spec.arms] == [wide, None, None]
    assert spec.arms[1]["train.algorithm"] == spec.arms[2]["train"]["algorithm"] == wide
    assert spec.stress == {
        # What it is called stays what the file says.
        "task": ["sort", {"task": f"{beside}:Mine", "label": "objectives:Mine"}],
        "method": [{"algorithm": wide, "label": "w"}, {"steps": 3}],
    }


def test_such_an_arm_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "objectives.py").write_text(
        "from gspo.objective import Objective\nwide = Objective('sequence', 0.01, 0.02)\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "compare.toml").write_text(FILE.partition("[stress]")[0])
    cells = make_cells(read_compare_spec(tmp_path / "compare.toml"))
    assert [cell.error for cell in cells] == [None, None, None]


@pytest.mark.parametrize("text", ["base = 3", "arms = 3", "arms = [3]", "stress = {task = 3}"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.toml").write_text(f"{text}\n")
    with pytest.raises(ConfigError):
        read_compare_spec(tmp_path / "compare.toml")
