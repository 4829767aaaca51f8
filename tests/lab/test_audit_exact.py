"""`gspo audit --exact`: the parts, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo.core.errors import ConfigError
from gspo.lab.audit_exact import audit_exact, render
from models import folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_is_exact(dtype: str):
    report = audit_exact("embedded:sort", dtype)
    assert (report["exact"], report["reason"]) == (True, None)
    kinds = {part["kind"] for part in report["parts"]}
    assert {"Embedding", "Qwen3MoeRMSNorm", "Linear", "Qwen3MoeExperts", "head"} <= kinds
    assert all(report["multiple"] % part["multiple"] == 0 for part in report["parts"])
    assert "at least" in render(report)
    assert f"exact: engine and trainer have the same bits in {dtype}" in render(report)
    json.dumps(report)


def test_a_model_that_cannot_be_exact_says_why(tmp_path: Path):
    report = audit_exact(folder(tmp_path, "qwen3_next"))
    assert not report["exact"]
    assert render(report).startswith(
        "not exact: the attention of Qwen3NextForCausalLM is not gspo's"
    )


def test_another_precision_is_refused():
    with pytest.raises(ConfigError, match=r"--rollout-dtype int4: .* float32 or bfloat16"):
        audit_exact("embedded:sort", "int4")
