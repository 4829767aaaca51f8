"""Rollouts of `gspo train`: the task's, the user's own, and what these raise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gspo as art
from experiment.small_runs import Silent, own_rollout, records, small
from gspo import dev
from gspo.backend.stored_batch import read_batch
from gspo.core.byname import find_module
from gspo.core.errors import ConfigError, DataError, RolloutError
from gspo.experiment.loop import run_experiment
from gspo.experiment.plan import make_plan
from gspo.experiment.rollout import FRAMES, LINES, load_rollout, plain_prompt, users_errors
from gspo.experiment.run_file import read_spec
from gspo.experiment.spec import Spec
from gspo.policy.embedded import build_tokenizer, embedded_folder
from gspo.tasks import Task

SIZES: dict[str, Any] = {"steps": 1, "prompts": 2, "completions": 4, "eval_prompts": 0}


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """The embedded model as a folder without a chat template."""
    folder = tmp_path / "base"
    shutil.copytree(embedded_folder("embedded:sort"), folder)
    (folder / "chat_template.jinja").unlink()
    return folder


async def test_a_model_without_a_chat_template_trains_on_plain_prompts(
    tmp_path: Path, base_model: Path
):
    spec = Spec(path=str(tmp_path), model=str(base_model), task="sort", **SIZES)
    assert "no chat template: plain prompts" in make_plan(spec)
    assert "template" not in make_plan(Spec(task="sort"))
    outcome = await run_experiment(spec, Silent())
    batch = read_batch(outcome.run / "trajectories/train/0001.parquet")
    tokenizer = build_tokenizer()
    for trajectory in (t for group in batch.groups for t in group):
        (choice,) = trajectory.choices()
        prompt = choice.prompt_token_ids  # pyright: ignore[reportAttributeAccessIssue]
        assert tokenizer.decode(prompt) == plain_prompt(trajectory.messages()[:1])  # pyright: ignore[reportArgumentType]
        assert len(choice.token_ids) > 0  # pyright: ignore[reportAttributeAccessIssue]


async def test_a_prompt_that_the_engine_refuses_is_one_line(tmp_path: Path):
    spec = Spec(path=str(tmp_path), task="sort", max_tokens=512, **SIZES)
    with pytest.raises(DataError, match=r"the engine refuses a prompt: .* context is 512"):
        await run_experiment(spec, Silent())


PARITY = """
from gspo.tasks import Problem, Task

class Parity(Task):
    max_tokens = 2

    def __init__(self, limit=10_000):
        self.limit = limit

    def draw(self, key):
        return Problem(str(key % self.limit), "1" if key % 2 else "0")

    def score(self, problem, completion):
        return float(completion[:1] == problem.answer)

class Broken(Parity):
    def score(self, problem, completion):
        return completion[99]

class NoDraw(Task):
    max_tokens = 2

class NoLimit(Parity):
    max_tokens = property(lambda self: self.nowhere)

Number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's file and, beside it, the user's own tasks; the working directory is elsewhere."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_tasks", raising=False)
    (tmp_path / "own_tasks.py").write_text(PARITY)
    path = tmp_path / "run.toml"
    sizes = "\n".join(f"{name} = {size}" for name, size in SIZES.items())
    path.write_text(f'task = "own_tasks:Parity"\nmodel = "embedded:sort"\n{sizes}\n')
    return path


async def test_a_task_of_the_users_own_stands_beside_the_file(own: Path):
    spec = read_spec(own, [f"path={own.parent / 'runs'}", "task_options.limit=64"])
    assert "completions of up to 2 tokens" in make_plan(spec)
    outcome = await run_experiment(spec, Silent())
    record = json.loads((outcome.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= record["train/reward"] <= 1
    batch = read_batch(outcome.run / "trajectories/train/0001.parquet")
    assert all(int(g.trajectories[0].messages()[0]["content"]) < 64 for g in batch.groups)  # pyright: ignore


async def test_what_it_raises_is_told_by_its_line(own: Path):
    spec = read_spec(own, [f"path={own.parent / 'runs'}", 'task="own_tasks:Broken"'])
    with pytest.raises(RolloutError, match=r"IndexError(.|\n)*return completion\[99\]"):
        await run_experiment(spec, Silent())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_tasks:Number", {}, "must be a class that derives from"),
        ("own_tasks:NoDraw", {}, "draw"),
        ("own_tasks:NoLimit", {}, "needs max_tokens"),
        ("own_tasks:Parity", {"limt": 3}, "limt"),
        ("own_tasks:Parities", {}, "Did you mean 'Parity'"),
    ],
)
def test_a_class_that_is_no_task_is_refused_by_the_plan(
    own: Path, name: str, options: dict[str, Any], message: str
):
    overrides = [f'task="{name}"', *(f"task_options.{k}={v}" for k, v in options.items())]
    with pytest.raises(ConfigError, match=message):
        make_plan(read_spec(own, overrides))


