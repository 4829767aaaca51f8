"""The text of an inspection, of numbers that are made up."""

from __future__ import annotations

from typing import Any

from gspo.lab.inspect_report import render

METHOD = {
    "epsilon": (3e-4, 4e-4),
    "sequences": 8,
    "loss": -0.5,
    "kl": 0.0,
    "grad_norm": 0.25,
    "clip_fraction": 0.5,
    "clip_fraction_tokens": 0.125,
    "cosine": None,
}


def inspection(methods: int, **fields: Any) -> dict[str, Any]:
    shown = [METHOD | {"name": f"m{index}"} for index in range(methods)]
    at: dict[str, Any] = {"weights": "after", "source": "checkpoint 0003", "methods": shown}
    at |= {"log_ratio": {"p01": -0.12, "p50": 0.5, "p99": 0.036}}
    at |= {"cosines": [[1.0] * methods for _ in shown]}
    batch = {"run": "run", "step": 3, "own": "m0", "options": {}, "left_out": [], "at": [at]}
    counts = {"trajectories": 12, "groups": 3, "trained": 8, "tokens": 6655}
    return batch | counts | {"dropped": 0, "flat_groups": 0, "splits": {}, "turns": []} | fields


def test_what_the_batch_was_stands_first():
    lines = render(inspection(1)).splitlines()
    assert lines[:2] == [
        "run, step 3: 12 trajectories in 3 groups, 8 with an advantage, 6,655 sampled tokens",
        "its method: m0 (all options at their defaults)",
    ]
    lines = render(
        inspection(
            1,
            dropped=2,
            flat_groups=1,
            splits={"answer": 3},
            left_out=("a=1",),
            options={"epochs": 2, "epsilon": 0.1},
        )
    ).splitlines()
    assert "12 trajectories in 3 groups (1 with equal rewards), 2 too long and dropped" in lines[0]
    assert ", 3 split (answer), " in lines[0]
    assert lines[1] == "its method: m0 (epochs=2, epsilon=0.1)"
    assert lines[2] == "left out, being the same for every method: a=1"


def test_a_row_per_method():
    text = render(inspection(2))
    assert "weights after the step (checkpoint 0003); l_i 0.5 [-0.12, 0.036]" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("  m1"))
    assert row == ["m1", "0.0003/0.0004", "-0.5", "0.25", "0.5", "0.125", "-"]


def test_the_matrix_of_many_methods_is_printed_if_asked_for():
    assert "cosines of the gradients, weights after the step" in render(inspection(6))
    assert "cosines of the gradients" not in render(inspection(7))
    assert "cosines of the gradients" in render(inspection(7), matrix=True)
