"""What README.md and the pages of docs/ show is run: programs with their output, TOML, options.

Their commands are run in test_docs_commands.py.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import io
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import gspo
import gspo as art
from gspo.experiment.heldout import Estimate
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import make_plan
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec
from gspo.lab.compare import CompareSpec
from gspo.objective import PRESETS
from gspo.tasks.dataset import Data
from gspo.train.algorithms import BUILT_IN
from gspo.train.defaults import WARMUP, default_learning_rate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

NOT_RUN = {
    # page, number of the fence among the page's Python ones: why
    ("art.md", 0): "the import alone",
    ("art.md", 1): "a line of a program; tests/test_public_api.py runs the whole",
    ("art.md", 2): "part of a program; tests/backend/test_engines.py has a whole one",
    ("sft.md", 0): "part of a program; tests/utils/test_sft.py has a whole one",
    ("art.md", 3): "part of a program; tests/test_metrics_builder.py has a whole one",
    ("multi-turn.md", 3): "a line of a program; tests/test_gather.py has whole ones",
    ("run.md", 0): "reads the run that `make demo` leaves",
    ("run.md", 1): "needs two clients",
    ("run.md", 2): "reads the run that `make demo` leaves",
    ("coming-from.md", 0): "TRL's",
    ("README.md", 1): "a model of the network; tests/experiment/test_whole_run.py runs its like",
    ("own-data.md", 0): "TRL's",
    ("own-data.md", 1): "a model of the network; tests/experiment/test_whole_run.py runs its like",
    ("judges.md", 0): "asks a server of others; tests/test_rewards.py has one",
    ("environments.md", 1): "needs verifiers; tests/environments/test_verifiers.py has it",
}


def fences(page: Path, language: str) -> list[tuple[str, str]]:
    """(code, the block without a language that follows it at once, or '') of each fence."""
    pattern = rf"^```{language}(?: [^\n]*)?\n(.*?)^```\n(?:\n```\n(.*?)^```)?"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


def titled(page: Path) -> dict[str, str]:
    """The files that a page shows: `title="name"` at a fence."""
    pattern = r'^```\w+ title="([\w.]+\.\w+)"\n(.*?)^```'
    return dict(re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def own_algorithms_are_forgotten() -> Iterator[None]:
    yield
    for name in set(PRESETS) - BUILT_IN:
        del PRESETS[name]  # pyright: ignore[reportIndexIssue]


def with_fences(language: str) -> list[Path]:
    return [page for page in PAGES if fences(page, language)]


@pytest.mark.parametrize("page", with_fences("pycon"), ids=lambda page: page.name)
def test_examples_of_a_page_are_true(page: Path):
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    scope: dict[str, Any] = {}
    for number, (code, _) in enumerate(fences(page, "pycon")):
        test = parser.get_doctest(code, scope, f"{page.name} {number}", str(page), 0)
        runner.run(test, clear_globs=False)
        scope |= test.globs
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 0


def programs() -> Iterator[Any]:
    for page in with_fences("python"):
        for number, (code, shown) in enumerate(fences(page, "python")):
            if (page.name, number) not in NOT_RUN:
                yield pytest.param(code, shown, id=f"{page.name}-{number}")


@pytest.mark.parametrize(("code", "shown"), list(programs()))
def test_programs_run_and_print_what_is_shown(
    code: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "docs", "exec"), {"__name__": "__main__"})
    if shown:
        assert printed.getvalue() == shown
    assert not [record for record in caplog.records if record.name == "gspo"], "a warning"


@pytest.mark.parametrize(("name", "number"), sorted(NOT_RUN))
def test_what_is_not_run_is_python(name: str, number: int):
    (page,) = (page for page in PAGES if page.name == name)
    code, _ = fences(page, "python")[number]
    compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", with_fences("toml"), ids=lambda page: page.name)
def test_toml_is_a_spec(page: Path):
    for code, _ in fences(page, "toml"):
        data = tomllib.loads(code)
        if "base" in data:
            CompareSpec(**data)
            continue
        if not {"task", "rollout", "dataset", "environment"} & set(data):
            data["task"] = "sort"
        Spec(**data)


def test_the_full_toml_example_has_every_field():
    code, _ = fences(DOCS / "train-toml.md", "toml")[0]
    shown = set(re.findall(r"^#? ?(?:\[load\.)?(\w+)\]? *(?:=|$)", code, re.MULTILINE))
    fields = set(Spec.model_fields) | set(art.dev.TrainConfig.model_fields)
    fields |= set(art.dev.InternalModelConfig.model_fields) | set(Data.model_fields)
    arts = {"ppo", "normalize_by_length", "precalculate_logprobs"}
    tables = {"train", "sft", "load", "task_options", "environment_options"}
    assert fields - shown - tables - {"data"} == arts


def test_option_names_of_other_trainers_lead_to_ones_that_exist():
    known = {f"train.{name}" for name in art.dev.TrainConfig.model_fields}
    known |= {f"load.{name}" for name in art.dev.InternalModelConfig.model_fields}
    known |= set(Spec.model_fields)
    page = (DOCS / "coming-from.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    ours = [cell for row in rows if len(row) == 5 for cell in [row[2]]]
    names = {
        quoted.split(" = ")[0]
        for cell in ours
        for quoted in re.findall(r"`([^`]+)`", re.sub(r"\[[^\]]*\](?!\()", "", cell))
    }
    assert len(names) > 25
    assert names - known == {"gspo"} or names <= known
    values = re.findall(r"`train\.(\w+) = \"([^\"]+)\"`", page)
    assert values
    for name, value in values:
        extra = {"old_logprobs": "trainer"} if name == "correction" else {}
        art.dev.TrainConfig(**{**extra, name: value})  # pyright: ignore[reportArgumentType]


def test_the_conversation_of_the_page_is_that_of_the_example():
    shown, _ = fences(DOCS / "multi-turn.md", "python")[0]
    example = (ROOT / "examples" / "multi_turn.py").read_text()
    assert shown.split("\n\n\n")[-1].strip() == example.split("\n\n\n")[-1].strip()


def test_the_tables_of_the_worked_example_are_its_output():
    page = (DOCS / "objective.md").read_text()
    section = page.split("## Three tokens, by hand")[1].split("\n## ")[0]
    tokens = [line.split("|")[2:6] for line in section.splitlines() if re.match(r"\| \d", line)]
    old, new, gap, ratio = ([float(row[i]) for row in tokens] for i in range(4))
    assert f"old, new = torch.tensor({old}), torch.tensor({new})" in section
    assert f"({gap}, {ratio})" in section
    for preset in ("gspo", "grpo"):
        line = next(x for x in section.splitlines() if x.startswith(f"| `{preset}`"))
        cells = [[float(v) for v in cell.split(",")] for cell in line.split("|")[2:6]]
        for advantage, at in ((1.0, 0), (-1.0, 2)):
            shown = f'>>> row("{preset}", {advantage})\n({cells[at][0]}, {cells[at + 1]})'
            assert shown in section


def test_every_public_name_has_its_place_in_the_reference():
    listed = set(re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    modules = {"dev": gspo.dev, "objective": gspo.objective}
    in_modules = ("gspo", "gspo.core.errors")
    wanted = {f"{home}.{name}" for name, home in gspo._HOMES.items() if home not in in_modules}
    wanted |= {f"gspo.{m}.{name}" for m, module in modules.items() for name in module.__all__}
    assert wanted - listed == set()
    assert "gspo.core.errors" in listed


class Silent:
    def started(self, spec: Spec, step: int, notes: list[str]) -> None: ...
    def stepped(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, estimate: Estimate) -> None: ...


EXTENDING = titled(DOCS / "extending.md")


@pytest.mark.parametrize("name", [name for name in EXTENDING if name.endswith(".toml")])
async def test_tasks_and_objectives_of_ones_own_train_from_outside_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file, text in EXTENDING.items():
        (tmp_path / file).write_text(text)
        monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
    sizes = ["steps=1", "prompts=2", "completions=4", "eval_prompts=2", f"path={tmp_path}"]
    spec = read_spec(tmp_path / name, sizes)
    make_plan(spec)
    outcome = await run_experiment(spec, Silent())
    assert outcome.steps == 1


def test_the_table_of_the_learning_rates_is_what_was_measured():
    spec = importlib.util.spec_from_file_location("sweep", DOCS / "defaults" / "sweep.py")
    assert spec is not None and spec.loader is not None
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    rows = json.loads(sweep.RESULTS.read_text())
    assert sweep.table(rows) in (DOCS / "defaults.md").read_text()
    sizes = {"moe": 229_184, "moe-lora": 229_184, "dense": 1_348_736, "dense-lora": 1_348_736}
    for name, size in sizes.items():
        rate = default_learning_rate(size, "lora" in name)
        assert sweep.CHOSEN[name] == [(rate, WARMUP)]
        chosen = [row for row in rows if (row["grid"], row["learning_rate"]) == (name, rate)]
        assert len(chosen) == 3 and all(row["after"] > row["before"] for row in chosen)


def test_the_table_of_the_defaults_is_the_rule():
    page = (DOCS / "defaults.md").read_text()
    row = r"^\| ([\d.]+)([MB])[^|]*\| ([\d.e-]+) \| ([\d.e-]+) \|$"
    found = re.findall(row, page, re.MULTILINE)
    assert len(found) == 7
    for number, unit, full, lora in found:
        size = 229_184 if number == "0.23" else float(number) * {"M": 1e6, "B": 1e9}[unit]
        assert default_learning_rate(int(size), False) == float(full)
        assert default_learning_rate(int(size), True) == float(lora)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_the_run_of_the_readme_learns(seed: int, tmp_path: Path):
    (text,) = [code for code, _ in fences(ROOT / "README.md", "toml") if "# run.toml" in code]
    (tmp_path / "run.toml").write_text(text)
    spec = read_spec(tmp_path / "run.toml", [f"seed={seed}", f"path={tmp_path}"])
    outcome = await run_experiment(spec, Silent())
    assert outcome.before is not None and outcome.after is not None
    assert outcome.after.mean > outcome.before.mean + 0.02


def test_nothing_tells_to_install_gspo_from_pypi():
    """It is not there: who takes the name could send anything."""
    places = [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    for path in places:
        assert not re.search(r"pip install ['\"]?gspo\b", path.read_text()), path
