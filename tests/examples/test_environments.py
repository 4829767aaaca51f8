"""The scripts of examples/environments, on the environment that needs no package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "environments"


@pytest.mark.slow
def test_a_warm_start_then_training_raises_the_held_out_reward(tmp_path: Path):
    for name in ("larger.py", "larger.toml", "lessons.py"):
        shutil.copy(FOLDER / name, tmp_path)
    subprocess.run([sys.executable, "lessons.py", "larger.toml"], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / "larger.jsonl").read_text().splitlines()]
    assert len(rows) == 400
    roles = [message["role"] for message in rows[0]["messages"]]
    assert roles == ["user", "assistant"] * 2
    command = [sys.executable, "-m", "gspo.cli", "train", "larger.toml", "--set", "steps=9"]
    subprocess.run(command, cwd=tmp_path, check=True)
    log = tmp_path / ".gspo/environments/larger/metrics.jsonl"
    rewards = {
        line["step"]: line["val/reward"]
        for line in map(json.loads, log.read_text().splitlines())
        if "val/reward" in line
    }
    assert rewards[9] > rewards[1] + 0.2
