"""Which parts of a model give a row the same bits whatever is computed beside it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gspo.core.errors import ConfigError
from gspo.dev import InternalModelConfig
from gspo.lab.tables import as_text, cells, table
from gspo.policy.load import load_policy
from gspo.policy.probe import choose_packing
from gspo.serve.selfcheck import examine

_DTYPES = ("float32", "bfloat16")
_COLUMNS = ("name", "kind", "multiple", "how")


def audit_exact(model: str, dtype: str = "float32") -> dict[str, Any]:
    """Measure a model as `exact=True` does when it is loaded.

    Args:
        model: `embedded:<task>`, a folder, or a hub id.
        dtype: that engine and trainer compute in: float32 or bfloat16.

    Returns:
        A JSON object: `exact`, the `reason` if it is not, the `multiple` of tokens that passes are
        padded to, and the `parts`, each with its first module's name, its kind, the multiple of
        rows that it needs (None: none helps), and how it is computed instead of as usual.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: another dtype.
    """
    if dtype not in _DTYPES:
        raise ConfigError(
            f"--rollout-dtype {dtype}: with --exact, engine and trainer compute in the same "
            f"precision: {' or '.join(_DTYPES)}"
        )
    policy = load_policy(model, InternalModelConfig.model_validate({"dtype": dtype}))
    choose_packing(policy)
    parts, reason = examine(policy)
    return {
        "model": model,
        "dtype": dtype,
        "exact": policy.exact,
        "reason": reason,
        "multiple": policy.multiple,
        "parts": [asdict(part) for part in parts],
    }


def render(report: dict[str, Any], width: int = 100) -> str:
    """Draw the parts as a table, and the verdict below."""
    if report["exact"]:
        verdict = (
            f"exact: engine and trainer have the same bits in {report['dtype']}, on this machine "
            "and with as many threads. Passes are padded to a multiple of "
            f"{report['multiple']} tokens."
        )
    else:
        verdict = f"not exact: {report['reason']}."
    parts = [table(cells(_COLUMNS, report["parts"]))] if report["parts"] else []
    return as_text([*parts, verdict], width)
