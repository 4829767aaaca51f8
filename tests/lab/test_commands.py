"""The verbs of the lab, as processes; and what of it works without its libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import gspo, gspo_without_lab


def test_audit_prints_text_and_json_and_draws(tmp_path: Path):
    picture = tmp_path / "audit.html"
    arguments = ("--rollout-dtype", "int4", "--prompts", "8", "--epsilon-low", "0.01")
    done = gspo("audit", "embedded:sort", *arguments, "--picture", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("embedded:sort, sampled in int4")
    assert any(line.startswith("verdict") and "noise is" in line for line in lines)
    result = json.loads(lines[-1])
    assert {"total", "buckets", "verdict", "advice", "routing_agreement"} <= set(result)
    assert (result["epsilon_low"], result["epsilon_high"]) == (0.01, 4e-4)
    assert picture.exists()


def test_inspect_prints_text_and_json_and_draws(tmp_path: Path):
    assert gspo("demo", "--steps", "2", "--path", str(tmp_path)).returncode == 0
    picture = tmp_path / "cosines.html"
    arguments = ("--presets", "grpo, reinforce", "--picture", str(picture), "--json")
    done = gspo("inspect", str(tmp_path / "demo" / "sort-1"), *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "step 2: 512 trajectories in 32 groups" in lines[0]
    assert any(line.startswith("weights before the step (checkpoint 0001)") for line in lines)
    result = json.loads(lines[-1])
    assert [at["weights"] for at in result["at"]] == ["before", "after"]
    assert [m["name"] for m in result["at"][1]["methods"]] == ["gspo", "grpo", "reinforce"]
    assert picture.exists()


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (("audit", "embedded:sort", "--picture", "audit.html"), "plotly"),
        (("inspect", "somewhere", "--picture", "cosines.html"), "plotly"),
        (("compare", "--quick", "--dry-run"), "scipy"),
        (("report", "somewhere"), "plotly"),
    ],
)
def test_without_its_libraries_a_verb_says_what_to_install(
    arguments: tuple[str, ...], package: str
):
    done = gspo_without_lab(*arguments)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert f"needs the package {package!r}: pip install -e '.[lab]' in your clone" in error
    assert "Traceback" not in done.stderr


def test_audit_exact_lists_the_parts_and_refuses_what_says_nothing_there():
    done = gspo("audit", "embedded:sort", "--exact", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exact"] is True
    done = gspo("audit", "embedded:sort", "--exact", "--prompts", "3")
    assert done.returncode != 0
    assert "--prompts says nothing with --exact" in done.stderr
