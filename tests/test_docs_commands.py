"""Every command that README.md and docs/ show is run, or says here why not.

A command that no table knows makes the test fail.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo.cli import app
from test_docs import DOCS, PAGES, ROOT, fences

AUDIT = ("--prompts", "4", "--completions", "2")
SMALL = ("--set", "eval_prompts=8", "--set", "eval_completions=2", "--set", "prompts=8")

RUN: dict[str, tuple[str, ...]] = {
    # command: what makes it short
    "gspo presets": (),
    "gspo plan Qwen/Qwen3-30B-A3B --gpus 16": (),
    "gspo audit embedded:sort": AUDIT,
    "gspo audit embedded:sort --rollout-dtype int4": AUDIT,
    "gspo train run.toml --dry-run": (),
    "gspo train run.toml": (*SMALL, "--set", "steps=2"),
    "gspo train run.toml --set steps=60": (*SMALL, "--set", "steps=3"),
    "gspo runs": (),
    "gspo sample sort-small -n 2 --step best": ("--path", ".gspo"),
    "gspo export sort-small --to out --step best --dtype bfloat16": (),
    "gspo train run.toml --pipeline": (*SMALL, "--set", "steps=2", "--set", "name=ahead"),
    "gspo train run.toml --pipeline --set train.max_staleness=2": (
        *(*SMALL, "--set", "steps=3", "--set", "name=two-ahead"),
    ),
    "gspo train run.toml --samples 3": (*SMALL, "--set", "steps=4"),
    "gspo sample embedded:sort 3141592653 --temperature 0 --max-tokens 12": (),
    "gspo fork sort-small sort-again --step latest": (),
    "gspo train run.toml --set name=sort-again --set steps=60": (*SMALL, "--set", "steps=5"),
    "gspo train run.toml --set steps=2 --set train.epsilon=0.02 --set load.lora.r=4": (
        *SMALL,
        *("--set", "name=lora"),  # the page's file is another than the README's
    ),
    "gspo train spec.toml --set name=replay-$replay --set train.routing_replay=$replay "
    "--set train.measure_routing=true": (*SMALL, "--set", "steps=1", "--set", "completions=16"),
    "gspo train multi_turn.toml": (*SMALL, "--set", "steps=1", "--set", "prompts=2"),
    "gspo inspect .gspo/gspo/sort-small": ("--presets", "grpo"),
    "gspo inspect .gspo/demo/sort-1": ("--presets", "grpo"),
    "gspo prune sort-small --keep 1": (),  # after what needs the step before the last
    "gspo report .gspo/demo/sort-1": (),
    "gspo report .gspo/demo/sort-1 .gspo/demo/sort-2 --out both.html": (),
    # What a comparison computes is tested in tests/lab/test_compare_runs.py.
    "gspo compare --quick": ("--dry-run",),
    "gspo compare stability.toml": ("--dry-run",),
    "gspo compare stability.toml --dry-run": (),
}
"""In an order in which one worker does little twice."""

_ENVIRONMENTS = "a minute; tests/examples/test_environments.py does it, where it is installed"
_BENCHMARKS = "minutes to hours; tests/benchmarks has the parts"
_SERVE = "a port; test_cli.py serves and asks"
NOT_RUN = {
    "make demo": "installs; its command is tested in test_cli.py and learns in test_loop.py",
    "make test": "this",
    "gspo demo --steps 3 --path /tmp/runs --json": "run with other numbers in test_cli.py",
    "python examples/agents/train_lookup.py --agent plain": "minutes; test_agents.py has parts",
    "python examples/environments/lessons.py examples/environments/guess.toml": _ENVIRONMENTS,
    "gspo train examples/environments/guess.toml": _ENVIRONMENTS,
    "python examples/environments/curve.py .gspo/environments/{gcd,larger,guess,coins,pole}": (
        _ENVIRONMENTS
    ),
    "pip install gymnasium textarena textworld": "network",
    "make bench": _BENCHMARKS,
    "make bench-check": _BENCHMARKS,
    "make bench-vllm": _BENCHMARKS,
    "make bench-gpu": "a GPU",
    "python benchmarks/run.py --list": _BENCHMARKS,
    "python benchmarks/run.py vs_trl:b rollout": _BENCHMARKS,
    "python benchmarks/run.py vs_trl --update": _BENCHMARKS,
    "python benchmarks/run.py --resume": _BENCHMARKS,
    "python benchmarks/run.py rollout --tiny": _BENCHMARKS,
    "make gpu-wheels": "network",
    "python benchmarks/gpu_suite.py": "a GPU",
    "python benchmarks/gpu_suite.py --list": _BENCHMARKS,
    "python benchmarks/gpu_suite.py --only head": "a GPU",
    "python benchmarks/gpu_suite.py --tiny": _BENCHMARKS,
    'python3 benchmarks/gpu_suite.py --out "$OUT"': "a GPU",
    "gspo train examples/own_data/run.toml": "tests/examples/test_examples.py runs it",
    "rm -r ~/.cache/gspo/embedded": "the other tests need what it deletes",
    "pip install -e '.[lab]'": "network",
    "cd examples": "a folder of the clone",
    "gspo serve embedded:sort --port 8000": _SERVE,
    "gspo serve sort-small --step best": _SERVE,
    "gspo chat sort-small": "a conversation; tests/experiment/test_talk.py has one",
}
"""Command, or how it begins: why it is not run."""
BEGINNINGS = {
    "curl -s http://127.0.0.1:8000": _SERVE,
    "python -m verl.trainer": "verl's",
    "VLLM_SERVER_DEV_MODE=1": "vLLM's; tests/serve/test_vllm_engine.py starts it so",
}
_SYNTAX = re.compile(r"for \w+ in .*; do|done")


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page, without comments, continued lines joined."""
    for language in ("bash", "sh"):
        for code, _ in fences(page, language):
            text = re.sub(r"(^|\s+)#.*$", "", code, flags=re.MULTILINE)
            text = re.sub(r" *\\\n *", " ", text)
            text = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), text)
            for line in text.splitlines():
                command = " ".join(line.split())
                if command and not _SYNTAX.fullmatch(command):
                    yield command