OWN = """
import gspo as art

async def rollout(model, scenario):
    messages = [{'role': 'user', 'content': str(scenario.index)}]
    response = await model.openai_client().chat.completions.create(
        model=model.inference_name, messages=messages, max_tokens=4)
    choice = response.choices[0]
    reward = float(len(choice.message.content))
    return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)
"""


async def test_rollouts_of_ones_own(tmp_path: Path):
    outcome = await run_experiment(own_rollout(tmp_path, OWN, steps=1), Silent())
    assert records(outcome.run)[1]["train/reward"] > 0


EXITS = """
import sys

async def rollout(model, scenario):
    sys.exit(0)
"""


async def test_a_rollout_that_exits_is_an_error_told_by_its_line(tmp_path: Path):
    with pytest.raises(RolloutError, match=r"raised SystemExit: 0(.|\n)*line 5, in rollout"):
        await run_experiment(own_rollout(tmp_path, EXITS), Silent())


async def test_a_rollout_that_returns_nothing_is_named_with_its_prompt(tmp_path: Path):
    told = r"prompt 0 \(train\), after step 0: the rollout 'rollout' returned None .*a Trajectory"
    code = "async def rollout(model, scenario): ..."
    with pytest.raises(DataError, match=told):
        await run_experiment(own_rollout(tmp_path, code, **SIZES), Silent())


HANGS = """
import asyncio
import gspo as art

calls = 0

async def rollout(model, scenario):
    global calls
    calls += 1
    if calls == 3:
        await asyncio.Event().wait()
    messages = [{"role": "user", "content": "312"}]
    answer = await model.openai_client().chat.completions.create(
        model=model.inference_name, messages=messages, max_tokens=4
    )
    return art.Trajectory(messages_and_choices=[*messages, answer.choices[0]], reward=calls % 2)
"""


async def test_rollouts_that_never_end_are_left_out_and_the_rest_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    spec = own_rollout(tmp_path, HANGS, **SIZES, rollout_timeout=2.0)
    outcome = await run_experiment(spec, Silent())
    (line,) = records(outcome.run)
    assert line["train/exceptions"] >= 1  # more, if the machine is slow
    assert line["train/trajectories"] == 8 - line["train/exceptions"]
    assert "group 0, rollout 2 (rollout) was given up after 2" in caplog.text


async def test_dynamic_sampling_replaces_flat_groups(tmp_path: Path):
    sizes = {"steps": 1, "prompts": 8, "completions": 2}  # pairs: most have equal rewards
    plain = await run_experiment(small(tmp_path / "a", **sizes), Silent())
    spec = small(tmp_path / "b", dynamic_sampling=True, **sizes)
    dynamic = await run_experiment(spec, Silent())
    flat = [records(run)[1]["train/groups_zero_advantage"] for run in (plain.run, dynamic.run)]
    assert flat[0] > 0
    assert flat[1] < flat[0]
    assert records(dynamic.run)[1]["train/trajectories"] == 16


FUNCTION = "async def f(model, scenario): ...\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os", "write 'module:name'"),
        ("os:", "write 'module:name'"),
        ("../mine:r", "cannot import ../mine"),
        ("os:nothing", "os has no 'nothing'"),
        ("os.path:join", "is not an async function"),
        ("nothing_here:f", r"cannot import nothing_here: there is no nothing_here\.py beside"),
        ("nothing_here.too:f", r"no nothing_here/too\.py"),
        ("folder/none.py:f", "there is no file /.*none.py"),
    ],
)
def test_names_that_lead_nowhere(folder: Path, name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_rollout(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "broken_rollout.py fails when it is imported: ZeroDivisionError"),
        ("def f(", "broken_rollout.py fails when it is imported: SyntaxError"),
        ("import sys; sys.exit(0)", "broken_rollout.py fails when it is imported: SystemExit: 0"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("async def f(model): ...", "must take two arguments"),
        ("async def f(model, scenario, turns): ...", "scenario\\): missing .* 'turns'"),
        ("def f(model, scenario): ...", "is not an async function"),
    ],
)
def test_a_module_that_fails_is_named_each_time(folder: Path, code: str, message: str):
    (folder / "broken_rollout.py").write_text(code)
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            load_rollout("broken_rollout:f")


def test_a_module_is_found_in_the_working_directory_and_checked_without_running(folder: Path):
    (folder / "plain_rollout.py").write_text("print('ran')\n" + FUNCTION)
    find_module("plain_rollout:f", "rollout")
    assert "plain_rollout" not in sys.modules
    function = load_rollout("plain_rollout:f")
    assert function.__module__ == "plain_rollout"
    assert load_rollout("plain_rollout.py:f") is function
    (folder / "optional_rollout.py").write_text("async def f(model, scenario, turns=2): ...")
    load_rollout("optional_rollout:f")


