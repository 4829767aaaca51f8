"""The command line: its surface, its errors, and a served model."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from gspo import __version__
from gspo.cli import app
from gspo.objective import PRESETS
from processes import gspo, gspo_here, gspo_without_lab


def test_surface_is_frozen():
    import typer

    root = typer.main.get_command(app)
    commands = root.commands  # pyright: ignore[reportAttributeAccessIssue]
    surface = {name: [p.name for p in c.params] for name, c in commands.items()}
    assert surface == {
        "demo": ["path", "steps", "seed", "profile", "as_json"],
        "train": ["spec", "overrides", "dry_run", "samples", "pipeline", "profile", "as_json"],
        "sft": [
            *("data", "model", "project", "name", "path", "epochs", "batch_size"),
            *("learning_rate", "max_tokens", "seed", "as_json"),
        ],
        "serve": ["model", "port", "host", "name", "api_key", "step", "path"],
        "plan": [
            *("model", "gpus", "gpu", "completions", "prompt_tokens", "mean_tokens", "longest"),
            *("lora", "mfu", "as_json"),
        ],
        "presets": ["as_json"],
        "runs": ["path", "as_json"],
        "sample": [
            *("model", "prompts", "step", "path", "completions", "system", "max_tokens"),
            *("temperature", "seed", "as_json"),
        ],
        "chat": ["model", "step", "path", "system", "max_tokens", "temperature"],
        "export": ["run", "to", "step", "path", "merge", "dtype", "push_to"],
        "fork": ["run", "name", "step", "path"],
        "prune": ["run", "keep", "metric", "path"],
        "audit": [
            "model",
            "rollout_dtype",
            "task",
            "prompts",
            "completions",
            "max_tokens",
            "temperature",
            "epsilon_low",
            "epsilon_high",
            "exact",
            "picture",
            "as_json",
        ],
        "inspect": ["run", "step", "path", "weights", "presets", "matrix", "picture", "as_json"],
        "compare": ["spec", "quick", "overrides", "dry_run", "workers", "path", "as_json"],
        "report": ["runs", "out", "path"],
    }


def test_demo_json_is_the_last_line(tmp_path: Path):
    done = gspo("demo", "--steps", "2", "--profile", "--json", "--path", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert {"reward_before", "reward_after", "prompts", "steps", "seconds", "run"} <= set(result)
    assert result["steps"] == 2
    assert Path(result["report"]).exists() and Path(result["profile"]).exists()
    assert [line for line in lines if re.match(r"held-out reward before  0\.\d+ \[0", line)]
    progress = [line for line in lines if line.startswith("step 2/2")]
    assert re.search(r"reward .* clipped .* tokens/s .* left", progress[0])


def test_without_the_lab_extra_demo_and_train_run_to_the_end(tmp_path: Path):
    spec = tmp_path / "run.toml"
    spec.write_text('task = "sort"\nsteps = 1\nprompts = 4\ncompletions = 4\neval_prompts = 4\n')
    done = gspo_without_lab(
        f"demo --steps 1 --json --path {tmp_path}", f"train {spec} --set path={tmp_path} --profile"
    )
    assert re.findall(r"exit status (\d)", done.stderr) == ["0", "0"], done.stderr
    lines = done.stdout.splitlines()
    (result,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert (result["steps"], result["report"]) == (1, None)
    assert 0 < result["reward_before"] < 1 and result["reward_before_95"] == [None, None]
    told = [line for line in lines if line.startswith("no report: ")]
    assert len(told) == 2 and told[0].endswith(
        "pip install -e '.[lab]' in your clone of gspo (it is not on PyPI)"
    )
    assert "held-out reward after" in done.stdout and "profile: " in done.stdout


def test_profile_prints_a_table_and_writes_it(tmp_path: Path):
    spec = tmp_path / "run.toml"
    spec.write_text('task = "sort"\nsteps = 1\nprompts = 8\neval_prompts = 4\n')
    done = gspo_here("train", str(spec), "--profile", "--json", "--set", f"path={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    stored = json.loads(Path(result["profile"]).read_text())
    names = [phase["name"] for phase in stored["phases"]]
    assert {"sampling", "forward", "head", "backward", "optimizer", "other"} <= set(names)
    assert sum(p["seconds"] for p in stored["phases"]) == pytest.approx(stored["seconds"])
    for name in (*names, "step"):
        assert any(line.split()[:1] == [name] for line in lines), name
    table = (tmp_path / "gspo" / "run" / "profile.txt").read_text()
    assert table in done.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path):
    spec = tmp_path / "run.toml"
    spec.write_text('task = "sort"\nprompts = 8\ncompletions = 4\n')
    done = gspo_here("train", str(spec), "--dry-run", "--set", f"path={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    assert '"prompts": 8' in done.stdout
    assert "32 sequences per step, 8 per optimizer step" in done.stdout
    assert "MiB" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_dry_run_tries_the_rewards(tmp_path: Path):
    rows = [{"prompt": str(number), "answer": "1"} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "nothing.py").write_text("def nothing(completion, row):\n    pass\n")
    spec = tmp_path / "run.toml"
    spec.write_text('model = "embedded:sort"\ndataset = "rows.jsonl"\nreward = "nothing:nothing"\n')
    done = gspo_here("train", str(spec), "--dry-run")
    assert done.returncode == 2
    assert "the reward 'nothing' of" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.toml"), "error: cannot read nowhere.toml"),
        (("train", "x.toml", "--dry-run", "--profile"), "leave one out"),
        (("train", "run.toml", "--pipeline", "--profile"), "pipeline does two: leave one out"),
        (("serve", "embedded:srot"), "Did you mean"),
        (("train", "run.toml", "--dry-run", "--set", "max_tokens=512"), "has a context of 512"),
        (("audit", "embedded:sort", "--rollout-dtype", "int3"), "Did you mean 'int"),
        (("audit", "Qwen/Qwen3-0.6B"), "name one with --task"),
        (("inspect", "nowhere"), "no run 'nowhere' in .gspo"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    arguments: tuple[str, ...], message: str, tmp_path: Path
):
    if arguments[1] == "run.toml":
        (tmp_path / "run.toml").write_text('task = "sort"')
        arguments = ("train", str(tmp_path / "run.toml"), *arguments[2:])
    if arguments[0] == "serve":
        arguments = (*arguments, "--port", "0")
    done = gspo_here(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_occupied_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = gspo_here("serve", "embedded:sort", "--port", str(port))
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "0 for a free one" in done.stderr


def test_serve_answers_on_loopback():
    command = [sys.executable, "-m", "gspo.cli", "serve", "embedded:sort", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split(" on ")[1].strip()
        assert url.startswith("http://127.0.0.1:")
        with OpenAI(base_url=url, api_key="x") as client:
            response = client.chat.completions.create(
                model="embedded:sort",
                messages=[{"role": "user", "content": "918273645546"}],
                temperature=0,
                n=2,
            )
        assert len(response.choices) == 2
        assert response.choices[0].token_ids  # pyright: ignore[reportAttributeAccessIssue]
        process.send_signal(signal.SIGINT)
        # A shell starts what runs in the background with SIGINT ignored: then nothing is raised.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert process.wait(timeout=30) == (0 if ignored else 128 + signal.SIGINT)


def test_help_lists_the_verbs_a_newcomers_first():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    verbs = ["demo", "train", "sft", "serve", "plan", "presets"]
    verbs += ["runs", "sample", "chat", "export", "fork", "prune"]
    verbs += ["audit", "inspect", "compare", "report"]
    assert re.findall(r"^│ (\w+) ", result.output, re.MULTILINE) == verbs


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"gspo {__version__}\n")


HEAVY = ("torch", "transformers", "plotly", "fastapi", "openai")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom gspo.cli import app\n"
        f"assert CliRunner().invoke(app, {arguments}).exit_code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["train", "run.toml"],
        ["train", "run.toml", "--dry-run"],
        ["serve", "embedded:sort"],
        ["sample", "embedded:sort"],
        ["chat", "embedded:sort"],
        ["export", "sort-1"],
        ["fork", "sort-1", "sort-2"],
        ["audit", "embedded:sort"],
        ["inspect", "somewhere"],
        ["compare", "--quick"],
    ],
)
def test_something_is_said_before_what_takes_seconds(arguments: list[str], tmp_path: Path):
    (tmp_path / "run.toml").write_text('task = "sort"')
    code = (
        "import sys\nfrom gspo import cli\nfrom gspo.experiment import run_commands\n"
        "from gspo.lab import commands\n"
        "def said(what):\n"
        f"    print([name for name in {HEAVY} if name in sys.modules])\n"
        "    raise SystemExit\n"
        "cli.say_loading = commands.say_loading = run_commands.say_loading = said\n"
        f"sys.argv = ['gspo', *{arguments}]\ncli.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_failure_of_the_users_rollout_is_told_by_the_users_lines(tmp_path: Path):
    (tmp_path / "rollouts.py").write_text(
        "import gspo as art\n\n"
        "def parse(text):\n"
        "    return float(text + 'x')\n\n"
        "async def mine(model, scenario):\n"
        "    if (scenario.split, scenario.index) == ('train', 5):\n"
        "        parse('1')\n"
        "    messages = [{'role': 'user', 'content': scenario.problem.prompt}]\n"
        "    answer = await model.openai_client().chat.completions.create(\n"
        "        model=model.inference_name, messages=messages, max_tokens=2)\n"
        "    return art.Trajectory(messages_and_choices=[*messages, answer.choices[0]])\n"
    )
    sizes = "steps = 3\nprompts = 3\ncompletions = 2\neval_prompts = 2\n"
    spec = tmp_path / "run.toml"
    spec.write_text('task = "sort"\nrollout = "rollouts:mine"\n' + sizes)
    done = gspo_here("train", str(spec), "--set", f"path={tmp_path / 'runs'}")
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert len(done.stderr.splitlines()) < 15
    assert "prompt 5 (train), after step 1, raised ValueError: could not convert" in told[0]
    assert told[1].endswith("rollouts.py, line 8, in mine: parse('1')")
    assert told[2].endswith("rollouts.py, line 4, in parse: return float(text + 'x')")
    assert "the same command goes on" in told[3]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs/gspo/run/checkpoints/0001").exists()


def test_a_rollout_that_exits_does_not_end_a_run_as_if_it_had_finished(tmp_path: Path):
    (tmp_path / "leaves.py").write_text("async def rollout(model, scenario):\n    exit(0)\n")
    spec = tmp_path / "run.toml"
    spec.write_text('rollout = "leaves:rollout"\nmodel = "embedded:sort"\neval_prompts = 0\n')
    done = gspo_here("train", str(spec), "--set", f"path={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert "raised SystemExit: 0" in done.stderr and "leaves.py, line 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_presets_are_listed_with_formula_defaults_and_source():
    result = CliRunner().invoke(app, ["presets"])
    assert result.exit_code == 0
    for name, preset in PRESETS.items():
        assert name in result.output
        assert preset.formula in result.output
    rows = json.loads(CliRunner().invoke(app, ["presets", "--json"]).output)
    assert [row["name"] for row in rows] == list(PRESETS)
    gspo_row = rows[0]
    assert gspo_row["defaults"]["epsilon_high"] == 4e-4
    assert "2507.18071" in gspo_row["source"]
