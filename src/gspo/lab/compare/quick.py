"""The comparison of `gspo compare --quick`: a look at the tool, not a result."""

from __future__ import annotations

from gspo.lab.compare.spec import CompareSpec

ADVICE = (
    "Two seeds show nothing: read this as a look at the tool, not as a result. Next: write a spec "
    "with seeds = 5 or more, several learning rates, and your own task (docs/compare.md), and run "
    "`gspo compare SPEC.toml`."
)


def quick_spec() -> CompareSpec:
    """GSPO and GRPO with their own clip ranges, two seeds, on `embedded:sort`."""
    return CompareSpec(
        name="quick",
        presets=("gspo", "grpo"),
        seeds=(0, 1),
        base={
            "task": "sort",
            "steps": 40,
            "learning_rate": 3e-4,
            "eval_prompts": 128,
            "eval_every": 10,
            "train": {"lr_warmup_steps": 5},
        },
    )
