"""The verbs of the lab; and what of it works without its libraries."""

from __future__ import annotations

import json
from pathlib import Path

from processes import gspo_here, gspo_without_lab


def test_audit_prints_text_and_json_and_draws(tmp_path: Path):
    picture = tmp_path / "audit.html"
    arguments = ("--rollout-dtype", "int4", "--prompts", "8", "--epsilon-low", "0.01")
    done = gspo_here("audit", "embedded:sort", *arguments, "--picture", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("embedded:sort, sampled in int4")
    assert any(line.startswith("verdict") and "noise is" in line for line in lines)
    result = json.loads(lines[-1])
    assert {"total", "buckets", "verdict", "advice", "routing_agreement"} <= set(result)
    assert (result["epsilon_low"], result["epsilon_high"]) == (0.01, 4e-4)
    assert picture.exists()


def test_inspect_prints_text_and_json_and_draws(tmp_path: Path):
    spec = tmp_path / "run.toml"
    spec.write_text('task = "sort"\nsteps = 2\nprompts = 8\neval_prompts = 0\n')
    assert gspo_here("train", str(spec), "--set", f"path={tmp_path}").returncode == 0
    picture = tmp_path / "cosines.html"
    arguments = ("--presets", "grpo, reinforce", "--picture", str(picture), "--json")
    done = gspo_here("inspect", "run", "--path", str(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "step 2: 128 trajectories in 8 groups" in lines[0]
    assert any(line.startswith("weights before the step (checkpoint 0001)") for line in lines)
    result = json.loads(lines[-1])
    assert [at["weights"] for at in result["at"]] == ["before", "after"]
    assert [m["name"] for m in result["at"][1]["methods"]] == ["gspo", "grpo", "reinforce"]
    assert picture.exists()
    done = gspo_here("report", "gspo/run", "--path", str(tmp_path))
    assert done.stdout == f"report: {tmp_path / 'gspo' / 'run' / 'report.html'}\n", done.stderr


def test_a_dry_run_of_a_comparison_tries_the_rewards(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n' * 3)
    (tmp_path / "rewards.py").write_text("def none(completion, row):\n    return None\n")
    (tmp_path / "methods.toml").write_text(
        'presets = ["gspo", "grpo"]\n[base]\nmodel = "embedded:sort"\nsteps = 2\n'
        'dataset = "rows.jsonl"\nreward = "rewards:none"\ndata = {heldout = "held.jsonl"}\n'
    )
    (tmp_path / "held.jsonl").write_text('{"prompt": "2", "answer": "2"}\n')
    done = gspo_here("compare", str(tmp_path / "methods.toml"), "--dry-run", f"--path={tmp_path}")
    assert done.returncode == 2 and "row 2, completion 0 is None (NoneType)" in done.stderr


def test_without_its_libraries_a_verb_says_what_to_install():
    wanted = {
        "audit embedded:sort --picture audit.html": "plotly",
        "inspect somewhere --picture cosines.html": "plotly",
        "compare --quick --dry-run": "scipy",
        "report .": "plotly",
    }
    done = gspo_without_lab(*wanted)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for package, error in zip(wanted.values(), errors, strict=True):
        assert f"needs the package {package!r}: pip install -e '.[lab]' in your clone" in error
    assert done.stderr.count("exit status 2\n") == len(wanted)
    assert "Traceback" not in done.stderr


def test_audit_exact_lists_the_parts_and_refuses_what_says_nothing_there():
    done = gspo_here("audit", "embedded:sort", "--exact", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exact"] is True
    done = gspo_here("audit", "embedded:sort", "--exact", "--prompts", "3")
    assert done.returncode != 0
    assert "--prompts says nothing with --exact" in done.stderr