SHOWN = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_every_command_is_run_or_says_why_not(page: str, command: str):
    known = command in RUN or command in NOT_RUN or command.startswith(tuple(BEGINNINGS))
    assert known, f"{page} shows a command that is not tested: {command}"


def test_no_command_of_the_tables_is_gone():
    shown = {command for _, command in SHOWN}
    assert {*RUN, *NOT_RUN} <= shown
    assert len(SHOWN) > 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("commands")
    tomls = [code for code, _ in fences(ROOT / "README.md", "toml")]
    (folder / "run.toml").write_text(next(code for code in tomls if "# run.toml" in code))
    (folder / "spec.toml").write_text('task = "sort"\nprompts = 4\n')
    (folder / "stability.toml").write_text(fences(DOCS / "compare.md", "toml")[0][0])
    for name in ("multi_turn.toml", "multi_turn.py"):
        (folder / name).write_text((ROOT / "examples" / name).read_text())
    return folder


def gspo(command: str) -> None:
    """Run it in this process: torch is loaded once."""
    app(shlex.split(command)[1:], standalone_mode=False)


@pytest.mark.parametrize("command", RUN)
def test_the_commands_run_and_warn_of_nothing(
    command: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(place)
    # Another worker may have run the commands before this one.
    if "sort-small" in command and not Path(".gspo/gspo/sort-small").exists():
        gspo(f"gspo train run.toml --set steps=2 {shlex.join(SMALL)}")
    for run in (".gspo/demo/sort-1", ".gspo/demo/sort-2"):
        if run in command and not Path(run).exists():
            name = Path(run).name  # as `gspo demo` leaves it, from fewer prompts
            options = f"--set project=demo --set name={name} --set steps=2 {shlex.join(SMALL)}"
            gspo(f"gspo train spec.toml {options}")
    written = command.replace("$replay", "old_policy")
    caplog.clear()
    gspo(shlex.join([*shlex.split(written), *RUN[command]]))
    assert capsys.readouterr().out
    warnings = [r for r in caplog.records if r.name == "gspo" and r.levelno >= logging.WARNING]
    noisy = "int4" in command or "multi_turn" in command  # the page is about noise; a tiny batch
    assert noisy or not warnings


def test_every_metric_of_a_run_is_in_the_table_of_its_page(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    run = place / ".gspo/gspo/sort-small"
    if not run.exists():
        monkeypatch.chdir(place)
        gspo(shlex.join(["gspo", "train", "run.toml", *RUN["gspo train run.toml"]]))
    section = (DOCS / "run.md").read_text().split("## metrics.jsonl")[1].split("## Trackers")[0]
    known: set[str] = set()
    for line in section.splitlines():
        full = ""
        for name in re.findall(r"`([\w/]+)`", line.split("|")[1] if "|" in line else line):
            full = full.rpartition("_")[0] + name if name.startswith("_") else name
            known.add(full)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert {name for line in lines for name in json.loads(line)} - known == set()