def test_files_of_the_users_never_take_the_place_of_a_library(folder: Path):
    (folder / "rich.py").write_text("import json, colorsys\n" + FUNCTION)
    (folder / "colorsys.py").write_text("raise RuntimeError('not the library')")
    assert load_rollout("rich:f").__module__ == "gspo_user_rich"
    code = "import rich; print(rich.__file__)"
    (folder / "use.py").write_text("import rich, helper_of_use\nFILE = rich.__file__\n" + FUNCTION)
    (folder / "helper_of_use.py").touch()
    real = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert load_rollout("use:f").__globals__["FILE"] == real.stdout.strip()  # pyright: ignore[reportFunctionMemberAccess]


def test_a_package_imports_from_itself(folder: Path):
    package = folder / "exp" / "rollouts_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("from .whole import f\n")
    (package / "whole.py").write_text(FUNCTION)
    assert load_rollout("exp/rollouts_package/parts.py:f").__module__ == "rollouts_package.whole"


@pytest.mark.parametrize("replay", ["rollout", "old_policy"])
async def test_a_run_with_replay_measures_its_routing(tmp_path: Path, replay: str):
    train = dev.TrainConfig(routing_replay=replay, measure_routing=True)  # pyright: ignore[reportArgumentType]
    await run_experiment(small(tmp_path, steps=1, train=train), Silent())
    text = (tmp_path / "gspo" / "run" / "metrics.jsonl").read_text()
    trained = next(line for line in map(json.loads, text.splitlines()) if "loss/policy" in line)
    assert trained["moe/routing_agreement"] == 1.0
    assert 0 <= trained["moe/experts_changed"] <= trained["moe/tokens_changed"] <= 1
    assert trained["moe/load_cv"] > 0


def told(function: Callable[[], object], step: int = 2) -> list[str]:
    with pytest.raises(RolloutError) as caught, users_errors("train", 7, step):
        function()
    return str(caught.value).splitlines()


def test_a_mistake_of_gspos_own_keeps_its_traceback():
    """The user's code called it, but the line that failed is ours."""

    with pytest.raises(AttributeError), users_errors("train", 7, 2):
        Task.problem(None, "train", 0)  # pyright: ignore[reportArgumentType]


def test_what_gspo_refuses_is_told_at_the_users_line():
    lines = told(lambda: art.Trajectory(rewrd=1.0))  # pyright: ignore[reportCallIssue]
    assert "prompt 7 (train), after step 2, raised DataError" in lines[0]
    assert "art.Trajectory(rewrd=1.0)" in lines[-2]
    assert "goes on" in lines[-1]


def test_an_error_without_a_line_of_the_users_says_which_prompt_it_is_about():
    error = DataError("a rollout returned int")
    text = "with users_errors('train', 0, 0):\n    raise error"
    code = compile(text, str(Path(art.__file__).parent / "x.py"), "exec")
    with pytest.raises(DataError) as caught:
        exec(code, {"error": error, "users_errors": users_errors})
    assert str(caught.value) == (
        "the rollout of prompt 0 (train), after step 0: a rollout returned int"
    )
    assert caught.value.__cause__ is error


def test_the_text_and_the_frames_are_bounded():
    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("\n".join(map(str, range(50)))) from KeyError("first")
        deep(n - 1)

    lines = told(lambda: deep(20))
    assert len(lines) == LINES + FRAMES + 3 < 15
    assert "caused by KeyError: 'first'" in lines


@pytest.mark.parametrize("status", [0, 3])
def test_a_call_of_exit_is_an_error_too(status: int):
    lines = told(lambda: sys.exit(status))
    assert lines[0].endswith(f"raised SystemExit: {status}")
    assert "sys.exit(status)" in lines[-2]


def test_before_the_first_step_nothing_is_said_to_be_saved():
    assert told(lambda: int("x"), step=0)[-1].startswith("Nothing was trained yet")


def test_a_folder_whose_name_begins_as_ours_is_the_users():
    """`gspo_tasks` beside `gspo`, and `python3.12-mine` beside `python3.12`."""
    for folder in (Path(art.__file__).parent, Path(sysconfig.get_path("stdlib"))):
        code = compile(
            "def fails():\n    raise ValueError('mine')\n", f"{folder}_mine/a.py", "exec"
        )
        names: dict[str, Callable[[], object]] = {}
        exec(code, names)
        assert "raised ValueError: mine" in told(names["fails"])[0]
        assert any(f"{folder}_mine/a.py, line 2" in line for line in told(names["fails"]))
